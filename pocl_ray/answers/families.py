"""The exact way to decode a model's family, found by a check on a few tokens, once for each model.

Families keep what they know of a row in different places: keys and values, states of a recurrence, both. Not every
cache in transformers works with padding on the left, or with rows that leave. So the loop itself is compared with the
definition: five rows of different lengths that end early, against each row alone, read whole and without a cache. The
fastest means that give the same logits are used, and a family that has none is refused by name.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pocl_ray.answers.batch import Batch, Means, batches_of
from pocl_ray.errors import ModelError

_PROMPT_LENGTHS = (3, 7, 7, 10, 13)  # two of one length: without padding they share a batch, and one leaves it
_LIMITS = (2, 3, 6, 6, 4)  # rows leave the batch at several tokens
_MEANS = (Means(), Means(pads=False), Means(caches=False), Means(pads=False, caches=False))  # the fastest first
# Tolerances are shares of the spread of a token's logits. In float32 only the order of sums differs. In 16 bits
# rounding is as large as a small mistake, and a router may send a token to another expert: there the median of all
# tokens decides.
_TOLERANCE, _HALF_TOLERANCE = 1e-2, 0.1

_known: WeakKeyDictionary[PreTrainedModel, Means] = WeakKeyDictionary()


def means_of(model: PreTrainedModel) -> Means:
    """Return the fastest means with which a model's answers are exact.

    Args:
        model: Model in eval mode.

    Raises:
        ModelError: There are none, so the family cannot answer.
    """
    if model not in _known:
        _known[model] = _find(model)
    return _known[model]


@torch.no_grad()
def _find(model: PreTrainedModel) -> Means:
    rng = np.random.default_rng(0)
    embedding: Any = model.get_input_embeddings()
    vocab_size = embedding.weight.shape[0]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or max(_PROMPT_LENGTHS) * 2
    sizes = [max(1, min(length, positions - limit)) for length, limit in zip(_PROMPT_LENGTHS, _LIMITS, strict=True)]
    rows = [_Row(rng.integers(0, vocab_size, p + n), p, n) for p, n in zip(sizes, _LIMITS, strict=True)]
    expected = [_read_alone(model, row) for row in rows]
    reason = ""
    for means in _MEANS:
        try:  # where these means do not work, any error may say so, such as TakesNoCacheError
            errors = _errors(model, rows, expected, means)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            continue
        is_exact = errors.max() <= _TOLERANCE if model.dtype == torch.float32 else np.median(errors) <= _HALF_TOLERANCE
        if is_exact:
            return means
        reason = f"its logits are off by {errors.max():.2g} of their spread"
    raise ModelError(
        f"{type(model).__name__}: its answers cannot be computed exactly ({reason}); choose a decoder model of another "
        "family, or one that reads from left to right"
    )


@dataclass(frozen=True)
class _Row:
    """A row of given tokens, of which the first ones are the prompt and the others the response."""

    tokens: np.ndarray
    num_prompt: int
    num_response: int


def _read_alone(model: PreTrainedModel, row: _Row) -> Tensor:
    """The logits that each token of the response follows from: one row, without padding or cache."""
    ids_BT = torch.from_numpy(row.tokens)[None].to(model.device)
    output = model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=False)
    return output.logits[0, row.num_prompt - 1 : -1].float().cpu()


def _errors(model: PreTrainedModel, rows: list[_Row], expected: list[Tensor], means: Means) -> np.ndarray:
    """The distances of the loop's logits from the expected ones, each as a share of their spread."""
    found: dict[int, list[Tensor]] = {place: [] for place in range(len(rows))}
    for places in batches_of([row.num_prompt for row in rows], len(rows), means.pads):
        _run_given(model, [rows[place] for place in places], means, [found[place] for place in places])
    errors = []
    for place, expected_TV in enumerate(expected):
        found_TV = torch.stack(found[place][: len(expected_TV)])
        difference_TV, spread_TV = found_TV - expected_TV, expected_TV - expected_TV.mean(-1, keepdim=True)
        difference_TV = difference_TV - difference_TV.mean(-1, keepdim=True)
        errors.append(difference_TV.norm(dim=-1) / spread_TV.norm(dim=-1).clamp(min=1e-6))
    return np.nan_to_num(torch.cat(errors).numpy(), nan=np.inf)


def _run_given(model: PreTrainedModel, rows: list[_Row], means: Means, found: list[list[Tensor]]) -> None:
    """Run the loop over rows whose tokens are given, whatever the model says; add its logits of each to `found`."""
    limits = [row.num_response for row in rows]
    draw = [np.zeros(limit, np.float32) for limit in limits]
    batch = Batch(model, [row.tokens[: row.num_prompt] for row in rows], limits, [draw], [], means)

    def take_given(logits_BV: Tensor, _: Tensor) -> Tensor:
        taken = []
        for logits_V, place in zip(logits_BV.float().cpu(), batch.rows, strict=True):
            following = rows[place].num_prompt + len(found[place])
            found[place].append(logits_V.clone())
            taken.append(int(rows[place].tokens[min(following, len(rows[place].tokens) - 1)]))
        return torch.tensor(taken, device=logits_BV.device)

    batch.run(take_given)
