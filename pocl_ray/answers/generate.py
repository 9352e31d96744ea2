"""Answers of a causal language model to prompts given as token ids.

Prompts of similar length share a batch, padded on the left. A batch is generated in rounds with one key-value cache;
rows that have stopped leave it between rounds, so that a few endless answers do not keep the others computing.

What is sampled depends on the seed and on the batch's prompts alone (with keys, on the row's key): not on the process,
on the batches before it, or on the number of actors that share the work. Axes: B rows of a batch, T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl_ray.answers.sampling import RowSampler
from pocl_ray.config import GenerationConfig
from pocl_ray.heartbeat import beat

_FIRST_ROUND_TOKENS = 16
_ROUND_TOKENS = 32

Tokens = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are generated, with lengths resolved.

    Attributes:
        sampling_temperature: Divides the logits before sampling; 0 is greedy.
        top_p: Samples from the smallest set of tokens with this much probability; 1 keeps all.
        no_repeat_ngram_size: No n-gram of this length comes twice, the prompt's included; 0 allows all.
        max_new_tokens: Of each answer, at least 1; one number for all prompts, or one for each.
        batch_rows: Rows generated at once.
    """

    sampling_temperature: float = 1.0
    top_p: float = 1.0
    no_repeat_ngram_size: int = 0
    max_new_tokens: int | Sequence[int] = 256
    batch_rows: int = 64

    @classmethod
    def of(cls, config: GenerationConfig, max_tokens: int, prompts: Sequence[Tokens]) -> GenerationSettings:
        """Resolve a section of the config for some prompts.

        Args:
            config: The section.
            max_tokens: `data.max_tokens`: prompt and answer together.
            prompts: Token ids of each prompt.
        """
        cap = max_tokens if config.max_new_tokens is None else config.max_new_tokens
        limits = tuple(max(1, min(cap, max_tokens - len(prompt))) for prompt in prompts)
        return cls(**{**config.model_dump(), "max_new_tokens": limits})

    def limits(self, num_prompts: int) -> list[int]:
        """Return how many tokens each answer may have."""
        if isinstance(self.max_new_tokens, int):
            return [self.max_new_tokens] * num_prompts
        if len(self.max_new_tokens) != num_prompts:
            raise ValueError(f"{len(self.max_new_tokens)} limits for {num_prompts} prompts")
        return list(self.max_new_tokens)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tokens],
    settings: GenerationSettings,
    seed: int,
    keys: Sequence[int] | None = None,
) -> list[list[int]]:
    """Generate one answer to each prompt.

    The model's own generation config (temperature, repetition penalty and the like) has no say, apart from the tokens
    that end an answer. The caller's random state is left as it was.

    Args:
        model: On the device that is to be used; it is run without dropout.
        tokenizer: Gives the end-of-sequence and the padding token, which may be one.
        prompts: Token ids, one array of shape (tokens,) a prompt, none of them empty.
        settings: See there.
        seed: Of the sampling; greedy answers do not depend on it.
        keys: One a prompt, such as the row's id: its answer is then drawn by (seed, key) alone (`sampling.py`),
            whatever prompts share its batch.

    Returns:
        Token ids of the answers in the order of `prompts`, without the end-of-sequence token. An answer that never
        stopped has as many tokens as its limit allows (see `num_unstopped`).
    """
    answers: list[list[int]] = [[] for _ in prompts]
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    assert not prompts or lengths.min() > 0, "a prompt has no tokens"
    order = np.argsort(lengths, kind="stable")
    limits = settings.limits(len(prompts))
    assert min(limits, default=1) > 0, "an answer may have no tokens"
    keyed = keys is not None and settings.sampling_temperature > 0
    config = _explicit_config(model, tokenizer, replace(settings, sampling_temperature=0.0) if keyed else settings)
    with _prepared(model):
        for start in range(0, len(order), settings.batch_rows):
            rows = order[start : start + settings.batch_rows].tolist()
            batch = [np.asarray(prompts[row], dtype=np.int64) for row in rows]
            draws = _Draws([keys[row] for row in rows], seed, settings) if keys is not None and keyed else None
            with _seeded(_batch_seed(seed, batch), model.device):
                generated = _Batch(model, batch, [limits[row] for row in rows], config, draws).run()
            for row, answer in zip(rows, generated, strict=True):
                answers[row] = answer
    return answers


def num_unstopped(answers: Sequence[Sequence[int]], settings: GenerationSettings) -> int:
    """Return how many answers of `generate` ended at their limit and not by an end-of-sequence token."""
    limits = settings.limits(len(answers))
    return sum(len(answer) >= limit for answer, limit in zip(answers, limits, strict=True))


@dataclass(frozen=True)
class _Draws:
    """How the rows of a batch are sampled, each by its own key."""

    keys: list[int]
    seed: int
    settings: GenerationSettings

    def sampler(self, rows: Sequence[int], first_token: int) -> transformers.LogitsProcessorList:
        keys = [self.keys[row] for row in rows]
        sampler = RowSampler(keys, first_token, self.seed, self.settings.sampling_temperature, self.settings.top_p)
        return transformers.LogitsProcessorList([sampler])


