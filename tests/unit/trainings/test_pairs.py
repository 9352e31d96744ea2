"""Curriculum and control in pairs of seeds: what is compared, what is kept after a kill, and what the report says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

from pocl_ray.config import Config, ScalingConfig
from pocl_ray.config.root import ControlConfig
from pocl_ray.errors import GaveUpError
from pocl_ray.records import STUDENT, STUDENT_KD
from pocl_ray.report.headline import pair_sentences
from pocl_ray.run_directory.storage import RunDirectory
from pocl_ray.trainings import pairs

SEEDS = (7, 8, 9)


def result(rouge_l: float, kl: float) -> dict[str, Any]:
    return {"figures": {"test": {"rouge_l": rouge_l, "kl": kl}}}


def results() -> pairs.Results:
    ours = {(STUDENT, seed): result(60.0 + place, 0.5) for place, seed in enumerate(SEEDS)}
    return {**ours, **{(STUDENT_KD, seed): result(58.0 + place, 0.6) for place, seed in enumerate(SEEDS)}}


def jobs() -> dict[tuple[str, int], Any]:
    return {
        key: SimpleNamespace(name=f"{key[0]}-seed-{key[1]}", task=SimpleNamespace(num_steps=5)) for key in results()
    }


class FakePool:
    """Answers each job with the result of its name, or dies after `lives` jobs."""

    lives = 100
    begun: ClassVar[list[str]] = []

    def __init__(self, scaling: ScalingConfig, num_actors: int) -> None:
        assert scaling.max_workers == 1 and num_actors == 2

    def run(
        self, waiting: Sequence[Any], on_done: Callable[[str, dict[str, Any]], None], on_look: Callable[..., None]
    ) -> None:
        found = {f"{side}-seed-{seed}": value for (side, seed), value in results().items()}
        for job in waiting:
            if len(self.begun) == self.lives:
                raise KeyboardInterrupt
            self.begun.append(job.name)
            on_look({job.name: (3, 5)})
            on_done(job.name, found[job.name])

    def close(self) -> None:
        pass


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> type[FakePool]:
    monkeypatch.setattr(FakePool, "begun", [])
    monkeypatch.setattr(FakePool, "lives", 100)
    monkeypatch.setattr(pairs, "Pool", FakePool)
    monkeypatch.setattr(pairs, "wait_for_trials", lambda scaling, most: 2)
    return FakePool


def test_the_difference_is_taken_seed_by_seed() -> None:
    content = pairs.compare_pairs(results(), SEEDS)
    rouge_l = content["sets"]["test"]["rouge_l"]
    assert rouge_l["student"] == [60.0, 61.0, 62.0] and rouge_l["student_kd"] == [58.0, 59.0, 60.0]
    assert rouge_l["difference"] == {"mean": 2.0, "low": 2.0, "high": 2.0, "num_wins": 3, "verdict": "ahead"}
    kl = content["sets"]["test"]["kl"]["difference"]
    assert kl["mean"] == pytest.approx(-0.1) and kl["verdict"] == "ahead", "less KL is better"


def test_a_killed_step_keeps_the_trainings_that_were_finished(tmp_path: Path, pool: type[FakePool]) -> None:
    run_dir = RunDirectory.open(str(tmp_path), "run")
    pool.lives = 2
    with pytest.raises(KeyboardInterrupt):
        pairs.train_pairs(run_dir, jobs(), ScalingConfig(num_workers=2))
    pool.lives = 100
    found = pairs.train_pairs(run_dir, jobs(), ScalingConfig(num_workers=2))
    assert found == results() and list(found) == list(results())
    assert sorted(pool.begun) == sorted(job.name for job in jobs().values()), "each once"


def test_a_training_that_diverges_ends_the_step_with_its_name(
    tmp_path: Path, pool: type[FakePool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverges(
        self: FakePool, waiting: Sequence[Any], on_done: Callable[..., None], on_look: Callable[..., None]
    ) -> None:
        on_done(waiting[0].name, {"failure": "the training loss is nan at step 3"})

    monkeypatch.setattr(FakePool, "run", diverges)
    with pytest.raises(GaveUpError, match=r"student-seed-7: the training loss is nan at step 3"):
        pairs.train_pairs(RunDirectory.open(str(tmp_path), "run"), jobs(), ScalingConfig(num_workers=2))


@pytest.mark.parametrize(("seeds", "words"), [((5,), "one pair gives no interval"), ((5, 5), "must be different")])
def test_seeds_that_give_no_interval_are_refused(seeds: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ControlConfig(seeds=seeds)


def test_the_report_tells_the_difference_with_its_interval() -> None:
    run: Any = SimpleNamespace(config=None, pairs=pairs.compare_pairs(results(), SEEDS))
    (sentence,) = pair_sentences(run)
    assert "in 3 pairs" in sentence and "greedy ROUGE-L +2.00 (+2.00 to +2.00, ahead)" in sentence
    nothing: Any = SimpleNamespace(config=None, pairs={})
    assert pair_sentences(nothing) == []


def test_pairs_of_unequal_length_are_refused() -> None:
    tree = {
        "name": "pairs",
        "data": {
            "train": {"path": "samples://instructions"},
            "dev": {"path": "samples://instructions", "split": "dev"},
        },
        "teacher": {"path": "a"},
        "student": {"path": "b"},
        "control": {"seeds": [1, 2]},
        "curriculum": {"advance": "plateau"},
    }
    with pytest.raises(ValidationError, match=r"control\.seeds needs sides with equally many steps"):
        Config.model_validate(tree)
