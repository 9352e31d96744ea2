from __future__ import annotations

from typing import Any

import pytest
from searches import NUM_ROWS, search_config

from pocl_ray.config import Config
from pocl_ray.errors import ConfigError
from pocl_ray.tuning.candidates import PlannedTrial, Planner
from pocl_ray.tuning.drawing import Drawing, TrialOutcome, check_drawable, propose
from pocl_ray.tuning.space import ConstraintError


def drawing_of(config: Config) -> Drawing:
    return Drawing(config, Planner(config, NUM_ROWS).plan)


def draw_all_of(drawing: Drawing) -> list[PlannedTrial]:
    drawn = []
    while (planned := drawing.next()) is not None:
        drawn.append(planned)
        if not planned.candidate.is_control:
            drawing.tell(planned.candidate.number, {"rouge_l": 1.0, "num_samples": 10, "is_finished": True})
    return drawn


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_the_control_comes_first_and_then_as_many_trials_as_asked_for(algorithm: str) -> None:
    drawn = draw_all_of(drawing_of(search_config(algorithm=algorithm)))
    assert [p.candidate.number for p in drawn] == [-1, 0, 1, 2, 3, 4, 5]


def test_invalid_samples_are_drawn_again_and_recorded() -> None:
    config = search_config(constraints=["curriculum.interval_epochs * curriculum.num_buckets <= 4"], control=False)
    drawing = drawing_of(config)
    drawn = draw_all_of(drawing)
    assert len(drawn) == 6
    assert all(p.config.curriculum.interval_epochs * p.config.curriculum.num_buckets <= 4 for p in drawn)
    assert drawing.skipped and all("does not hold" in entry["reason"] for entry in drawing.skipped)


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_nothing_is_tried_twice_and_a_small_space_ends_the_search(algorithm: str) -> None:
    space = {"curriculum.num_buckets": {"choice": [1, 2, 4]}}
    drawn = draw_all_of(drawing_of(search_config(space=space, algorithm=algorithm, control=False, num_trials=8)))
    assert sorted(p.config.curriculum.num_buckets for p in drawn) == [1, 2, 4]


def test_a_grid_is_walked_in_order_and_invalid_points_are_left_out() -> None:
    space = {"curriculum.num_buckets": {"grid": [2, 4]}, "curriculum.interval_epochs": {"choice": [1, 2]}}
    config = search_config(
        space=space,
        algorithm="grid",
        num_trials=None,
        control=False,
        constraints=["not (curriculum.num_buckets == 4 and curriculum.interval_epochs == 2)"],
    )
    drawn = draw_all_of(drawing_of(config))
    assert [(p.config.curriculum.num_buckets, p.config.curriculum.interval_epochs) for p in drawn] == [
        (2, 1),
        (2, 2),
        (4, 1),
    ]


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_a_search_that_was_killed_goes_on_as_if_it_had_not_been(algorithm: str) -> None:
    config = search_config(algorithm=algorithm)
    whole = [p.candidate for p in draw_all_of(drawing_of(config))]
    first = drawing_of(config)
    for _ in range(4):
        planned = first.next()
        assert planned is not None
        if not planned.candidate.is_control:
            first.tell(planned.candidate.number, {"rouge_l": 1.0, "num_samples": 10, "is_finished": True})
    second = drawing_of(config)
    second.load(first.dump())
    assert [p.candidate for p in draw_all_of(second)] == whole[4:]


def test_optuna_looks_where_it_was_good() -> None:
    config = search_config(space={"curriculum.kd_temperature.end": {"uniform": [1.0, 3.0]}}, num_trials=20)
    assert config.tune is not None
    history = []
    for number in range(20):
        settings = propose(config.tune, number, history, 0)
        assert settings is not None
        value = -abs(settings["curriculum.kd_temperature.end"] - 2.5)
        history.append(TrialOutcome(settings, "finished", (value,), 10))
    late = [told.settings["curriculum.kd_temperature.end"] for told in history[12:]]
    assert sum(abs(end - 2.5) < 0.5 for end in late) >= 5


@pytest.mark.parametrize("state", ["finished", "stopped", "failed", "running"])
@pytest.mark.parametrize("objectives", [["rouge_l"], ["rouge_l", "num_tokens"]])
def test_optuna_is_told_of_every_kind_of_end(state: Any, objectives: list[str]) -> None:
    space = {
        "curriculum.num_buckets": {"choice": [1, 2]},
        "curriculum.kd_ratio": {"choice": [1.0, [0.5, 1.0], {"start": 0.5, "end": 1.0}]},
        "curriculum.interval_epochs": {"randint": [1, 3]},
        "train.learning_rate": {"loguniform": [1e-4, 1e-2]},
        "curriculum.kd_temperature.end": {"quniform": [1.0, 2.0, 0.25]},
    }
    tune = search_config(space=space, objectives=objectives, num_trials=30).tune
    assert tune is not None
    history: list[TrialOutcome] = []
    for number in range(12):
        settings = propose(tune, number, history, 1)
        assert settings is not None
        values = None if state in ("failed", "running") else (float(number), 5.0)[: len(objectives)]
        history.append(TrialOutcome(settings, state, values, 10))
    assert len(history) == 12


def test_a_trial_that_failed_is_told_as_such() -> None:
    drawing = drawing_of(search_config(control=False))
    drawing.next()
    drawing.tell(0, None)
    drawing.tell(-1, None)
    assert drawing.outcomes[0].state == "failed"


def test_a_space_of_which_nothing_fits_is_refused_with_the_reason() -> None:
    config = search_config(budget={"steps": 3})
    with pytest.raises(ConfigError, match=r"none of 200 samples.*leaves it none of 3"):
        check_drawable(config, Planner(config, NUM_ROWS))
    config = search_config(constraints=["curriculum.buckets < 3"])
    with pytest.raises(ConstraintError, match=r"no key curriculum.buckets"):
        check_drawable(config, Planner(config, NUM_ROWS))
    check_drawable(search_config(), Planner(search_config(), NUM_ROWS))