class _Batch:
    """The rows of one batch that are still being generated, with their cache."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Tokens],
        limits: list[int],
        config: transformers.GenerationConfig,
        draws: _Draws | None,
    ) -> None:
        self.model: Any = model
        self.limits, self.config, self.draws = limits, config, draws
        self.stop_ids = set(config.eos_token_id)
        self.answers: list[list[int]] = [[] for _ in prompts]
        self.rows = list(range(len(prompts)))
        self.input_ids_BT, self.attention_mask_BT = pad_left(prompts, config.pad_token_id, model.device)
        self.first_token = self.input_ids_BT.shape[1]
        self.cache: transformers.Cache | None = None

    def run(self) -> list[list[int]]:
        num_new, round_tokens = 0, _FIRST_ROUND_TOKENS
        while self.rows:
            beat("generating answers")
            longest = max(self.limits[row] for row in self.rows)
            num_new += self._round(min(round_tokens, longest - num_new))
            round_tokens = _ROUND_TOKENS
            self._drop_finished()
        return self.answers

    def _round(self, max_new_tokens: int) -> int:
        """Extend every row; return by how many tokens."""
        self.config.max_new_tokens = max_new_tokens
        known: dict[str, Any] = {} if self.cache is None else {"past_key_values": self.cache}
        if self.draws is not None:
            known["logits_processor"] = self.draws.sampler(self.rows, self.first_token)
        out = self.model.generate(
            self.input_ids_BT,
            attention_mask=self.attention_mask_BT,
            generation_config=self.config,
            **known,
        )
        new_BT = out.sequences[:, self.input_ids_BT.shape[1] :]
        for row, tokens in zip(self.rows, new_BT.tolist(), strict=True):
            self.answers[row] += tokens
        self.input_ids_BT, self.cache = out.sequences, out.past_key_values
        self.attention_mask_BT = torch.cat([self.attention_mask_BT, torch.ones_like(new_BT)], dim=1)
        return new_BT.shape[1]

    def _drop_finished(self) -> None:
        kept = []
        for index, row in enumerate(self.rows):
            answer, limit = self.answers[row], self.limits[row]
            end = next((i for i, token in enumerate(answer) if token in self.stop_ids), None)
            if end is None and len(answer) < limit:
                kept.append(index)
            else:
                self.answers[row] = answer[: limit if end is None else min(end, limit)]
        if 0 < len(kept) < len(self.rows):
            kept_B = torch.tensor(kept, device=self.input_ids_BT.device)
            self.input_ids_BT = self.input_ids_BT[kept_B]
            self.attention_mask_BT = self.attention_mask_BT[kept_B]
            assert self.cache is not None
            self.cache.batch_select_indices(kept_B)
        self.rows = [self.rows[index] for index in kept]


def _explicit_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: GenerationSettings
) -> transformers.GenerationConfig:
    sampled = settings.sampling_temperature > 0
    stop_ids = stop_ids_of(model, tokenizer)
    return transformers.GenerationConfig(
        do_sample=sampled,
        temperature=settings.sampling_temperature if sampled else None,
        top_p=settings.top_p if sampled else None,
        top_k=0 if sampled else None,  # the library's own default would be 50
        no_repeat_ngram_size=settings.no_repeat_ngram_size,
        eos_token_id=stop_ids,
        # Any padding will do: it is masked on the left, and cut off on the right, where it follows the end.
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0],
        use_cache=True,
        return_dict_in_generate=True,
    )


def stop_ids_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokenizer's end of sequence and those that the model was published with: chat models have several."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(own if isinstance(own, (list, tuple)) else [own])}
    found = sorted(int(token) for token in ids if token is not None)
    assert found, "neither tokenizer nor model has an end-of-sequence token"
    return found


def pad_left(prompts: Sequence[Tokens], pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts padded on the left and their attention mask, both int64 of shape (prompts, longest)."""
    width = max(len(prompt) for prompt in prompts)
    input_ids_BT = np.full((len(prompts), width), pad_id, dtype=np.int64)
    attention_mask_BT = np.zeros((len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        input_ids_BT[row, width - len(prompt) :] = prompt
        attention_mask_BT[row, width - len(prompt) :] = 1
    return torch.from_numpy(input_ids_BT).to(device), torch.from_numpy(attention_mask_BT).to(device)


def _batch_seed(seed: int, prompts: Sequence[Tokens]) -> int:
    digest = hashlib.blake2b(str(seed).encode(), digest_size=8)
    for prompt in prompts:
        digest.update(len(prompt).to_bytes(4, "little") + prompt.astype("<i8").tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1


@contextmanager
def _prepared(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout, and without the model's own generation config, which would fill what ours leaves open."""
    own, was_training = model.generation_config, model.training
    model.generation_config = transformers.GenerationConfig()
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(was_training)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
