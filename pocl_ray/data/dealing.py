"""How the rows of a global batch are dealt to workers and cut into micro-batches: by a number of rows, or of tokens.

Every worker gets equally many micro-batches, since forward passes may contain collective operations. What is dealt to
whom changes neither the loss, which is a sum over the global batch, nor what is trained on.
"""

from __future__ import annotations

import heapq
import itertools

import numpy as np
import numpy.typing as npt

from pocl_ray.errors import ConfigError

IntArray = npt.NDArray[np.integer]
PAD_MULTIPLE = 8
"""The number of which the width of a padded batch is made a multiple."""


def deal_rows(lengths_R: IntArray, rank: int, world_size: int, micro_batch_rows: int) -> list[IntArray]:
    """Return one rank's share of some rows, cut into micro-batches of rows of similar length.

    Args:
        lengths_R: Number of tokens of each row.
        rank: Rank of this worker.
        world_size: Number of workers.
        micro_batch_rows: Maximum rows of a micro-batch.

    Returns:
        Places of the rows of each micro-batch, equally many micro-batches on every rank. The last may be empty if the
        number of rows is no multiple of the number of workers.
    """
    # Dealt like cards, not cut in blocks: every worker gets long and short rows, and none waits for another.
    mine = np.argsort(-lengths_R, kind="stable")[rank::world_size]
    most = -(-len(lengths_R) // world_size)
    return [mine[start : start + micro_batch_rows] for start in range(0, most, micro_batch_rows)]


def deal_tokens(
    lengths_R: IntArray, rank: int, world_size: int, micro_batch_tokens: int, is_packed: bool
) -> list[IntArray]:
    """Return one rank's share of some rows, cut into micro-batches of at most so many tokens.

    Packed rows are dealt so that all micro-batches are about equally full, with as few micro-batches as hold them all.
    Padded rows keep the order of their lengths, so that little of a micro-batch is padding.

    Args:
        lengths_R: Number of tokens of each row; see `check_budget`.
        rank: Rank of this worker.
        world_size: Number of workers.
        micro_batch_tokens: Maximum tokens of a micro-batch, padding included.
        is_packed: Whether the rows are packed.

    Returns:
        Places of the rows of each micro-batch, equally many micro-batches on every rank. Some may be empty if there are
        fewer rows than micro-batches of all ranks.
    """
    order = np.argsort(-lengths_R, kind="stable")
    longest_first = lengths_R[order].astype(np.int64)
    if not is_packed:
        mine = order[rank::world_size]
        # Of every place the first rank has the longest row, so its cut fits all ranks.
        bounds = _padded_bounds(longest_first[::world_size], micro_batch_tokens)
        return [mine[start:stop] for start, stop in itertools.pairwise(bounds)]
    num_steps = max(1, -(-int(longest_first.sum()) // (world_size * micro_batch_tokens)))
    while True:  # with a micro-batch for each row all fit, so this ends
        owner_R, tokens_M = _balanced(longest_first, world_size * num_steps)
        if tokens_M.max() <= micro_batch_tokens:
            break
        num_steps += 1
    return [order[owner_R == micro_batch] for micro_batch in _shares(tokens_M, world_size)[rank]]


def _padded_bounds(longest_first: IntArray, micro_batch_tokens: int) -> list[int]:
    """The first row of each micro-batch of padded rows, and the number of rows."""
    bounds, width = [0], 0
    for place, length in enumerate(longest_first):
        if place == bounds[-1]:
            width = -(-int(length) // PAD_MULTIPLE) * PAD_MULTIPLE
        elif (place - bounds[-1] + 1) * width > micro_batch_tokens:
            bounds.append(place)
            width = -(-int(length) // PAD_MULTIPLE) * PAD_MULTIPLE
    return [*bounds, len(longest_first)]


def _balanced(longest_first: IntArray, num_micro_batches: int) -> tuple[IntArray, IntArray]:
    """The micro-batch of each row, and the tokens of each: a row goes to the one with the fewest so far."""
    owner_R = np.empty(len(longest_first), dtype=np.int64)
    heap = [(0, micro_batch) for micro_batch in range(num_micro_batches)]
    for place, length in enumerate(longest_first.tolist()):
        tokens, micro_batch = heap[0]
        owner_R[place] = micro_batch
        heapq.heapreplace(heap, (tokens + length, micro_batch))
    tokens_M = np.bincount(owner_R, weights=longest_first, minlength=num_micro_batches)
    return owner_R, tokens_M.astype(np.int64)


def _shares(tokens_M: IntArray, world_size: int) -> list[list[int]]:
    """The micro-batches of each rank.

    Ranks wait for each other in every step, so those that run at once are of similar size; among these the fullest
    goes to the rank with the least to do so far.
    """
    shares: list[list[int]] = [[] for _ in range(world_size)]
    totals = [0] * world_size
    fullest_first = np.argsort(-tokens_M, kind="stable").tolist()
    for start in range(0, len(fullest_first), world_size):
        idlest_first = sorted(range(world_size), key=lambda rank: totals[rank])
        for rank, micro_batch in zip(idlest_first, fullest_first[start : start + world_size], strict=True):
            shares[rank].append(micro_batch)
            totals[rank] += int(tokens_M[micro_batch])
    return shares


def check_budget(micro_batch_tokens: int | None, longest: int, is_packed: bool, key: str = "train") -> None:
    """Check that the longest row fits a micro-batch.

    Args:
        micro_batch_tokens: Token budget; None: there is none.
        longest: Tokens of the longest row.
        is_packed: Whether rows are packed; padded ones are as wide as a multiple of 8.
        key: Section of the config, for the message.

    Raises:
        ConfigError: It does not fit.
    """
    width = longest if is_packed else -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
    if micro_batch_tokens is not None and micro_batch_tokens < width:
        padded = "" if width == longest else f", {width} with padding"
        raise ConfigError(
            f"{key}.micro_batch_tokens is {micro_batch_tokens}, and the longest row has {longest} tokens{padded}; set "
            f"it to {width} or more, or shorten rows with data.max_tokens"
        )
