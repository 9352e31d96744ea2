"""The choice of the next token of each row: the likeliest one, or a draw, and the ban of repeated n-grams.

A token is drawn by inversion: each row brings one number u in [0, 1) for each token, and gets the first token at which
the cumulative distribution passes u. So what a row draws depends neither on the rows that share its batch nor on the
number of workers, and no generator has to be stored.

Legend: B rows of a batch, T tokens, V vocabulary, K blocks of the vocabulary, W places in a block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

_MANTISSA_BITS = 53
_BLOCK = 256  # tokens: a draw finds its block first, then its place in it

Choose = Callable[[Tensor, Tensor], Tensor]
"""A function from logits (B, V), which may be overwritten, and one number for each row, to one token for each row."""


def answer_draws(seed: int, key: int, num_tokens: int) -> np.ndarray:
    """Return the numbers that an answer is drawn with: float32 in [0, 1], shape (num_tokens,).

    Args:
        seed: Seed of all draws.
        key: Key of the row, such as its id.
        num_tokens: Maximum number of tokens of the answer.
    """
    return np.array([uniform(seed, key, number) for number in range(num_tokens)], np.float32)


def uniform(seed: int, key: int, number: int) -> float:
    """Return a number in [0, 1) that depends on (seed, key, number) alone."""
    digest = hashlib.blake2b(f"{seed}/{key}/{number}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> (64 - _MANTISSA_BITS)) / 2**_MANTISSA_BITS


def chooser(temperature: float, top_p: float) -> Choose:
    """Return the function that chooses tokens.

    Args:
        temperature: Divisor of the logits; 0 takes the likeliest token.
        top_p: Probability of the smallest set of tokens to draw from; 1 keeps all.
    """
    if temperature == 0:
        return lambda logits_BV, _: logits_BV.argmax(-1)

    def choose(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
        scaled_BV = logits_BV.float() if temperature == 1 else logits_BV.float().div_(temperature)
        return draw(scaled_BV, uniform_B) if top_p == 1 else _draw_nucleus(scaled_BV, uniform_B, top_p)

    return choose


def ban_repeats(logits_BV: Tensor, seen_BT: Tensor, size: int) -> None:
    """Set the logits of tokens that would repeat an n-gram to minus infinity, in place.

    Args:
        logits_BV: Logits of the next token.
        seen_BT: All tokens of each row so far, prompt and answer; -1 for padding.
        size: Length of the n-grams that may not come twice, at least 1.
    """
    num_seen = seen_BT.shape[1]
    if num_seen < size:
        return
    next_BT = seen_BT[:, size - 1 :]
    banned_BT = next_BT >= 0
    for place in range(size - 1):  # an n-gram matches where its first size - 1 tokens are the row's last ones
        last_B1 = seen_BT[:, num_seen - size + 1 + place, None]
        banned_BT &= seen_BT[:, place : num_seen - size + 1 + place] == last_B1
    # A minimum and not an assignment: a token may stand at several places, of which one is banned and others are not.
    # Nothing is looked up on the host, so a GPU need not wait.
    limit_BT = torch.zeros_like(banned_BT, dtype=logits_BV.dtype).masked_fill_(banned_BT, -torch.inf)
    limit_BT.masked_fill_(~banned_BT, torch.inf)
    logits_BV.scatter_reduce_(1, next_BT.clamp(min=0), limit_BT, "amin", include_self=True)


def draw(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Return the token of each row at which the cumulative distribution passes its number, shape (B,).

    The sum over all tokens is taken by blocks, so that only one block a row is cumulated. The logits are overwritten:
    another array of their size would take as long to be given by the system as the exponentials in it.
    """
    weight_BV = logits_BV.sub_(logits_BV.amax(-1, keepdim=True)).exp_()
    padding = -weight_BV.shape[-1] % _BLOCK
    if padding:
        weight_BV = torch.nn.functional.pad(weight_BV, (0, padding))
    weight_BKW = weight_BV.unflatten(-1, (-1, _BLOCK))
    mass_BK = weight_BKW.sum(-1).cumsum(-1)
    # Below the whole mass even where the product rounds up to it: a token there would have no weight.
    whole_B = mass_BK[:, -1]
    target_B = torch.minimum(uniform_B * whole_B, torch.nextafter(whole_B, torch.zeros_like(whole_B)))
    block_B = _first_above(mass_BK, target_B)
    row_B = torch.arange(len(block_B), device=logits_BV.device)
    before_B = torch.where(block_B > 0, mass_BK[row_B, (block_B - 1).clamp(min=0)], torch.zeros_like(target_B))
    weight_BW = weight_BKW[row_B, block_B]
    place_B = _first_above(weight_BW.cumsum(-1), target_B - before_B)
    # Rounding may let the target pass the block's end: then its last token of any weight is meant.
    last_B = _BLOCK - 1 - (weight_BW > 0).flip(-1).int().argmax(-1)
    # Stay within the vocabulary for NaN logits too: the loss then shows them, and an index error would hide the cause.
    return (block_B * _BLOCK + torch.minimum(place_B, last_B)).clamp_(max=logits_BV.shape[-1] - 1)


def _draw_nucleus(logits_BV: Tensor, uniform_B: Tensor, top_p: float) -> Tensor:
    """`draw` from the fewest tokens that hold `top_p` of the probability."""
    p_BV, order_BV = torch.softmax(logits_BV, -1).sort(dim=-1, descending=True, stable=True)
    mass_BV = p_BV.cumsum(-1)
    num_B = ((mass_BV - p_BV) < top_p).sum(-1).clamp(min=1)
    kept_B = mass_BV.gather(-1, num_B[:, None] - 1).squeeze(-1)
    place_B = torch.minimum(_first_above(mass_BV, uniform_B * kept_B), num_B - 1)
    return order_BV.gather(-1, place_B[:, None]).squeeze(-1)


def _first_above(mass_BK: Tensor, target_B: Tensor) -> Tensor:
    """Return the first place whose cumulative mass is above the target, the last one where none is."""
    place_B = torch.searchsorted(mass_BK, target_B[:, None], right=True).squeeze(-1)
    return place_B.clamp_(max=mass_BK.shape[-1] - 1)
