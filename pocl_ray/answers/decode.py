"""Sampled responses of a causal language model, for training: every token counts once, and nothing is computed twice.

Rows of a batch are padded on the left. Their prompts are read in groups of similar length, as padding would otherwise
cost more than the prompts. The key-value cache has room for more tokens than it holds, so a token is written in place
instead of copying all before it; a row that has ended leaves the batch. Only the last position goes through the head.

A row's draws are given from outside, one number in [0, 1) a token, and the token is where the cumulative distribution
passes it. So what a row draws depends neither on the rows it shares a batch with nor on the number of workers.

Legend: B rows of a batch, T tokens, V vocabulary, H hidden, K blocks of the vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from pocl_ray.answers.generate import Tokens, pad_left
from pocl_ray.heartbeat import beat
from pocl_ray.models.heads import split_model

_CACHE_SPARE_TOKENS = 64
_BLOCK = 256  # of the vocabulary: a draw finds its block first, then its place in it
_GPU_TOKENS_BETWEEN_LOOKS = 8  # looking whether rows have ended makes the device wait for the host
# Leaving copies the cache once: worth it when a good part of the batch goes.
_LEAVING_SHARE = 0.125
_PADDING_SHARE = 0.2  # of the tokens of a group of prompts, at most
# Rows of the LM head that a CPU multiplies at once: they and what they make stay in its cache, and a product for few
# rows of a batch takes a sixth less time. The numbers are the same.
_HEAD_ROWS = 1024

Choose = Callable[[Tensor, Tensor], Tensor]
"""From logits (B, V), which may be overwritten, and one number a row to one token a row, shape (B,)."""


def decode(
    model: PreTrainedModel,
    prompts: Sequence[Tokens],
    limits: Sequence[int],
    uniforms: Sequence[np.ndarray],
    stop_ids: Sequence[int],
    batch_rows: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> list[np.ndarray]:
    """Sample one response to each prompt.

    Args:
        model: In eval mode, on the device that is to be used.
        prompts: Token ids, one array of shape (tokens,) a prompt, none of them empty.
        limits: The most tokens of each response, the one that ends it included; at least 1.
        uniforms: For each row as many numbers in [0, 1) as its limit.
        stop_ids: Tokens that end a response.
        batch_rows: Rows of a batch, at most.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_p: Samples from the likeliest tokens with this much probability together.

    Returns:
        Token ids of the responses in the order of `prompts`, int32. One that has ended keeps the token that ended it;
        one that ran into its limit has as many tokens as that.
    """
    choose = _chooser(temperature, top_p)
    responses: list[np.ndarray] = [np.empty(0, np.int32)] * len(prompts)
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable").tolist()
    for start in range(0, len(order), batch_rows):
        beat("writing responses")
        rows = order[start : start + batch_rows]
        picked = ([prompts[r] for r in rows], [limits[r] for r in rows], [uniforms[r] for r in rows])
        with torch.no_grad():  # not inference_mode: the model may keep what it computes, and is trained on afterwards
            written = _Batch(model, *picked, stop_ids).run(choose)
        for row, tokens in zip(rows, written, strict=True):
            responses[row] = tokens
    return responses


class _Batch:
    """The rows of one batch that are still being written, with their cache."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Tokens],
        limits: Sequence[int],
        uniforms: Sequence[np.ndarray],
        stop_ids: Sequence[int],
    ) -> None:
        self.parts, self.device = split_model(model), model.device
        self.takes_positions = "position_ids" in inspect.signature(self.parts.body.forward).parameters
        self.written: list[np.ndarray] = [np.empty(0, np.int32)] * len(prompts)
        self.rows = np.arange(len(prompts))
        longest = max(limits)
        self.groups = groups_of([len(prompt) for prompt in prompts])
        padded = [np.asarray(prompt, np.int64) for prompt in prompts]
        self.ids_BT, mask_BT = pad_left(padded, 0, self.device)  # masked, so any token will do for padding
        self.num_prompt = self.ids_BT.shape[1]
        self.mask_BT = torch.nn.functional.pad(mask_BT, (0, longest), value=1)
        self.new_BT = torch.zeros(len(prompts), longest, dtype=torch.int64, device=self.device)
        uniform_BT = np.zeros((len(prompts), longest), np.float32)
        for place, row in enumerate(uniforms):
            uniform_BT[place, : limits[place]] = row[: limits[place]]
        self.uniform_BT = torch.from_numpy(uniform_BT).to(self.device)
        self.limit_B = torch.tensor(limits, device=self.device)
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=self.device)
        self.length_B = self.limit_B.clone()  # of the response, once that is known
        self.ended_B = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        self.logits_BV: Tensor | None = None
        self.new_cache = lambda: DynamicCache(config=model.config)
        self.cache = _roomy(self.new_cache(), longest)

    def run(self, choose: Choose) -> list[np.ndarray]:
        look_every = 1 if self.device.type == "cpu" else _GPU_TOKENS_BETWEEN_LOOKS
        hidden_BH = self._read_prompts()
        for step in range(self.new_BT.shape[1]):
            token_B = choose(self._logits(hidden_BH), self.uniform_BT[:, step])
            self._take(token_B, step)
            if (step + 1) % look_every == 0 and self._all_left(step):
                break
            if step + 1 < self.new_BT.shape[1]:
                mask_BT = self.mask_BT[:, : self.num_prompt + step + 1]
                hidden_BH = self._forward(self.new_BT[:, step : step + 1], mask_BT, self.cache)
        self._leave(torch.ones_like(self.ended_B))
        return self.written

    def _read_prompts(self) -> Tensor:
        """Fill the cache with the prompts; return the hidden states that the first tokens follow from, shape (B, H)."""
        if len(self.groups) == 1 or not all(isinstance(layer, _RoomyLayer) for layer in self.cache.layers):
            return self._forward(self.ids_BT, self.mask_BT[:, : self.num_prompt], self.cache)
        caches, hidden = [], []
        for rows, width in self.groups:
            part = (rows, slice(self.num_prompt - width, self.num_prompt))
            caches.append(self.new_cache())
            hidden.append(self._forward(self.ids_BT[part], self.mask_BT[part], caches[-1]))
        for index, layer in enumerate(self.cache.layers):
            keys, values = (
                torch.cat([self._padded(getattr(cache.layers[index], name)) for cache in caches])
                for name in ("keys", "values")
            )
            layer.update(keys, values)  # type: ignore[union-attr]
        return torch.cat(hidden)

    def _padded(self, states: Tensor) -> Tensor:
        return torch.nn.functional.pad(states, (0, 0, self.num_prompt - states.shape[-2], 0))

    def _forward(self, ids_BT: Tensor, mask_BT: Tensor, cache: DynamicCache) -> Tensor:
        """Run the tokens that follow those in the cache; return the last hidden state, shape (B, H)."""
        arguments: dict[str, Any] = {"input_ids": ids_BT, "attention_mask": mask_BT, "past_key_values": cache}
        if self.takes_positions:
            arguments["position_ids"] = (mask_BT.cumsum(-1) - 1).clamp_(min=0)[:, -ids_BT.shape[1] :]
        return self.parts.body(**arguments, use_cache=True).last_hidden_state[:, -1]

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

    def _take(self, token_B: Tensor, step: int) -> None:
        self.new_BT[:, step] = token_B
        ends_B = torch.isin(token_B, self.stop_ids) & ~self.ended_B
        self.length_B = torch.where(ends_B, self.length_B.clamp(max=step + 1), self.length_B)
        self.ended_B |= ends_B | (self.limit_B <= step + 1)

    def _all_left(self, step: int) -> bool:
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
        for name in ("mask_BT", "new_BT", "uniform_BT", "limit_B", "length_B", "ended_B"):
            setattr(self, name, getattr(self, name)[kept_B])
        self.cache.batch_select_indices(kept_B)


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

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        length = self.get_seq_length()
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self.keys, self.values = (buffer[..., :length, :] for buffer in self.buffers)


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


def _roomy(cache: DynamicCache, longest: int) -> DynamicCache:
    """The model's own kind of cache, whose plain layers have room for a good part of a response of `longest` tokens."""
    num_spare = min(longest, max(_CACHE_SPARE_TOKENS, longest // 2))
    cache.layers = [_RoomyLayer(num_spare) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _chooser(temperature: float, top_p: float) -> Choose:
    if temperature == 0:
        return lambda logits_BV, _: logits_BV.argmax(-1)

    def choose(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
        scaled_BV = logits_BV.float() if temperature == 1 else logits_BV.float().div_(temperature)
        return draw(scaled_BV, uniform_B) if top_p == 1 else _draw_nucleus(scaled_BV, uniform_B, top_p)

    return choose


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
    # Within the vocabulary even for logits that are no numbers: the loss tells of those, an index error would not.
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
    """The first place whose cumulative mass is above the target, the last one where none is."""
    place_B = torch.searchsorted(mass_BK, target_B[:, None], right=True).squeeze(-1)
    return place_B.clamp_(max=mass_BK.shape[-1] - 1)
