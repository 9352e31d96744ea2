from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_answers import EOS, some_prompts, tiny_model
from transformers import PreTrainedModel

from pocl_ray.answers.batch import Batch
from pocl_ray.answers.decode import GenerationSettings
from pocl_ray.answers.decode import generate as generate_all
from pocl_ray.config import GenerationConfig

TOKENIZER: Any = SimpleNamespace(eos_token_id=EOS, pad_token_id=EOS)
FAMILIES = ("gpt2", "llama", "opt", "qwen2")


def generate(
    model: PreTrainedModel,
    prompts: list[np.ndarray],
    settings: GenerationSettings,
    seed: int = 0,
    keys: list[int] | None = None,
) -> list[list[int]]:
    """One answer to each prompt."""
    (answers,) = generate_all(model, TOKENIZER, prompts, settings, [seed], keys)
    return answers


@torch.no_grad()
def greedy_one_by_one(model: PreTrainedModel, prompt: np.ndarray, limit: int) -> list[int]:
    """Without padding, cache or library: the definition."""
    tokens = prompt.tolist()
    while len(tokens) < len(prompt) + limit:
        token = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
        if token == EOS:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_in_padded_batches_are_those_of_each_prompt_alone(family: str) -> None:
    model, prompts = tiny_model(family), some_prompts(8)
    settings = GenerationSettings(sampling_temperature=0, max_new_tokens=[20 + 2 * i for i in range(8)], batch_rows=5)
    answers = generate(model, prompts, settings, seed=0)
    limits = settings.limits(len(prompts))
    assert answers == [greedy_one_by_one(model, *pair) for pair in zip(prompts, limits, strict=True)]


def test_sampled_answers_depend_on_seed_and_key_alone() -> None:
    model, prompts = tiny_model(), some_prompts()
    settings = GenerationSettings(max_new_tokens=24, batch_rows=8)
    answers = generate(model, prompts, settings, seed=1)
    assert answers == generate(model, prompts, settings, seed=1)
    assert answers != generate(model, prompts, settings, seed=2)
    rows = [7, 3, 20]
    assert generate(model, [prompts[row] for row in rows], settings, seed=1, keys=rows) == [answers[r] for r in rows]


def test_answers_of_several_seeds_are_those_of_each_alone() -> None:
    model, prompts = tiny_model(), some_prompts()
    settings = GenerationSettings(max_new_tokens=24, batch_rows=8)
    together = generate_all(model, TOKENIZER, prompts, settings, [1, None, 2])
    greedy = GenerationSettings(sampling_temperature=0, max_new_tokens=24)
    assert together == [
        generate(model, prompts, settings, seed=1),
        generate(model, prompts, greedy),
        generate(model, prompts, settings, seed=2),
    ]


def test_rows_that_stop_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, widths = tiny_model(), []
    original = Batch._forward

    def counted(batch: Any, ids_BT: torch.Tensor, *rest: Any) -> torch.Tensor:
        widths.append(ids_BT.shape[0])
        return original(batch, ids_BT, *rest)

    generate(model, some_prompts(2), GenerationSettings(max_new_tokens=2))  # the family is known from here on
    monkeypatch.setattr(Batch, "_forward", counted)
    generate(model, some_prompts(16), GenerationSettings(max_new_tokens=60))
    writing = widths[next(i for i, width in enumerate(widths) if width == 16) :]
    assert writing[-1] < 16
    assert writing == sorted(writing, reverse=True)


def test_random_state_mode_and_generation_config_of_the_caller_stay_as_they_were() -> None:
    model = tiny_model().train()
    own = model.generation_config
    torch.manual_seed(7)
    expected = torch.rand(3).tolist()
    torch.manual_seed(7)
    generate(model, some_prompts(4), GenerationSettings(max_new_tokens=40), seed=3)
    assert torch.rand(3).tolist() == expected
    assert model.training
    assert model.generation_config is own


def test_the_models_own_generation_config_does_not_leak_in() -> None:
    model, prompts = tiny_model(), some_prompts(8)
    settings = GenerationSettings(max_new_tokens=24)
    plain = generate(model, prompts, settings, seed=1)
    model.generation_config.update(temperature=0.1, top_k=2, top_p=0.2, repetition_penalty=5.0, min_new_tokens=20)
    assert generate(model, prompts, settings, seed=1) == plain


def test_any_of_the_models_own_end_tokens_ends_an_answer() -> None:
    model, prompts = tiny_model(), some_prompts(8)
    settings = GenerationSettings(max_new_tokens=60)
    answers = generate(model, prompts, settings, seed=1)
    also = next(answer[1] for answer in answers if len(answer) > 2)
    model.generation_config.eos_token_id = [EOS, also]
    assert all(also not in answer for answer in generate(model, prompts, settings, seed=1))


def test_no_ngram_repeats_where_that_is_asked_for() -> None:
    settings = GenerationSettings(sampling_temperature=0, no_repeat_ngram_size=2, max_new_tokens=40)
    for answer in generate(tiny_model("gpt2"), some_prompts(6), settings, seed=0):
        pairs = list(itertools.pairwise(answer))
        assert len(set(pairs)) == len(pairs)


def test_nearly_zero_temperature_is_nearly_greedy() -> None:
    model, prompts = tiny_model(), some_prompts(8)
    cold = GenerationSettings(sampling_temperature=1e-4, max_new_tokens=30)
    greedy = GenerationSettings(sampling_temperature=0, max_new_tokens=30)
    assert generate(model, prompts, cold, seed=0) == generate(model, prompts, greedy, seed=0)


def test_answers_respect_both_limits() -> None:
    config = GenerationConfig(sampling_temperature=1.0, max_new_tokens=7, batch_rows=5)
    prompts = [np.full(length, 5) for length in (5, 23, 26, 30)]
    settings = GenerationSettings.of(config, max_tokens=30, prompts=prompts)
    assert settings.limits(4) == [7, 7, 4, 1]
    answers = generate(tiny_model(), prompts, settings, seed=0)
    assert all(len(answer) <= limit for answer, limit in zip(answers, (7, 7, 4, 1), strict=True))


def test_no_prompts_give_no_answers() -> None:
    assert generate(tiny_model(), [], GenerationSettings(), seed=0) == []
