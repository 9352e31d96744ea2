"""Sampling by row: the numbers of a row are its own, and the distribution is the model's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_generate import generate
from tiny_answers import some_prompts, tiny_model

from pocl_ray.answers.decode import GenerationSettings
from pocl_ray.answers.sampling import answer_draws, ban_repeats, chooser, uniform

SAMPLED = GenerationSettings(sampling_temperature=0.7, top_p=0.9, max_new_tokens=40, batch_rows=24)


def drawn(scores_V: torch.Tensor, num_draws: int, temperature: float = 1.0, top_p: float = 1.0) -> np.ndarray:
    """The share of each token among the draws of so many rows."""
    uniform_B = torch.tensor([answer_draws(0, key, 1)[0] for key in range(num_draws)])
    token_B = chooser(temperature, top_p)(scores_V.expand(num_draws, -1).clone(), uniform_B)
    return np.bincount(token_B.numpy(), minlength=len(scores_V)) / num_draws


def test_tokens_are_drawn_from_the_softened_distribution() -> None:
    scores_V = torch.tensor([0.0, 1.0, -torch.inf, 2.0, -1.0])
    shares = drawn(scores_V, 20_000, temperature=2.0)
    expected = (scores_V / 2.0).softmax(-1).numpy()
    assert shares[2] == 0.0
    # Three standard deviations of a share; the draws are fixed, so this holds for good.
    assert np.abs(shares - expected).max() < 3 * np.sqrt(0.25 / 20_000)


def test_top_p_leaves_the_likeliest_tokens_alone() -> None:
    scores_V = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    shares = drawn(scores_V, 5_000, top_p=0.7)
    assert shares[2:].sum() == 0.0
    assert shares[0] == pytest.approx(0.5 / 0.8, abs=0.03)


def test_the_numbers_of_a_row_depend_on_seed_row_and_place_alone() -> None:
    numbers = [uniform(*key) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 10, 0), (0, 1, 1))]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 for number in numbers)
    assert uniform(3, 1, 4) == uniform(3, 1, 4)


def test_an_answer_does_not_depend_on_the_rows_that_share_its_batch() -> None:
    model, prompts = tiny_model(), some_prompts()
    keys = list(range(len(prompts)))
    answers = generate(model, prompts, SAMPLED, seed=1, keys=keys)
    narrow = GenerationSettings(0.7, 0.9, max_new_tokens=40, batch_rows=3)
    shuffled = np.random.default_rng(2).permutation(len(prompts)).tolist()
    again = generate(model, [prompts[i] for i in shuffled], narrow, seed=1, keys=shuffled)
    assert again == [answers[i] for i in shuffled]
    assert any(len(answer) > 16 for answer in answers), "some answers take more than one round"
    assert answers != generate(model, prompts, SAMPLED, seed=2, keys=keys)


def test_rows_of_one_prompt_are_answered_differently_by_their_keys() -> None:
    model, prompt = tiny_model(), some_prompts(1)[0]
    answers = generate(model, [prompt] * 4, SAMPLED, seed=1, keys=[5, 6, 7, 5])
    assert answers[0] == answers[3]
    assert answers[0] != answers[1] != answers[2]


def test_greedy_answers_have_no_use_for_keys() -> None:
    model, prompts = tiny_model(), some_prompts(4)
    greedy = GenerationSettings(sampling_temperature=0, max_new_tokens=12)
    assert generate(model, prompts, greedy, 0, keys=[0, 1, 2, 3]) == generate(model, prompts, greedy, 9)


def test_teacher_responses_of_earlier_versions_are_drawn_with_the_same_numbers() -> None:
    assert answer_draws(42, 7, 2) == pytest.approx([uniform(42, 7, 0), uniform(42, 7, 1)])
    assert uniform(42, 7, 0) == 0.08245513456098497


def test_a_repeated_ngram_is_banned_and_padding_is_no_token() -> None:
    seen_BT = torch.tensor([[-1, -1, 5, 6, 7, 5, 6], [5, 6, 0, 5, 6, 9, 0], [-1, -1, -1, -1, -1, -1, 3]])
    logits_BV = torch.zeros(3, 10)
    ban_repeats(logits_BV, seen_BT, 3)
    assert logits_BV.isinf().nonzero().tolist() == [[0, 7]]
    ban_repeats(logits_BV, seen_BT, 1)
    assert logits_BV.isinf().nonzero()[:, 0].bincount().tolist() == [3, 4, 1]
    ban_repeats(logits := torch.zeros(3, 10), seen_BT, 8)
    assert not logits.isinf().any()
