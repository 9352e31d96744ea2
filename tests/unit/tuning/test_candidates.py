from __future__ import annotations

from pathlib import Path

import pytest
from searches import NUM_ROWS, search_config

from pocl_ray.config.loading import dump_config, load_config
from pocl_ray.config.neutral import neutral_free
from pocl_ray.curriculum.schedule import plan_stages
from pocl_ray.errors import ConfigError
from pocl_ray.fingerprints import sft_dependencies
from pocl_ray.tuning.candidates import Candidate, Planner, TrialOrigins
from pocl_ray.tuning.results import best_config

ORIGINS = TrialOrigins(signals="signals", student="student")


def test_every_trial_of_a_budget_is_equally_long_and_so_is_the_control() -> None:
    planner = Planner(search_config(budget={"steps": 50}), NUM_ROWS)
    planned = [
        planner.plan(Candidate("trial", 0, {"curriculum.num_buckets": n, "curriculum.interval_epochs": k}))
        for n, k in ((2, 1), (4, 2), (1, 1))
    ]
    planned.append(planner.plan(Candidate("control", -1, {})))
    assert [p.num_steps for p in planned] == [50] * 4
    assert [s.num_steps for s in planned[1].stages] == [4, 8, 12, 26]  # the last stage takes what is left
    assert len(planned[-1].stages) == 1


def test_a_budget_in_samples_does_not_depend_on_the_batch() -> None:
    planner = Planner(search_config(budget={"samples": 1600}), NUM_ROWS)
    for rows in (16, 32):
        planned = planner.plan(Candidate("trial", 0, {"train.global_batch_rows": rows}))
        assert planned.num_samples == 1600


@pytest.mark.parametrize("budget", [{"steps": 7}, {"samples": 10}])
def test_a_budget_that_the_stages_exceed_is_refused(budget: dict[str, int]) -> None:
    planner = Planner(search_config(budget=budget), NUM_ROWS)
    with pytest.raises(ConfigError, match=r"budget|num_steps"):
        planner.plan(Candidate("trial", 0, {"curriculum.num_buckets": 4, "curriculum.interval_epochs": 1}))


def test_a_broken_constraint_is_named() -> None:
    planner = Planner(search_config(constraints=["curriculum.interval_epochs * curriculum.num_buckets <= 4"]), NUM_ROWS)
    planner.plan(Candidate("trial", 0, {"curriculum.num_buckets": 2, "curriculum.interval_epochs": 2}))
    with pytest.raises(ConfigError, match="does not hold"):
        planner.plan(Candidate("trial", 0, {"curriculum.num_buckets": 4, "curriculum.interval_epochs": 2}))


def test_another_seed_changes_the_student_and_nothing_before_it() -> None:
    planner = Planner(search_config(), NUM_ROWS)
    candidate = Candidate("trial", 2, {"curriculum.num_buckets": 2})
    first, again = planner.plan(candidate), planner.plan(candidate.again(7))
    assert first.fingerprint(ORIGINS) != again.fingerprint(ORIGINS)
    assert first.ranking_fingerprint(ORIGINS) == again.ranking_fingerprint(ORIGINS)
    assert again.config.seed == first.config.seed
    assert again.candidate.label == "trial-002-seed-7"


def test_best_yaml_leads_to_the_same_student(tmp_path: Path) -> None:
    base = search_config(budget={"steps": 50})
    settings = {"curriculum.num_buckets": 2, "train.learning_rate": 0.01, "train.global_batch_rows": 16}
    planned = Planner(base, NUM_ROWS).plan(Candidate("trial", 0, settings))
    path = tmp_path / "best.yaml"
    path.write_text(dump_config(best_config(planned)))
    again = load_config(path)
    assert again.name == "search-best" and again.tune is None
    assert plan_stages(again, NUM_ROWS) == planned.stages
    assert neutral_free(again)["train"] == neutral_free(planned.config)["train"]
    # supervised fine-tuning stays as it was, although the trial trains at another rate
    assert sft_dependencies(again, "student") == sft_dependencies(base, "student")


def test_names_differ_where_students_do() -> None:
    planner = Planner(search_config(), NUM_ROWS)
    names = {planner.plan(Candidate("trial", 0, {"curriculum.num_buckets": n})).name(ORIGINS) for n in (1, 2, 4)}
    assert len(names) == 3
