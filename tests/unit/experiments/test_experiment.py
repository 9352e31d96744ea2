"""The course of an experiment without Ray: screening, judging, equal FLOPs, and going on after a kill."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from arms_config import NUM_ROWS, experiment_config

from pocl_ray.arms import Arm
from pocl_ray.config import Config
from pocl_ray.experiments.arms import plan_arms
from pocl_ray.experiments.experiment import Experiment
from pocl_ray.experiments.flops import ArmFlops
from pocl_ray.experiments.results import Outcome

GAIN = {"plain": 0.0, "hot": 2.0, "fast": -1.0}


class FakeRun:
    """What arms start from, with FLOPs that are told by the arm: `hot` costs a quarter more."""

    num_rows = NUM_ROWS

    def __init__(self) -> None:
        tests = {"test": SimpleNamespace(name="test")}
        self.rows = SimpleNamespace(dev=SimpleNamespace(name="dev"), tests=tests)

    def job(self, config: Config, arm: Arm, seed: int, sets: dict[str, Any]) -> Any:
        return SimpleNamespace(name=f"{arm.name}-seed-{seed}", arm=arm, seed=seed, sets=list(sets))

    def planned_flops(self, arm: Arm) -> ArmFlops:
        return ArmFlops(6.0 if arm.name == "hot" else 0.0, 0.0, float(arm.num_steps))

    def measured_flops(self, arm: Arm, result: dict[str, Any]) -> ArmFlops:
        return self.planned_flops(arm)


class FakePool:
    """Trains nothing; figures follow from arm and seed. Dies before job number `dies_at`."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.jobs: list[str] = []
        self.dies_at = dies_at

    def run(self, jobs: list[Any], on_done: Any, on_look: Any) -> None:
        for job in jobs:
            if len(self.jobs) == self.dies_at:
                raise KeyboardInterrupt
            self.jobs.append(f"{job.name} on {job.sets[0]}")
            on_look({job.name: (1, 24)})
            gain = GAIN.get(job.arm.name, 0.5)
            figures = {"rouge_l": 60 + job.seed + gain + 0.1 * (job.seed % 2), "ce_loss": 1.0}
            on_done(job.name, {"figures": {job.sets[0]: figures}, "num_steps": 24, "num_tokens": 9, "seconds": 1.0,
                               "curve": [], "losses": [], "row_losses": {}})  # fmt: skip


def conduct(folder: Path, pool: FakePool, **keys: Any) -> Outcome:
    config = experiment_config(**keys).model_copy(update={"storage_path": str(folder)})
    arms, run = plan_arms(config, NUM_ROWS), FakeRun()
    assert config.experiment is not None
    screen = config.experiment.screen
    of_seed = dict.fromkeys((*(screen.seeds if screen else ()), *config.experiment.seeds), run)
    return Experiment(config, arms, dict.fromkeys(arms, of_seed), pool).run()  # type: ignore[arg-type]


def test_screening_judges_on_dev_and_only_the_best_go_on_to_test_rows(tmp_path: Path) -> None:
    pool = FakePool()
    outcome = conduct(tmp_path, pool, screen={"seeds": [8, 9], "keep": 1}, equal_flops=False)
    assert outcome.screened == ("plain", "hot", "fast")
    assert outcome.judged == ("plain", "hot")
    assert [job for job in pool.jobs if job.endswith("on dev")] == [
        f"{arm}-seed-{seed} on dev" for seed in (8, 9) for arm in ("plain", "hot", "fast")
    ]
    assert [job for job in pool.jobs if job.endswith("on test")] == [
        f"{arm}-seed-{seed} on test" for seed in (1, 2, 3) for arm in ("plain", "hot")
    ]
    assert {(one.phase, one.set) for one in outcome.comparisons} == {("screen", "dev"), ("confirm", "test")}


def test_the_baseline_is_trained_for_the_flops_of_an_arm(tmp_path: Path) -> None:
    outcome = conduct(tmp_path, FakePool())
    found = {(one.arm, one.budget): one for one in outcome.comparisons if one.figure == "rouge_l"}
    assert found["hot", "flops"].baseline == "plain-30-steps"
    assert found["hot", "flops"].difference.mean == pytest.approx(1.5)
    assert found["hot", "steps"].difference.mean == pytest.approx(2.0)
    assert found["fast", "flops"].baseline == "plain"  # costs the same: nothing more is trained


def test_a_killed_experiment_goes_on(tmp_path: Path) -> None:
    first, second = FakePool(dies_at=4), FakePool()
    with pytest.raises(KeyboardInterrupt):
        conduct(tmp_path, first, equal_flops=False)
    outcome = conduct(tmp_path, second, equal_flops=False)
    assert len(first.jobs) == 4
    assert len(second.jobs) == 5
    assert not {*first.jobs} & {*second.jobs}
    assert [(r.seed, r.arm) for r in outcome.records] == [(s, a) for s in (1, 2, 3) for a in ("plain", "hot", "fast")]
    again = FakePool()
    assert conduct(tmp_path, again, equal_flops=False) == outcome
    assert again.jobs == []
