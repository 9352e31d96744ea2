"""The decoding loop: a causal language model answers prompts given as token ids.

Scoring, evaluation, dev figures, teacher responses and rollouts all use it. Nothing is computed twice, and nothing that
nobody reads:

- Rows of a batch are padded on the left. Their prompts are read in groups of similar length, as padding would otherwise
  cost more than the prompts.
- Several draws of one prompt share its prefill: the prompt is read once, then its keys and values are copied.
- The key-value cache has room for more tokens than it holds, so a token is written in place instead of copying all
  before it.
- Only the last position goes through the LM head.
- A row that has ended leaves the batch, so that a few endless answers do not keep the others computing.

A row's draws are given from outside, one number in [0, 1) a token (`sampling.py`). So an answer depends on the model,
the prompt and these numbers alone: not on the rows that share its batch, on the process, or on the number of workers.

Legend: P prompts of a batch, B its rows (each draw of each prompt is one), T tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl_ray.answers.batch import Batch, Draw, Tokens, batches_of
from pocl_ray.answers.families import means_of
from pocl_ray.answers.sampling import answer_draws, chooser
from pocl_ray.config import GenerationConfig
from pocl_ray.heartbeat import advance
from pocl_ray.models.saving import stop_ids_of

OnTokens = Callable[[torch.Tensor], object]


@dataclass(frozen=True)
class GenerationSettings:
    """The settings of generation, with resolved lengths.

    Attributes:
        sampling_temperature: Divisor of the logits before sampling; 0 is greedy.
        top_p: Probability of the smallest set of tokens to sample from; 1 keeps all.
        no_repeat_ngram_size: Length of n-grams that are not repeated, including those of the prompt; 0 allows all.
        max_new_tokens: Limit of each answer, at least 1; one number for all prompts, or one for each.
        batch_rows: Number of rows generated at once.
    """

    sampling_temperature: float = 1.0
    top_p: float = 1.0
    no_repeat_ngram_size: int = 0
    max_new_tokens: int | Sequence[int] = 256
    batch_rows: int = 64

    @classmethod
    def of(cls, config: GenerationConfig, max_tokens: int, prompts: Sequence[Tokens]) -> GenerationSettings:
        """Return the settings of a config section for some prompts.

        Args:
            config: Section of the config.
            max_tokens: Maximum tokens of prompt and answer together (`data.max_tokens`).
            prompts: Token ids of each prompt.
        """
        # Answers end where training rows end; a prompt that fills max_tokens alone still gets one token.
        cap = max_tokens if config.max_new_tokens is None else config.max_new_tokens
        limits = tuple(max(1, min(cap, max_tokens - len(prompt))) for prompt in prompts)
        return cls(**{**config.model_dump(), "max_new_tokens": limits})

    def limits(self, num_prompts: int) -> list[int]:
        """Return the maximum number of tokens of each answer."""
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
    seeds: Sequence[int | None],
    keys: Sequence[int] | None = None,
    on_tokens: OnTokens | None = None,
) -> list[list[list[int]]]:
    """Return answers to each prompt, one for each seed.

    The model's own generation config (temperature, repetition penalty and so on) is not used, except for the tokens
    that end an answer. No global random state is read or changed.

    Args:
        model: Model, on the device to use; it runs without dropout.
        tokenizer: Tokenizer with the end-of-sequence token.
        prompts: Token ids, one array of shape (tokens,) for each prompt; none is empty.
        settings: Settings of generation.
        seeds: Seed of each answer to a prompt; None for a greedy answer, whatever the temperature.
        keys: Key of each prompt, such as the row's id: an answer is drawn by (seed, key) alone. Default: the prompt's
            place.
        on_tokens: Function that is called with the new tokens of the rows of a batch, as they are chosen.

    Returns:
        For each seed the token ids of the answers in the order of `prompts`, without the end-of-sequence token. An
        answer that never stopped has as many tokens as its limit allows.
    """
    limits, named = settings.limits(len(prompts)), range(len(prompts)) if keys is None else keys
    stop_ids = set(stop_ids_of(model, tokenizer))
    # By row and not from one generator for the batch: a generator's n-th number would belong to whichever row comes
    # n-th, so that an answer would change with its neighbours, with batch_rows and with the number of actors.
    draws: list[Draw] = [
        None
        if seed is None or settings.sampling_temperature == 0
        else [answer_draws(seed, key, limit) for key, limit in zip(named, limits, strict=True)]
        for seed in seeds
    ]
    with _without_dropout(model):
        answered = decode(model, prompts, limits, draws, sorted(stop_ids), settings, on_tokens)
    # An end-of-sequence token can only be the last one.
    return [[r[:-1].tolist() if int(r[-1]) in stop_ids else r.tolist() for r in responses] for responses in answered]


def decode(
    model: PreTrainedModel,
    prompts: Sequence[Tokens],
    limits: Sequence[int],
    draws: Sequence[Draw],
    stop_ids: Sequence[int],
    settings: GenerationSettings,
    on_tokens: OnTokens | None = None,
) -> list[list[np.ndarray]]:
    """Return responses to each prompt, one for each draw.

    Args:
        model: Model in eval mode, on the device to use.
        prompts: Token ids, one array of shape (tokens,) for each prompt; none is empty.
        limits: Maximum tokens of each response, including the token that ends it; at least 1.
        draws: Numbers that decide the sampling; draws of a prompt share its prefill.
        stop_ids: Tokens that end a response.
        settings: Choice of tokens, and rows of a batch; its limits are not read.
        on_tokens: Function that is called with the new tokens of the rows of a batch, as they are chosen.

    Returns:
        For each draw the token ids of the responses in the order of `prompts`, int32. One that has ended keeps the
        token that ended it; one that ran into its limit has as many tokens as that.

    Raises:
        ModelError: The model's family cannot be decoded exactly (`families.py`).
    """
    assert all(len(prompt) for prompt in prompts), "a prompt has no tokens"
    assert min(limits, default=1) > 0, "an answer may have no tokens"
    if settings.sampling_temperature == 0:
        draws = [None] * len(draws)
    responses: list[list[np.ndarray]] = [[np.empty(0, np.int32)] * len(prompts) for _ in draws]
    if not prompts or not draws:
        return responses
    means = means_of(model)  # which of the shortcuts above are exact for this family
    # Greedy draws first: the rows that are sampled are then one slice of a batch.
    places = sorted(range(len(draws)), key=lambda place: draws[place] is not None)
    # A batch holds all draws of fewer prompts, not one draw of more: draws of a prompt then share its prefill.
    at_once = min(settings.batch_rows, len(draws))
    choose = chooser(settings.sampling_temperature, settings.top_p)
    for rows in batches_of([len(prompt) for prompt in prompts], settings.batch_rows // at_once, means.pads):
        picked = [prompts[row] for row in rows], [limits[row] for row in rows]
        for some in (places[first : first + at_once] for first in range(0, len(places), at_once)):
            drawn = [None if (draw := draws[place]) is None else [draw[row] for row in rows] for place in some]
            with torch.no_grad():  # not inference_mode: the model may keep what it computes, and trains afterwards
                batch = Batch(model, *picked, drawn, stop_ids, means)
                written = batch.run(choose, settings.no_repeat_ngram_size, on_tokens)
            for place, of_draw in zip(some, written, strict=True):
                for row, tokens in zip(rows, of_draw, strict=True):
                    responses[place][row] = tokens
        advance(len(rows))
    return responses


@contextmanager
def _without_dropout(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training  # rollouts are generated by a model in the middle of training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
