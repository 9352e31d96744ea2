"""Settings that do not fit the task are refused when the config is read."""

from __future__ import annotations

from typing import Any

import pytest

from pocl_ray.config import Config

DATA: dict[str, Any] = {"train": {"path": "x.jsonl"}, "holdout_rows": 1, "task": "text", "max_tokens": 64}


def text_config(**changes: Any) -> Config:
    tree: dict[str, Any] = {
        "name": "x",
        "data": DATA,
        "teacher": {"path": "t"},
        "student": {"path": "s"},
        "difficulty": {"signals": ["ce_loss", "teacher_ce_loss"]},
        **changes,
    }
    return Config.model_validate(tree)


def test_plain_text_needs_no_room_for_a_prompt() -> None:
    assert text_config().data.max_prompt_tokens > text_config().data.max_tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {**DATA, "responses": "teacher"}}, "data.responses: .* set it to reference"),
        (
            {"rollout": {"mode": "on"}, "distill": {"teacher_cache": "none"}},
            "rollout.mode: .* which the student could write to; set it to off",
        ),
        ({"difficulty": {}}, "difficulty.signals: .* no prompts to answer, so there is no rouge_l; give others"),
        ({"difficulty": {"signals": ["prompt_tokens"]}}, "there is no num_prompt_tokens"),
        ({"curriculum": {"advance": "plateau"}}, "curriculum.plateau.metric: .* set it to kd_loss or ce_loss"),
        ({"tune": {"space": {"train.learning_rate": {"choice": [1e-3]}}}}, "tune.objectives: .* there is no rouge_l"),
    ],
)
def test_plain_text_is_refused_with_what_asks_for_answers(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text_config(**changes)


def test_other_figures_go_with_plain_text() -> None:
    plateau = {"advance": "plateau", "plateau": {"metric": "kd_loss"}}
    assert text_config(curriculum=plateau).curriculum.plateau.metric == "kd_loss"
