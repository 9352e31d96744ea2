"""The loop over tokens: the rows of one batch while they are generated, with their key-value cache.

Legend: P prompts, D draws of each, B = P x D rows, T tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from pocl_ray.answers.sampling import Choose, ban_repeats
from pocl_ray.heartbeat import beat
from pocl_ray.models.heads import split_model

# Room in the cache beyond what it holds: a cache that grows by a token is copied whole for each of them.
_CACHE_SPARE_TOKENS = 64
_GPU_TOKENS_BETWEEN_LOOKS = 8  # a look at which rows have ended makes the device wait for the host
_TOKENS_BETWEEN_BEATS = 32
# Rows that leave cost one copy of the cache, which is worth it when a good part of the batch leaves.
_LEAVING_SHARE = 0.125
_PADDING_SHARE = 0.2  # of the tokens of a group of prompts, at most
# Rows of the LM head that a CPU multiplies at once: they and what they make stay in its cache, and a product for few
# rows of a batch takes a sixth less time. The numbers are the same.
_HEAD_ROWS = 1024

Tokens = npt.NDArray[np.integer[Any]]
Draw = Sequence[np.ndarray] | None
"""One response to each prompt: for each as many numbers in [0, 1) as its limit; None: always the likeliest token."""


@dataclass(frozen=True)
class Means:
    """The shortcuts that are exact for a model; `families.means_of` finds them.

    Attributes:
        pads: Whether prompts of several lengths may share a batch.
        caches: Whether the model's cache holds everything that the next token needs; without it every token reads the
            whole row.
    """

    pads: bool = True
    caches: bool = True


class TakesNoCacheError(RuntimeError):
    """The model's body takes no cache, although the means ask for one; `families.py` then tries those without."""


