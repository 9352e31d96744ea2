"""The experiment over regimes: each command in its file plans arms of equal steps, and its rows are wrong as said."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pocl_ray.config import load_config
from pocl_ray.data.samples import sample_rows
from pocl_ray.experiments.arms import by_scoring, plan_arms

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

from corrupted_rows import exchange_responses

CONFIG = Path(__file__).resolve().parents[3] / "configs/experiment-regimes.yaml"
TEXT = CONFIG.read_text(encoding="utf-8").replace("\\\n#", "")
COMMANDS = [line.split(CONFIG.name)[1].split() for line in TEXT.splitlines() if f"{CONFIG.name} " in line]


@pytest.mark.parametrize("overrides", COMMANDS, ids=lambda overrides: overrides[0])
def test_every_regime_compares_arms_at_equal_steps_from_one_scoring(overrides: list[str]) -> None:
    config = load_config(CONFIG, overrides)
    arms = plan_arms(config, config.data.train.max_rows or 3750)
    assert {arm.num_steps for arm in arms.values()} == {config.curriculum.num_steps}
    assert by_scoring(config, arms) == {config.name: list(arms)}


def test_four_regimes_have_a_command() -> None:
    assert [overrides[0] for overrides in COMMANDS] == [
        "name=quarter-steps",
        "name=few-rows",
        "name=corrupted-rows",
        "name=weak-teacher",
    ]


def test_a_share_of_the_rows_has_the_response_of_another_row_and_nothing_else_changes() -> None:
    rows = [{"input": str(number), "output": f"answer {number}"} for number in range(40)]
    changed = exchange_responses(rows, 0.25, seed=1)
    assert sum(old["output"] != new["output"] for old, new in zip(rows, changed, strict=True)) == 10
    assert sorted(row["output"] for row in changed) == sorted(row["output"] for row in rows)
    assert [row["input"] for row in changed] == [row["input"] for row in rows]
    assert exchange_responses(rows, 0.25, seed=1) == changed != exchange_responses(rows, 0.25, seed=2)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_none_and_all_can_be_wrong(share: float) -> None:
    rows = [{"output": str(number)} for number in range(5)]
    changed = exchange_responses(rows, share, seed=0)
    assert sum(old != new for old, new in zip(rows, changed, strict=True)) == 5 * share


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_outside_0_to_1_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        exchange_responses([{"output": "a"}], share, seed=0)


def test_the_samples_are_changed_in_a_quarter_of_their_rows_or_little_less() -> None:
    rows = sample_rows("instructions", "train")
    changed = exchange_responses(rows, 0.25, seed=0)
    wrong = sum(old["output"] != new["output"] for old, new in zip(rows, changed, strict=True))
    assert 0.23 * len(rows) < wrong <= round(0.25 * len(rows))
