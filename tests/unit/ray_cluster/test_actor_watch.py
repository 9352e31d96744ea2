"""Ray Data's actors that hang are found by what they write, timed by the reader's own clock; no cluster."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import cloudpickle
import psutil
import pytest
import ray

from pocl_ray.config import ScalingConfig
from pocl_ray.errors import GaveUpError
from pocl_ray.heartbeat import ProcessStatus, process_status
from pocl_ray.ray_cluster import actor_watch
from pocl_ray.ray_cluster.actor_watch import Process, StallFinder, begin_task, heartbeat_text, kill_here, watched
from pocl_ray.run_directory.lease import started_after_boot_s

HERE = Process("node", 4242, 1000.0)


def text(age_s: float, count: int) -> str:
    return heartbeat_text(
        HERE, ProcessStatus(age_s, "scoring rows", "signals.py:9, slow", False, "node-7", 4242), count
    )


def finder() -> tuple[StallFinder, SimpleNamespace]:
    now = SimpleNamespace(s=0.0)
    return StallFinder(100.0, lambda: now.s), now


def test_an_actor_that_writes_and_gets_on_or_has_nothing_to_do_is_left_alone() -> None:
    found, now = finder()
    for count in range(50):
        now.s += 90.0
        assert found.find({"a": text(0.0, count)}) == []


def test_an_actor_that_stands_still_in_its_code_is_found_with_the_place() -> None:
    found, _ = finder()
    ((process, said),) = found.find({"a": text(120.0, 0)})
    assert process == HERE
    assert said == "process 4242 on node-7, scoring rows, stands in signals.py:9, slow since 120 s"


def test_an_actor_that_writes_no_more_is_found_whatever_it_wrote_last() -> None:
    found, now = finder()
    found.find({"a": text(0.0, 0)})
    now.s = 101.0
    ((process, said),) = found.find({"a": text(0.0, 0)})
    assert process == HERE
    assert "does not answer since 101 s; it was scoring rows" in said


def test_silence_does_not_count_while_the_reader_could_not_hear() -> None:
    found, now = finder()
    found.find({"a": text(0.0, 0)})
    now.s = 500.0
    found.forget_silence()
    assert found.find({"a": text(0.0, 0)}) == []


def test_a_stopped_process_is_killed_once_and_a_number_given_again_is_another_process() -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    process = psutil.Process(sleeper.pid)
    started = started_after_boot_s(sleeper.pid)
    process.suspend()
    assert not kill_here(sleeper.pid, started - 100.0)
    assert process.is_running()
    assert kill_here(sleeper.pid, started)
    sleeper.wait(timeout=30)
    assert not kill_here(sleeper.pid, started)


class Doubler:
    """An actor as the jobs have them."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, batch: list[int]):  # type: ignore[no-untyped-def]
        for number in batch:
            yield number * self.factor


def test_a_watched_actor_gives_what_the_plain_one_gives_under_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    made = cloudpickle.loads(cloudpickle.dumps(watched(Doubler, "prefix/", 1.0, list)))
    assert made.__name__ == "Doubler"
    actor = made(2)
    actor._is_new = False  # no cluster to write to
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_task_id=lambda: "task"))
    given = actor([1, 2])
    assert next(given) == 2
    assert (process_status().age_s, process_status().doing) == (0.0, "starting a batch"), (
        "it waits for who takes it, which is no hang"
    )
    assert list(given) == [4]
    assert process_status().doing == "going on with a batch"


def test_a_task_that_kills_its_actors_is_begun_so_often_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, str] = {}
    store = SimpleNamespace(
        _internal_kv_get=lambda key, namespace: kept.get(key, "").encode() or None,
        _internal_kv_put=lambda key, value, namespace: kept.update({key: value}),
    )
    monkeypatch.setattr(actor_watch, "internal_kv", store)
    scaling = ScalingConfig(max_failures=2)
    for _ in range(3):
        begin_task("job/", "scores", scaling, "task")
    begin_task("job/", "scores", scaling, "another")
    with pytest.raises(GaveUpError, match=r"a task lost its actor 3 times, more than scaling\.max_failures.*process"):
        begin_task("job/", "scores", scaling, "task")


def test_the_work_of_all_actors_is_counted_from_their_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = {
        name: ProcessStatus(0.0, "scoring rows", "x", False, "node", 1, done) for name, done in (("a", 5), ("b", 7))
    }
    written = {name: heartbeat_text(HERE, status, 0) for name, status in statuses.items()}
    monkeypatch.setattr(actor_watch, "_read", lambda prefix: written if prefix == "job/" else {})
    assert actor_watch.Watch("job/", 30.0, list).num_done() == 12
    assert actor_watch.Watch("other/", 30.0, list).num_done() == 0
