"""Rows that follow each other in one flat batch, without padding; attention stays inside each row.

Positions restart at 0 in each row. Where the model runs flash attention, transformers' own arguments tell it the rows
(`FlashAttentionKwargs`). Everywhere else an attention function of ours, registered with transformers, calls SDPA for
each run of rows of equal length. Without packed rows that function is transformers' SDPA, so a model keeps it for
generation and evaluation.

Which families can do this is not listed here. `find_packing_obstacle` tries it on a few tokens, as `answers.families`
does for decoding: states of a recurrence, biases by distance or attention code of a family's own show as other logits.

Legend: B batch, T tokens, N response tokens in one flat axis, H heads, D width of a head, R rows, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from pocl_ray.models.saving import quiet_transformers

PACKED_SDPA = "packed_sdpa"  # transformers checks whatever has "sdpa" in its name as it checks SDPA
FLASH = "flash_attention_2"
_SPANS = "packed_spans"
"""The keyword argument that carries the rows through a model to our attention function."""

Span = tuple[int, int]
"""The number of rows of a run of rows of equal length, and their length."""

_LENGTHS = (5, 9, 3, 3)
# Of the spread of a token's logits. In float32 only the order of sums differs. In 16 bits rounding differs as much as a
# small mistake, so the error is compared with that of the same rows read as one.
_TOLERANCE, _HALF_SHARE = 1e-4, 0.2
# The names that families give to the number of tokens that attention looks back.
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size", "local_attention")


class ReadHidden(Protocol):
    """Reads rows, and returns the final hidden states of some positions."""

    def __call__(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        index_N: Tensor,
        row_lengths: tuple[int, ...] | None = None,
        /,
    ) -> Tensor:
        """Return the hidden states; `row_lengths` tells the rows of a flat batch."""


class Logits(Protocol):
    """Turns final hidden states into logits."""

    def __call__(self, hidden_NH: Tensor, /) -> Tensor:
        """Return the logits (N, V)."""


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attend within each row of a flat batch; without packed rows this is transformers' SDPA.

    Args:
        module: Attention module.
        query: Queries, shape (1, H, T, D); keys and values may have fewer heads.
        key: Keys.
        value: Values.
        attention_mask: Mask of a padded batch; ignored with packed rows.
        **kwargs: Scaling and dropout, and the packed rows.

    Returns:
        The output, shape (1, T, H, D), and None in place of attention weights.
    """
    sdpa = AttentionInterface()["sdpa"]
    spans: Sequence[Span] | None = kwargs.pop(_SPANS, None)
    if spans is None:
        output: tuple[Tensor, Tensor | None] = sdpa(module, query, key, value, attention_mask, **kwargs)
        return output
    # Cut all at once: the gradient is then put together once. That of a slice would be an array of the whole batch.
    sizes = [num_rows * length for num_rows, length in spans]
    cut = zip(*(tensor.squeeze(0).transpose(0, 1).split(sizes) for tensor in (query, key, value)), strict=True)
    parts = []
    for span, rows in zip(spans, cut, strict=True):
        parts.append(sdpa(module, *(_rows_of(part, span) for part in rows), None, **kwargs)[0].flatten(0, 1))
    return torch.cat(parts).unsqueeze(0), None


def _rows_of(part_THD: Tensor, span: Span) -> Tensor:
    """The tokens of a span as a batch of rows (R, H, T, D); a view."""
    return part_THD.view(*span, *part_THD.shape[1:]).transpose(1, 2)


AttentionInterface.register(PACKED_SDPA, packed_attention)
AttentionMaskInterface.register(PACKED_SDPA, AttentionMaskInterface()["sdpa"])


def spans_of(row_lengths: Sequence[int]) -> tuple[Span, ...]:
    """Return the runs of neighbouring rows of equal length."""
    return tuple((len(list(run)), length) for length, run in itertools.groupby(row_lengths))


