"""The signals a config may choose: weights, other names, columns of the rows, and plug-ins."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pocl_ray import plugins
from pocl_ray.config import DifficultyConfig
from pocl_ray.difficulty.choice import GROUP, TokenSignal, choose_signals, load_signals, measure
from pocl_ray.difficulty.signals import teacher_signals
from pocl_ray.errors import ConfigError, UserError

# What a config may say


def test_a_list_weighs_all_alike_and_a_mapping_keeps_its_order() -> None:
    listed = DifficultyConfig.model_validate({"signals": ["ce_loss", "rouge_l"]})
    assert list(listed.signals.items()) == [("ce_loss", 1.0), ("rouge_l", 1.0)]
    weighted = DifficultyConfig.model_validate({"signals": {"rouge_l": 1, "ce_loss": 0.5}})
    assert list(weighted.signals.items()) == [("rouge_l", 1.0), ("ce_loss", 0.5)]


def test_response_tokens_is_another_name_of_the_column() -> None:
    assert list(DifficultyConfig.model_validate({"signals": ["response_tokens"]}).signals) == ["num_response_tokens"]


@pytest.mark.parametrize(
    ("difficulty", "message"),
    [
        ({"signals": []}, "at least 1 item"),
        ({"signals": ["rouge_l", "rouge_l"]}, "stands twice in the list"),
        ({"signals": ["response_tokens", "num_response_tokens"]}, "stands twice, once under another name"),
        ({"signals": {"rouge_l": 0}}, "greater than 0"),
        ({"signals": {"rouge_l": "much"}}, "valid number"),
        ({"signals": [1]}, "names of signals are text"),
        ({"signals": "rouge_l"}, "valid dictionary"),
        ({"signals": ["column:score"]}, "column:score needs columns.score: high or low"),
        ({"columns": {"score": "high"}}, "columns.score is not among the signals"),
        ({"signals": ["column:score"], "columns": {"score": "up"}}, "'high' or 'low'"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(difficulty: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DifficultyConfig.model_validate(difficulty)


def test_a_column_brings_its_direction_and_is_no_plug_in() -> None:
    chosen = choose_signals(
        DifficultyConfig.model_validate({"signals": {"rouge_l": 1, "column:a b": 2}, "columns": {"a b": "high"}})
    )
    assert (chosen.easy, chosen.plugins, chosen.origins) == ({"column:a b": "high"}, (), ())


@pytest.mark.parametrize(("name", "hint"), [("ce_los", "did you mean ce_loss?"), ("zzz", "or column:NAME")])
def test_an_unknown_signal_is_an_error_with_a_hint(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        choose_signals(DifficultyConfig.model_validate({"signals": [name]}))
    assert hint in str(refused.value)


# Plug-ins


def margin(student_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor) -> Tensor:
    best_N = student_NV.amax(-1)
    return best_N - student_NV.gather(-1, targets_N[:, None]).squeeze(-1)


def agreement(student_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor) -> Tensor:
    return (student_NV.argmax(-1) == teacher_NV.argmax(-1)).float()


AGREEMENT = TokenSignal(agreement, easy="high")
NOTHING = "text"


def fails(student_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor) -> Tensor:
    raise ValueError("no luck")


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def declare(value: str) -> None:
        entry_point = EntryPoint(name="mine", value=value, group=GROUP)
        monkeypatch.setattr(plugins, "entry_points", lambda group: [entry_point] if group == GROUP else [])

    return declare


@pytest.mark.parametrize(
    ("value", "easy"), [("test_signal_choice:margin", "low"), ("test_signal_choice:AGREEMENT", "high")]
)
def test_a_plug_in_is_a_function_or_says_which_values_are_easy(
    install: Callable[[str], None], value: str, easy: str
) -> None:
    install(value)
    chosen = choose_signals(DifficultyConfig.model_validate({"signals": {"rouge_l": 1, "mine": 0.5}}))
    assert (chosen.easy, chosen.plugins) == ({"mine": easy}, ("mine",))
    assert chosen.origins[0].startswith(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("test_signal_choice:fails", r"^signal plug-in 'mine' fails when called: ValueError: no luck$"),
        ("test_signal_choice:NOTHING", "is str; it must be a function or a TokenSignal"),
        ("test_signal_choice:absent", "cannot be imported"),
    ],
)
def test_a_plug_in_that_does_not_work_is_refused_by_name(
    install: Callable[[str], None], value: str, message: str
) -> None:
    install(value)
    with pytest.raises(UserError, match=message):
        load_signals(["mine"])


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (1.0, "returns float, not a tensor; a signal returns one finite float a token"),
        (torch.ones(3, 1), r"returns shape \(3, 1\) for 3 tokens"),
        (torch.ones(3, dtype=torch.int64), "not finite floats"),
        (torch.tensor([1.0, float("inf"), 0.0]), "not finite floats"),
    ],
)
def test_nonsense_from_a_plug_in_is_shown(returned: Any, message: str) -> None:
    logits_NV = torch.zeros(3, 7)
    with pytest.raises(UserError, match=message):
        measure("mine", lambda *_: returned, logits_NV, logits_NV, torch.zeros(3, dtype=torch.int64))


def test_a_rows_signal_is_the_mean_over_its_tokens_on_the_shared_vocabulary() -> None:
    generator = torch.Generator().manual_seed(0)
    student_NV, teacher_NV = torch.randn(5, 9, generator=generator), torch.randn(5, 11, generator=generator)
    targets_N, lengths_R = torch.tensor([0, 3, 8, 2, 1]), np.array([2, 3])
    seen: list[torch.Size] = []

    def noted(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        seen.extend([student.shape, teacher.shape])
        return margin(student, teacher, targets)

    def head(hidden: Tensor) -> Tensor:
        return hidden

    extra = {"mine": TokenSignal(noted)}
    made = teacher_signals(teacher_NV, head, targets_N, lengths_R, (student_NV, head), extra)
    expected_N = margin(student_NV, teacher_NV, targets_N)
    assert made["mine"] == pytest.approx([expected_N[:2].mean().item(), expected_N[2:].mean().item()], abs=1e-6)
    assert {shape[-1] for shape in seen} == {9}
