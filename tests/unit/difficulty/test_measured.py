"""The passes that a scoring makes, from the config alone."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pocl_ray.config import Config
from pocl_ray.difficulty.measured import Passes, at_least, passes_of, wanted_signals

TREE: dict[str, Any] = {
    "name": "run",
    "data": {"train": {"path": "train.jsonl"}, "dev": {"path": "dev.jsonl"}},
    "teacher": {"path": "teacher"},
    "student": {"path": "student"},
}


def config_of(signals: list[str] | None = None, **more: Any) -> Config:
    difficulty = {**({} if signals is None else {"signals": signals}), **more.pop("difficulty", {})}
    return Config.model_validate({**TREE, "difficulty": difficulty, **more})


@pytest.mark.parametrize(
    ("signals", "passes"),
    [
        (None, Passes(answers=True, student=True, teacher=False, compares=False)),
        (["rouge_l"], Passes(answers=True, student=False, teacher=False, compares=False)),
        (["ce_loss"], Passes(answers=False, student=True, teacher=False, compares=False)),
        (["response_tokens"], Passes(answers=False, student=False, teacher=False, compares=False)),
        (["teacher_entropy"], Passes(answers=False, student=False, teacher=True, compares=False)),
        (["ce_loss", "teacher_ce_loss"], Passes(answers=False, student=True, teacher=True, compares=False)),
        (["teacher_student_kl"], Passes(answers=False, student=True, teacher=True, compares=True)),
        (["ce_loss", "mine"], Passes(answers=False, student=True, teacher=True, compares=True, plugins=("mine",))),
    ],
)
def test_each_signal_takes_its_own_passes_and_no_others(signals: list[str] | None, passes: Passes) -> None:
    assert passes_of(config_of(signals), fills_cache=False) == passes


def test_a_cache_takes_a_pass_of_the_teacher_and_none_of_the_student() -> None:
    passes = passes_of(config_of(["response_tokens"]), fills_cache=True)
    assert passes == Passes(answers=False, student=False, teacher=True, compares=False)


def test_frontier_pacing_draws_by_the_gap_and_reads_no_answer() -> None:
    passes = passes_of(config_of(curriculum={"pacing": "frontier"}), fills_cache=True)
    assert passes == Passes(answers=False, student=True, teacher=True, compares=True)
    named = passes_of(config_of(["ce_loss"], curriculum={"pacing": "frontier"}), fills_cache=False)
    assert named.compares and not named.answers


def test_what_is_asked_for_is_measured_beside_what_is_fused() -> None:
    config = config_of(["ce_loss"], difficulty={"also_measure": ["teacher_student_kl", "rouge_l"]})
    assert wanted_signals(config) == ("ce_loss", "teacher_student_kl", "rouge_l")
    assert passes_of(config, fills_cache=False) == Passes(answers=True, student=True, teacher=True, compares=True)
    with pytest.raises(ValidationError, match="also_measure"):
        config_of(["ce_loss"], difficulty={"also_measure": ["rouge"]})


@pytest.mark.parametrize(
    ("space", "wanted"),
    [
        ({"curriculum.num_buckets": {"choice": [2, 4]}}, {"ce_loss"}),
        ({"curriculum.pacing": {"choice": ["baby_step", "frontier"]}}, {"ce_loss", "teacher_student_kl"}),
        (
            {"difficulty.signals": {"grid": [["ce_loss"], {"rouge_l": 2}, ["prompt_tokens"]]}},
            {"ce_loss", "rouge_l", "num_prompt_tokens"},
        ),
    ],
)
def test_a_search_measures_the_signals_of_its_space(space: dict[str, Any], wanted: set[str]) -> None:
    assert set(wanted_signals(config_of(["ce_loss"], tune={"space": space}))) == wanted


def test_an_experiment_measures_the_signals_of_its_arms() -> None:
    arms = {
        "plain": {"curriculum.pacing": "none"},
        "by_length": {"difficulty": {"signals": ["response_tokens"]}},
        "drawn": {"curriculum.pacing": "frontier"},
    }
    config = config_of(["ce_loss"], experiment={"arms": arms, "baseline": "plain", "seeds": [1, 2]})
    assert wanted_signals(config) == ("ce_loss", "num_response_tokens", "teacher_student_kl")


def test_the_arms_of_a_race_are_read_too() -> None:
    base, arm = config_of(["ce_loss"]), config_of(["ce_loss"], curriculum={"pacing": "frontier"})
    assert not passes_of(base, fills_cache=True).compares
    assert passes_of(base, fills_cache=True, arms=[arm]).compares


def test_two_tokenizers_leave_nothing_to_compare_out() -> None:
    teacher = {"path": "teacher", "cross_tokenizer": "uld"}
    bridged = config_of(["ce_loss"], teacher=teacher, curriculum={"kd_ratio": 0.5})
    assert passes_of(bridged, fills_cache=True).left_out == ("without answers",)
    assert passes_of(config_of(["ce_loss"]), fills_cache=True).left_out == ("without answers", "without comparison")


def test_a_scoring_that_measured_more_is_enough_and_the_nearest_comes_first() -> None:
    assert at_least([]) == [[]]
    assert at_least(["a", "b"]) == [["a", "b"], ["a"], ["b"], []]


def test_plain_texts_have_no_answers_to_ask_for() -> None:
    data = {"task": "text", "train": {"path": "train.jsonl"}, "dev": {"path": "dev.jsonl"}}
    with pytest.raises(ValidationError, match=r"difficulty\.also_measure: .*no rouge_l"):
        config_of(["ce_loss"], data=data, difficulty={"also_measure": ["rouge_l"]})