def packed_inputs(model: nn.Module, row_lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Return the arguments of a model's forward pass that tell it the rows of a flat batch.

    Args:
        model: Model, or the body of one, for which `find_packing_obstacle` found none.
        row_lengths: Number of tokens of each row.
        device: Device of the batch.
    """
    position_ids_1T = torch.cat([torch.arange(length) for length in row_lengths]).unsqueeze(0).to(device)
    shared = {"position_ids": position_ids_1T, "use_cache": False}
    config: Any = model.config
    if config._attn_implementation == FLASH:
        ends = torch.tensor([0, *itertools.accumulate(row_lengths)], dtype=torch.int32, device=device)
        longest = max(row_lengths)
        lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
        return {**shared, **lengths, "attention_mask": None}
    # Masks of four axes are passed on as they are, so that no mask of T x T is made; our function ignores this one.
    mask_111T = torch.ones(1, 1, 1, position_ids_1T.shape[1], dtype=torch.bool, device=device)
    return {**shared, "attention_mask": mask_111T, _SPANS: spans_of(row_lengths)}


def find_packing_obstacle(model: PreTrainedModel, hidden: ReadHidden, logits: Logits, max_tokens: int) -> str | None:
    """Let a model read packed rows, and return the reason if it cannot; it is then as it was before.

    Args:
        model: Model that can be split into body and head.
        hidden: Function that runs the body.
        logits: Function that runs the head.
        max_tokens: Tokens of the longest row.

    Returns:
        None if rows can be packed. Then the model's attention also takes packed rows.
    """
    window = _window(model)
    if window is not None and window < max_tokens:
        return f"its attention looks back {window} tokens, and rows have up to {max_tokens}"
    config: Any = model.config
    before = config._attn_implementation
    if before not in ("sdpa", FLASH):
        return f"its attention runs as {before}, which takes padded rows only"
    was_training = model.training
    model.eval()
    with quiet_transformers():
        if before != FLASH:
            model.set_attn_implementation(PACKED_SDPA)
        obstacle = _difference(model, hidden, logits, tuple(min(length, max_tokens) for length in _LENGTHS))
        if obstacle is not None:
            model.set_attn_implementation(before)
    model.train(was_training)
    return obstacle


def _window(model: PreTrainedModel) -> int | None:
    """The tokens that attention looks back, in the layers in which it looks back least; None without a limit."""
    config = model.config.get_text_config()
    found = [getattr(config, name, None) for name in _WINDOWS]
    return min((size for size in found if isinstance(size, int) and size > 0), default=None)


@torch.no_grad()
def _difference(model: PreTrainedModel, hidden: ReadHidden, logits: Logits, row_lengths: tuple[int, ...]) -> str | None:
    """The reason why packed rows give other logits than each row alone, or None."""
    embedding: Any = model.get_input_embeddings()
    vocab_size = getattr(embedding.weight, "ds_shape", embedding.weight.shape)[0]  # ZeRO-3 leaves a shape of 0
    generator = torch.Generator().manual_seed(0)
    ids_1T = torch.randint(vocab_size, (1, sum(row_lengths)), generator=generator).to(model.device)

    def read(ids_1T: Tensor, row_lengths: tuple[int, ...] | None = None) -> Tensor:
        index_N = torch.arange(ids_1T.shape[1], device=ids_1T.device)
        return logits(hidden(ids_1T, torch.ones_like(ids_1T), index_N, row_lengths)).float()

    alone_NV = torch.cat([read(row_1T) for row_1T in ids_1T.split(row_lengths, dim=1)])
    try:
        packed = _errors(read(ids_1T, row_lengths), alone_NV)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    if model.dtype == torch.float32:
        is_exact = bool(packed.max() <= _TOLERANCE)
    else:
        later = slice(row_lengths[0], None)  # the first row has nothing before it
        joined = _errors(read(ids_1T), alone_NV)
        is_exact = bool(packed[later].median() <= _HALF_SHARE * joined[later].median())
    return None if is_exact else f"packed rows change its logits by {float(packed.max()):.2g} of their spread"


def _errors(found_NV: Tensor, expected_NV: Tensor) -> Tensor:
    """The distance of each token's logits from the expected ones, as a share of their spread, shape (N,)."""
    spread_NV = expected_NV - expected_NV.mean(-1, keepdim=True)
    errors_N = (found_NV - expected_NV).norm(dim=-1) / spread_NV.norm(dim=-1).clamp(min=1e-6)
    return errors_N.nan_to_num(nan=torch.inf)
