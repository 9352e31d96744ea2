"""A training that runs next to another one: its step waits for it, and it ends with what it ran next to."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from pocl_ray.config import ScalingConfig
from pocl_ray.errors import DivergedError
from pocl_ray.ray_train import background
from pocl_ray.ray_train.background import Trainings
from pocl_ray.ray_train.driver import Watch
from pocl_ray.ray_train.progress import TrainingStatus


def task(name: str) -> Any:
    return SimpleNamespace(name=name, identity=(name, "fingerprint"), last_step=4)


CURRICULUM, CONTROL = task("distill"), task("control")


class Trainer:
    """In place of Ray Train: says when it begins, and ends once it may."""

    def __init__(self, **failures: BaseException) -> None:
        self.failures = failures
        self.began = {name: threading.Event() for name in ("distill", "control")}
        self.may_end = {name: threading.Event() for name in ("distill", "control")}
        self.ended: list[str] = []

    def __call__(self, task: Any, scaling: ScalingConfig, watch: Watch) -> TrainingStatus:
        self.began[task.name].set()
        try:
            while not self.may_end[task.name].wait(0.01):
                watch(TrainingStatus(num_starts=1, step=1))
            if task.name in self.failures:
                raise self.failures[task.name]
            return TrainingStatus(num_starts=1, step=4, num_tokens=len(task.name), seconds=2.5)
        finally:
            self.ended.append(task.name)


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    found = {"is": True}
    monkeypatch.setattr(background, "has_room_for_two", lambda scaling: found["is"])
    return found


def test_both_train_at_once_and_each_step_gets_its_own_counts() -> None:
    trainer = Trainer()
    trainer.may_end["distill"].set()
    trainings = Trainings(ScalingConfig(), trainer)
    assert trainings.run(CURRICULUM, CONTROL) == {"num_steps": 4, "num_tokens": len("distill"), "training_s": 2.5}
    assert trainer.began["control"].wait(10) and trainer.ended == ["distill"]
    trainer.may_end["control"].set()
    assert trainings.run(CONTROL) == {"num_steps": 4, "num_tokens": len("control"), "training_s": 2.5}
    assert trainer.ended == ["distill", "control"], "it was not trained again"


def test_without_room_for_both_one_follows_the_other(room: dict[str, bool]) -> None:
    room["is"] = False
    trainer = Trainer()
    trainer.may_end["distill"].set()
    trainings = Trainings(ScalingConfig(), trainer)
    trainings.run(CURRICULUM, CONTROL)
    assert not trainer.began["control"].is_set()
    trainer.may_end["control"].set()
    assert trainings.run(CONTROL)["num_tokens"] == len("control")


def test_a_failure_in_the_background_comes_with_its_own_step() -> None:
    trainer = Trainer(control=DivergedError("control: the loss is nan"))
    for may_end in trainer.may_end.values():
        may_end.set()
    trainings = Trainings(ScalingConfig(), trainer)
    assert trainings.run(CURRICULUM, CONTROL)["num_steps"] == 4
    with pytest.raises(DivergedError, match="control"):
        trainings.run(CONTROL)


def test_what_runs_behind_is_neither_lost_by_another_training_nor_left_at_the_end() -> None:
    trainer = Trainer()
    trainer.may_end["distill"].set()
    trainings = Trainings(ScalingConfig(), trainer)
    trainings.run(CURRICULUM, CONTROL)
    assert trainer.began["control"].wait(10)
    trainings.run(CURRICULUM)
    assert trainer.ended == ["distill", "distill"], "the control still runs"
    trainings.close()
    assert trainer.ended == ["distill", "distill", "control"]
    trainings.close()  # nothing is left to end


def test_a_failure_in_front_ends_what_runs_behind() -> None:
    trainer = Trainer(distill=DivergedError("distill: the loss is nan"))
    trainer.may_end["distill"].set()
    with pytest.raises(DivergedError, match="distill"):
        Trainings(ScalingConfig(), trainer).run(CURRICULUM, CONTROL)
    assert sorted(trainer.ended) == ["control", "distill"], "its watch has ended it, as an interruption would"


@pytest.mark.parametrize("interrupted", ["progress_bar", "show_on"])
def test_an_interruption_as_soon_as_the_wait_begins_ends_what_is_waited_for(
    interrupted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    trainer = Trainer()
    trainer.may_end["distill"].set()
    trainings = Trainings(ScalingConfig(), trainer)
    trainings.run(CURRICULUM, CONTROL)
    monkeypatch.setattr(background, interrupted, interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainings.run(CONTROL)
    assert trainer.ended == ["distill", "control"]
