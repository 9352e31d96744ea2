"""Training workers that hang are found, named and given to Ray Train as lost; the answers are made up, no cluster."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.train import WorkerGroupError

from pocl_ray.errors import GaveUpError, StalledError
from pocl_ray.heartbeat import ProcessStatus
from pocl_ray.ray_train import watch
from pocl_ray.ray_train.driver import _cause
from pocl_ray.ray_train.policies import cause_of
from pocl_ray.ray_train.progress import TrainingStatus
from pocl_ray.ray_train.watch import Silence, StallWatch, blame

ANSWER = object()


def process_status(
    age_s: float, waits: bool = False, doing: str = "training", place: str = "plugin.py:7, slow"
) -> ProcessStatus:
    return ProcessStatus(age_s, doing, place, waits, "node-7", 4242)


class Worker:
    """Answers with `says`; None never does, an exception is raised."""

    def __init__(self, says: ProcessStatus | Exception | None) -> None:
        self.says = says
        self.num_asked = 0

    def execute_async(self, _: Any) -> Worker:
        self.num_asked += 1
        return self


class Watched:
    """A StallWatch with a clock, workers and a progress actor of the test's own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *workers: Worker, timeout_s: float = 100.0) -> None:
        self.now, self.num_looks = 0.0, 0
        progress_actor = SimpleNamespace(controller_lives=SimpleNamespace(remote=self._controller_lives))
        self.watch = StallWatch(progress_actor, timeout_s, 30.0)
        self.watch._clock = lambda: self.now
        monkeypatch.setattr(watch, "ray", SimpleNamespace(wait=self._wait, get=self._get))
        self.watch.after_worker_group_start(SimpleNamespace(get_workers=lambda: list(workers)))

    def _controller_lives(self) -> None:
        self.num_looks += 1

    def _wait(self, asked: list[Worker], num_returns: int = 1, timeout: float = 0.0) -> tuple[list[Worker], list[Any]]:
        return [worker for worker in asked if worker.says is not None], []

    def _get(self, worker: Worker) -> ProcessStatus:
        if isinstance(worker.says, Exception):
            raise worker.says
        assert worker.says is not None
        return worker.says

    def poll(self, at: float, **errors: Exception) -> None:
        self.now = at
        found = {int(rank.removeprefix("rank")): error for rank, error in errors.items()}
        self.watch.after_worker_group_poll_status(SimpleNamespace(errors=found))  # type: ignore[arg-type]


def test_workers_that_get_on_are_left_alone_and_the_driver_hears_of_the_controller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watched = Watched(monkeypatch, Worker(process_status(2.0)), Worker(process_status(90.0)))
    for at in range(0, 1000, 5):
        watched.poll(float(at))
    assert watched.num_looks == 200


def test_one_worker_that_works_alone_while_others_wait_is_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, Worker(process_status(1.0)), Worker(process_status(5000.0, waits=True)))
    watched.poll(6.0)
    watched.poll(400.0)


def test_a_group_in_which_nothing_moves_is_a_failed_one_and_who_hangs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, Worker(process_status(140.0, waits=True)), Worker(process_status(150.0)))
    with pytest.raises(WorkerGroupError, match=r"since 140 s: rank 1 \(process 4242 on node-7\)") as raised:
        watched.poll(6.0)
    failures = raised.value.worker_failures
    assert {rank: type(error) for rank, error in failures.items()} == {0: StalledError, 1: StalledError}
    warning = cause_of(raised.value)
    assert "rank 0" not in warning
    assert "stands in plugin.py:7, slow" in warning
    assert "scaling.stall_timeout_s" in warning
    assert "\n" not in warning


def test_a_worker_that_answers_no_more_is_named_before_those_that_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = Worker(process_status(0.0))
    watched = Watched(monkeypatch, Worker(process_status(1.0)), stopped)
    watched.poll(6.0)
    stopped.says = None
    watched.watch._workers[0].says = process_status(101.0)
    with pytest.raises(WorkerGroupError, match=r"rank 1 \(process 4242 on node-7\) does not answer; it was training"):
        watched.poll(110.0)
    assert stopped.num_asked == 2  # one question is under way, not one a look


def test_a_single_worker_that_never_answers_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, Worker(None))
    watched.poll(99.0)
    with pytest.raises(WorkerGroupError, match="rank 0 never answered"):
        watched.poll(120.0)


def test_a_collective_that_failed_blames_the_worker_that_did_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, Worker(process_status(31.0, waits=True)), Worker(process_status(31.0)))
    gloo = RuntimeError("[unbound_buffer.cc:78] Timed out waiting 30000ms for recv operation to complete")
    with pytest.raises(WorkerGroupError, match=r"within 30 s: rank 1 .* raise scaling.collective_timeout_s"):
        watched.poll(31.0, rank0=gloo)


def test_other_errors_are_left_to_ray_train(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, Worker(process_status(1.0)), Worker(RayActorError()))
    watched.poll(6.0, rank1=RayActorError())


def test_a_new_group_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, Worker(None))
    watched.watch.before_worker_group_shutdown(None)
    watched.poll(5000.0)
    watched.watch.after_worker_group_start(SimpleNamespace(get_workers=lambda: [Worker(None)]))
    watched.poll(5099.0)


def test_after_too_many_hangs_the_user_reads_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, Worker(process_status(150.0)))
    with pytest.raises(WorkerGroupError) as raised:
        watched.poll(6.0)
    end = _cause(raised.value, "distill", TrainingStatus(failures=["nothing moves"] * 4))
    assert isinstance(end, GaveUpError)
    assert str(end).startswith(
        "distill: gave up after 4 tries, as scaling.max_failures says; the last time nothing moves"
    )
    assert "stands in plugin.py:7, slow" in str(end) and "raise scaling.stall_timeout_s" in str(end)


def test_all_are_named_where_all_wait_for_each_other() -> None:
    both = blame({0: process_status(1.0, waits=True), 1: process_status(1.0, waits=True)}, set())
    assert "rank 0" in both
    assert "rank 1" in both


def test_a_controller_of_which_nothing_is_heard_ends_the_run() -> None:
    now = SimpleNamespace(s=0.0)
    silence = Silence("distill", 100.0, lambda: now.s)
    for num_looks in range(5):
        now.s += 99.0
        silence.hear(num_looks)
    now.s += 101.0
    with pytest.raises(StalledError, match="distill: nothing is heard of its workers since 100 s"):
        silence.hear(4)