class Batch:
    """The rows of one batch that are still being generated."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Tokens],
        limits: Sequence[int],
        draws: Sequence[Draw],
        stop_ids: Sequence[int],
        means: Means,
    ) -> None:
        """Lay out the rows: those of the first draw, in the order of the prompts, then those of the next one.

        Args:
            model: Model in eval mode.
            prompts: Token ids of each prompt, the shortest first.
            limits: Maximum tokens of each prompt's responses.
            draws: Draws of each prompt, greedy ones first.
            stop_ids: Tokens that end a response.
            means: Shortcuts that are exact for the model.
        """
        self.model, self.parts, self.device, self.means = model, split_model(model), model.device, means
        taken = inspect.signature(self.parts.body.forward).parameters
        self.takes_positions, self.takes_mask = "position_ids" in taken, means.pads and "attention_mask" in taken
        self.cache_name = next((name for name in ("past_key_values", "cache_params") if name in taken), None)
        if means.caches and self.cache_name is None:
            raise TakesNoCacheError("takes no cache")
        self.num_prompts, self.num_draws = len(prompts), len(draws)
        num_rows, longest = len(prompts) * len(draws), max(limits)
        self.written: list[np.ndarray] = [np.empty(0, np.int32)] * num_rows
        self.rows = np.arange(num_rows)
        self.num_greedy = sum(draw is None for draw in draws) * len(prompts)
        self.groups = groups_of([len(prompt) for prompt in prompts])
        self.prompt_PT, mask_PT = pad_left(prompts, self.device)
        self.num_prompt_tokens = self.prompt_PT.shape[1]
        # All buffers are as long as the answers may get: a token then changes one column, and nothing is concatenated.
        self.mask_BT = torch.nn.functional.pad(mask_PT, (0, longest), value=1).repeat(len(draws), 1)
        self.new_BT = torch.zeros(num_rows, longest, dtype=torch.int64, device=self.device)
        self.seen_BT: Tensor | None = None
        self.uniform_BT = torch.from_numpy(_numbers(draws, limits, longest)).to(self.device)
        self.limit_B = torch.tensor([*limits] * len(draws), device=self.device)
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=self.device)
        self.length_B = self.limit_B.clone()  # of the response, once that is known
        self.ended_B = torch.zeros(num_rows, dtype=torch.bool, device=self.device)
        self.logits_BV: Tensor | None = None
        self.cache: DynamicCache | None = None

    def run(
        self, choose: Choose, no_repeat_ngram_size: int = 0, on_tokens: Callable[[Tensor], object] | None = None
    ) -> list[list[np.ndarray]]:
        """Return all responses.

        Args:
            choose: Function that chooses the tokens of rows that are not greedy.
            no_repeat_ngram_size: Length of n-grams that are not repeated, as in `GenerationSettings`.
            on_tokens: Function that is called with the new token of each row that is left, shape (B,).

        Returns:
            For each draw the responses in the order of the prompts.
        """
        longest = self.new_BT.shape[1]
        look_every = 1 if self.device.type == "cpu" else _GPU_TOKENS_BETWEEN_LOOKS
        if no_repeat_ngram_size:
            prompt_PT = self.prompt_PT.masked_fill(self.mask_BT[: self.num_prompts, : self.num_prompt_tokens] == 0, -1)
            self.seen_BT = torch.nn.functional.pad(prompt_PT, (0, longest)).repeat(self.num_draws, 1)
        hidden_BH = self._read_prompts(longest)
        for step in range(longest):
            if step % _TOKENS_BETWEEN_BEATS == 0:
                beat("generating answers")
            logits_BV = self._logits(hidden_BH)
            if self.seen_BT is not None:
                ban_repeats(logits_BV, self.seen_BT[:, : self.num_prompt_tokens + step], no_repeat_ngram_size)
            token_B = self._chosen(logits_BV, choose, step)
            self._take(token_B, step)
            if on_tokens is not None:
                on_tokens(token_B)
            if (step + 1) % look_every == 0 and self._all_left():
                break
            if step + 1 < longest:
                hidden_BH = self._next_hidden(step)
        self._leave(torch.ones_like(self.ended_B))
        return [self.written[draw * self.num_prompts :][: self.num_prompts] for draw in range(self.num_draws)]

    def _read_prompts(self, longest: int) -> Tensor:
        """Fill the cache with the prompts; return the hidden states that the first tokens follow from, shape (B, H)."""
        mask_PT = self.mask_BT[: self.num_prompts, : self.num_prompt_tokens]
        if not self.means.caches:
            return self._forward(self.prompt_PT, mask_PT, None).repeat(self.num_draws, 1)
        self.cache = _roomy(self._new_cache(), longest)
        if len(self.groups) == 1 or not all(isinstance(layer, _RoomyLayer) for layer in self.cache.layers):
            hidden_PH = self._forward(self.prompt_PT, mask_PT, self.cache)
        else:
            hidden_PH = self._read_groups(mask_PT)
        if self.num_draws == 1:
            return hidden_PH
        # The draws of a prompt go on from one prefill: its keys, values and states are copied, not computed again.
        self._select(self.cache, torch.arange(self.num_prompts, device=self.device).repeat(self.num_draws))
        return hidden_PH.repeat(self.num_draws, 1)

    def _read_groups(self, mask_PT: Tensor) -> Tensor:
        """Read prompts in groups of similar length, and put their keys and values into one cache."""
        assert self.cache is not None
        caches, hidden = [], []
        for rows, width in self.groups:
            part = (rows, slice(self.num_prompt_tokens - width, self.num_prompt_tokens))
            caches.append(self._new_cache())
            hidden.append(self._forward(self.prompt_PT[part], mask_PT[part], caches[-1]))
        for index, layer in enumerate(self.cache.layers):
            keys, values = (
                torch.cat([self._padded(getattr(cache.layers[index], name)) for cache in caches])
                for name in ("keys", "values")
            )
            layer.update(keys, values)  # type: ignore[union-attr]
        return torch.cat(hidden)

    def _padded(self, states: Tensor) -> Tensor:
        return torch.nn.functional.pad(states, (0, 0, self.num_prompt_tokens - states.shape[-2], 0))

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config)

    def _next_hidden(self, step: int) -> Tensor:
        """Return the hidden states that the token after `step` follows from, shape (B, H)."""
        mask_BT = self.mask_BT[:, : self.num_prompt_tokens + step + 1]
        if self.means.caches:
            return self._forward(self.new_BT[:, step : step + 1], mask_BT, self.cache)
        # A family whose cache does not hold all: the whole row is read for each token, slowly and rightly.
        prompt_BT = self.prompt_PT[torch.from_numpy(self.rows % self.num_prompts).to(self.device)]
        return self._forward(torch.cat([prompt_BT, self.new_BT[:, : step + 1]], 1), mask_BT, None)

    def _forward(self, ids_BT: Tensor, mask_BT: Tensor, cache: DynamicCache | None) -> Tensor:
        """Run the tokens that follow those in the cache; return the last hidden state, shape (B, H)."""
        arguments: dict[str, Any] = {"input_ids": ids_BT, "use_cache": cache is not None}
        if cache is not None:
            assert self.cache_name is not None
            arguments[self.cache_name] = cache
        if self.takes_mask:
            arguments["attention_mask"] = mask_BT
        if self.takes_positions:  # counted without the padding on the left, which would shift them
            arguments["position_ids"] = (mask_BT.cumsum(-1) - 1).clamp_(min=0)[:, -ids_BT.shape[1] :]
        return self.parts.body(**arguments).last_hidden_state[:, -1]

    def _logits(self, hidden_BH: Tensor) -> Tensor:
        """The logits of the next token, shape (B, V), until the next call: on a CPU in one buffer for all tokens."""
        head = self.parts.head
        if self.device.type != "cpu" or type(head) is not torch.nn.Linear:
            return self.parts.logits(hidden_BH)
        if self.logits_BV is None:
            self.logits_BV = hidden_BH.new_empty(len(hidden_BH), head.out_features)
        logits_BV = self.logits_BV[: len(hidden_BH)]
        for start in range(0, head.out_features, _HEAD_ROWS):
            part = slice(start, start + _HEAD_ROWS)
            torch.mm(hidden_BH, head.weight[part].t(), out=logits_BV[:, part])
        if head.bias is not None:
            logits_BV += head.bias
        return self.parts.transform(logits_BV)

    def _chosen(self, logits_BV: Tensor, choose: Choose, step: int) -> Tensor:
        """Return the next token of each row. Greedy rows come first, and stay first as rows leave."""
        num_greedy = self.num_greedy
        if num_greedy == 0:
            return choose(logits_BV, self.uniform_BT[:, step])
        likeliest = logits_BV[:num_greedy].argmax(-1)
        if num_greedy == len(self.rows):
            return likeliest
        return torch.cat([likeliest, choose(logits_BV[num_greedy:], self.uniform_BT[num_greedy:, step])])

    def _take(self, token_B: Tensor, step: int) -> None:
        self.new_BT[:, step] = token_B
        if self.seen_BT is not None:
            self.seen_BT[:, self.num_prompt_tokens + step] = token_B
        ends_B = torch.isin(token_B, self.stop_ids) & ~self.ended_B
        # On the device, without a look at it: rows go on past their end until `_all_left` looks, and are cut to length.
        self.length_B = torch.where(ends_B, self.length_B.clamp(max=step + 1), self.length_B)
        self.ended_B |= ends_B | (self.limit_B <= step + 1)

    def _all_left(self) -> bool:
        """Let rows that have ended go, where they are many; return whether none is left."""
        num_ended = int(self.ended_B.sum())
        if num_ended == len(self.ended_B):
            return True
        if num_ended >= max(1.0, _LEAVING_SHARE * len(self.ended_B)):
            self._leave(self.ended_B)
        return False

    def _leave(self, leaves_B: Tensor) -> None:
        lengths, new = self.length_B.tolist(), self.new_BT.to("cpu", torch.int32).numpy()
        gone = leaves_B.tolist()
        for place, row in enumerate(self.rows):
            if gone[place]:
                self.written[row] = new[place, : lengths[place]].copy()
        if all(gone):
            return
        kept_B = (~leaves_B).nonzero().squeeze(1)
        self.rows = self.rows[~np.array(gone)]
        self.num_greedy -= sum(gone[: self.num_greedy])
        for name in ("mask_BT", "new_BT", "uniform_BT", "limit_B", "length_B", "ended_B"):
            setattr(self, name, getattr(self, name)[kept_B])
        if self.seen_BT is not None:
            self.seen_BT = self.seen_BT[kept_B]
        if self.cache is not None:
            self._select(self.cache, kept_B)

    def _select(self, cache: Any, index_B: Tensor) -> None:
        """Keep the rows of a cache that are named, or repeat them."""
        # Not batch_select_indices: layers that hold states next to keys and values select only the latter with it.
        cache.reorder_cache(index_B)


class _RoomyLayer(DynamicLayer):
    """Keys and values of a layer in buffers with spare room: views of what is filled, written in place."""

    def __init__(self, num_spare: int) -> None:
        super().__init__()
        self.num_spare = num_spare
        self.buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens; return all keys and all values, shape (B, heads, T, head size)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        length = before + key_states.shape[-2]
        if not self.buffers or self.buffers[0].shape[-2] < length:
            self._grow(key_states, value_states, before, length)
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., before:length, :] = states
        self.keys, self.values = (buffer[..., :length, :] for buffer in self.buffers)
        return self.keys, self.values

    def _grow(self, key_states: Tensor, value_states: Tensor, before: int, length: int) -> None:
        grown = []
        for held, states in ((self.keys, key_states), (self.values, value_states)):
            shape = (*states.shape[:-2], length + self.num_spare, states.shape[-1])
            buffer = states.new_empty(shape)
            if before:
                buffer[..., :before, :] = held  # type: ignore[assignment]
            grown.append(buffer)
        self.buffers = grown

    def reorder_cache(self, beam_idx: Tensor) -> None:  # type: ignore[override]
        """Keep some rows, or repeat them."""
        length = self.get_seq_length()
        if not self.buffers:
            return
        self.buffers = [buffer[beam_idx] for buffer in self.buffers]
        self.keys, self.values = (buffer[..., :length, :] for buffer in self.buffers)


def _roomy(cache: DynamicCache, longest: int) -> DynamicCache:
    """The model's own kind of cache, whose plain layers have room for a good part of a response of `longest` tokens."""
    num_spare = min(longest, max(_CACHE_SPARE_TOKENS, longest // 2))
    cache.layers = [_RoomyLayer(num_spare) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def batches_of(lengths: Sequence[int], num_prompts: int, may_pad: bool) -> Iterator[list[int]]:
    """Yield the places of prompts that share a batch, the shortest first; without padding only equally long ones."""
    order = np.argsort(lengths, kind="stable").tolist()
    groups = [order] if may_pad else [list(group) for _, group in groupby(order, key=lambda row: lengths[row])]
    for group in groups:
        yield from (group[start : start + num_prompts] for start in range(0, len(group), num_prompts))


def pad_left(prompts: Sequence[Tokens], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return prompts padded on the left with 0 and their attention mask, both int64 of shape (prompts, longest)."""
    width = max(len(prompt) for prompt in prompts)
    # The padding is masked, so any token will do.
    input_ids_BT = np.zeros((len(prompts), width), dtype=np.int64)
    attention_mask_BT = np.zeros((len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        input_ids_BT[row, width - len(prompt) :] = prompt
        attention_mask_BT[row, width - len(prompt) :] = 1
    return torch.from_numpy(input_ids_BT).to(device), torch.from_numpy(attention_mask_BT).to(device)


def groups_of(lengths: Sequence[int]) -> list[tuple[slice, int]]:
    """Cut prompts, the shortest first, into groups with little padding; return the places and the longest of each."""
    groups: list[tuple[slice, int]] = []
    end = len(lengths)
    while end > 0:
        first, longest, num_tokens = end - 1, lengths[end - 1], lengths[end - 1]
        while first > 0 and longest * (end - first + 1) * (1 - _PADDING_SHARE) <= num_tokens + lengths[first - 1]:
            first -= 1
            num_tokens += lengths[first]
        groups.append((slice(first, end), longest))
        end = first
    return groups[::-1]


def _numbers(draws: Sequence[Draw], limits: Sequence[int], longest: int) -> np.ndarray:
    """The numbers of all rows, shape (B, longest); greedy rows have none."""
    uniform_DPT = np.zeros((len(draws), len(limits), longest), np.float32)
    for place, draw in enumerate(draws):
        if draw is not None:
            for row, (numbers, limit) in enumerate(zip(draw, limits, strict=True)):
                uniform_DPT[place, row, :limit] = numbers[:limit]
    return uniform_DPT.reshape(-1, longest)
