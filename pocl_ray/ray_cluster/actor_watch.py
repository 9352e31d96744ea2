"""The watch over Ray Data's actors: an actor that hangs is killed, since Ray Data would wait for it for ever.

A thread in the process of each actor writes a heartbeat into the cluster's key-value store, and the driver reads it. An
actor is killed on its node if its heartbeat is too old, or if it writes none any more (a stopped process). Ray Data
then starts another actor and gives it the batch again. After too many such losses the next actor raises an error for
the user, which reaches the driver like any other error. Ray Data also replaces actors that die without limit. So the
actors that each task has lost are counted here, and a task that kills all its actors ends the job.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import psutil
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.markup import escape

from pocl_ray.config import ScalingConfig
from pocl_ray.console import console
from pocl_ray.errors import GaveUpError, StalledError
from pocl_ray.heartbeat import ProcessStatus, beat, process_status, rest
from pocl_ray.ray_cluster.internals import internal_kv, use_this_clusters_store
from pocl_ray.ray_cluster.startup import collect_again
from pocl_ray.run_directory.lease import started_after_boot_s

NAMESPACE = "pocl_ray"
HEARTBEAT, TRIES, VERDICT = "heartbeat/", "tries/", "verdict"
REMEDY = "if it was only slow, raise scaling.stall_timeout_s"
KILL_S = 60.0
PROGRESS_S = 2.0
"""The seconds after which an actor writes its heartbeat at the latest, which a progress bar is drawn from."""


@dataclass(frozen=True)
class Process:
    """A process of the cluster.

    Attributes:
        node: Ray's id of its node.
        pid: Id of the process on the node.
        started_s: Start of the process in seconds since the boot, because a pid may be used again.
    """

    node: str
    pid: int
    started_s: float

    @classmethod
    def here(cls) -> Process:
        """Return this process."""
        return cls(ray.get_runtime_context().get_node_id(), os.getpid(), started_after_boot_s(os.getpid()))


@dataclass
class _Heard:
    text: str
    at: float


@dataclass
class StallFinder:
    """Finds the processes that hang, from their heartbeats; times are measured by the reader's clock.

    Attributes:
        actor_timeout_s: Maximum time without progress.
        clock: Function that returns the time in seconds.
    """

    actor_timeout_s: float
    clock: Callable[[], float] = time.monotonic
    _heard: dict[str, _Heard] = field(default_factory=dict)

    def forget_silence(self) -> None:
        """Restart the wait for each process, because the reader itself could not read."""
        for heard in self._heard.values():
            heard.at = self.clock()

    def find(self, written: Mapping[str, str]) -> list[tuple[Process, str]]:
        """Return the processes that hang, each with a description; each is returned once.

        Args:
            written: Heartbeats by key, as `heartbeat_text` returns them.
        """
        found = []
        for key, text in written.items():
            heard = self._heard.setdefault(key, _Heard("", 0.0))
            if text != heard.text:
                heard.text, heard.at = text, self.clock()
            process, seen = _parsed(text)
            silent_s = self.clock() - heard.at
            if silent_s > self.actor_timeout_s:
                found.append((process, f"{seen} does not answer since {silent_s:.0f} s; it was {seen.doing}"))
            elif seen.age_s > self.actor_timeout_s:
                found.append((process, f"{seen}, {seen.doing}, stands in {seen.place} since {seen.age_s:.0f} s"))
        for process, _ in found:
            self._heard = {key: heard for key, heard in self._heard.items() if _parsed(heard.text)[0] != process}
        return found


def heartbeat_text(process: Process, seen: ProcessStatus, count: int) -> str:
    """Return the heartbeat of a process, which is different each time."""
    return json.dumps({"process": asdict(process), "status": asdict(seen), "count": count})


def _parsed(text: str) -> tuple[Process, ProcessStatus]:
    content = json.loads(text)
    return Process(**content["process"]), ProcessStatus(**content["status"])


@dataclass(frozen=True)
class Watch:
    """The watch over the actors of one job, which are of the classes that it returns.

    Attributes:
        prefix: Prefix of the keys that the actors write.
        period_s: Seconds between two heartbeats.
        begin: Function that is called with the id of each task.
    """

    prefix: str
    period_s: float
    begin: Callable[[str], None]

    def __call__(self, actor: type) -> type:
        """Return the watched class of an actor's class."""
        return watched(actor, self.prefix, min(self.period_s, PROGRESS_S), self.begin)

    def num_done(self) -> int:
        """Return how many rows the living actors have got through; those of an actor that died are not counted."""
        return sum(_parsed(text)[1].num_done for text in _read(self.prefix).values())


@contextmanager
def stall_watch(scaling: ScalingConfig, what: str) -> Iterator[Watch]:
    """Watch the actors of a Ray Data job while the block runs.

    Args:
        scaling: Config with the maximum time without progress, and the number of kills before the job is given up.
        what: Description of the job, for the user.

    Yields:
        A function from an actor's class to a watched class, which also counts what they have done.
    """
    use_this_clusters_store()
    prefix = f"{uuid.uuid4().hex}/"
    period_s = min(30.0, max(0.5, scaling.stall_timeout_s / 10))
    over = threading.Event()
    keeper = threading.Thread(target=_keep, args=(prefix, scaling, what, period_s, over), name="stalls", daemon=True)
    keeper.start()
    try:
        yield Watch(prefix, period_s, partial(begin_task, prefix, what, scaling))
    finally:
        over.set()
        keeper.join(KILL_S)
        with suppress(RayError):
            internal_kv._internal_kv_del(prefix, del_by_prefix=True, namespace=NAMESPACE)


def watched(actor: type, prefix: str, period_s: float, begin: Callable[[str], None]) -> type:
    """Return a subclass of an actor's class, with the same name, that writes heartbeats.

    Args:
        actor: Class for `map_batches` whose `__call__` yields.
        prefix: Prefix of the keys that are written.
        period_s: Seconds between two heartbeats.
        begin: Function that is called with the id of each task.
    """

    class WatchedActor(actor):  # type: ignore[misc, valid-type]
        _is_new, _task = True, ""

        def __init__(self, *arguments: Any, **named: Any) -> None:
            collect_again()  # the module of the actor is imported by now
            super().__init__(*arguments, **named)

        def __call__(self, batch: Any) -> Iterator[Any]:
            if self._is_new:
                self._is_new = False
                _raise_verdict(prefix)
                threading.Thread(target=_write, args=(prefix, period_s), name="heartbeat", daemon=True).start()
            task = ray.get_runtime_context().get_task_id() or ""
            if task != self._task:
                begin(task)
                self._task = task
            beat("starting a batch")
            try:
                for given in super().__call__(batch):
                    rest()  # the output may wait for a long time until it is taken
                    yield given
                    beat("going on with a batch")
            finally:
                rest()

    WatchedActor.__name__ = WatchedActor.__qualname__ = actor.__name__  # the name that Ray shows
    return WatchedActor


def begin_task(prefix: str, what: str, scaling: ScalingConfig, task: str) -> None:
    """Record that this process begins a task.

    Ray's own count of retries is not enough: until a lost node is known as lost, each retry fails at once.

    Raises:
        GaveUpError: The task has lost as many actors as are allowed.
    """
    key = f"{prefix}{TRIES}{task}"
    before = json.loads(internal_kv._internal_kv_get(key, namespace=NAMESPACE) or "[]")
    if len(before) > scaling.max_failures:
        raise GaveUpError(
            f"{what}: gave up, since a task lost its actor {len(before)} times, more than scaling.max_failures allows: "
            f"{', '.join(before)}; out of memory, perhaps; the same command does the step again"
        )
    here = f"process {os.getpid()} on {socket.gethostname()}"
    internal_kv._internal_kv_put(key, json.dumps([*before, here]), namespace=NAMESPACE)


def _raise_verdict(prefix: str) -> None:
    verdict = internal_kv._internal_kv_get(prefix + VERDICT, namespace=NAMESPACE)
    if verdict is not None:
        raise StalledError(verdict.decode())


def _write(prefix: str, period_s: float) -> None:
    """Write heartbeats for as long as this process lives."""
    process, count = Process.here(), 0
    while True:
        with suppress(Exception):  # the store may be unreachable for a while, and the thread must survive that
            text = heartbeat_text(process, process_status(), count)
            internal_kv._internal_kv_put(f"{prefix}{HEARTBEAT}{process.node}-{process.pid}", text, namespace=NAMESPACE)
        count += 1
        time.sleep(period_s)


def _keep(prefix: str, scaling: ScalingConfig, what: str, period_s: float, over: threading.Event) -> None:
    """Read the heartbeats, kill processes that hang, and give up after too many."""
    finder, num_killed = StallFinder(scaling.stall_timeout_s), 0
    while not over.wait(period_s):
        try:
            found = finder.find(_read(prefix))
        except Exception:  # Ray has no error class of its own for a store that is unreachable
            finder.forget_silence()
            continue
        for process, text in found:
            if not _kill(prefix, process):
                continue
            num_killed += 1
            console.print(f"[yellow]warning:[/] {escape(f'{what}: {text}')}; killed, its batch is done again; {REMEDY}")
            if num_killed > scaling.max_failures:
                verdict = f"{what}: {num_killed} actors hung, more than scaling.max_failures; {text}; {REMEDY}"
                internal_kv._internal_kv_put(prefix + VERDICT, verdict, namespace=NAMESPACE)


def _read(prefix: str) -> dict[str, str]:
    keys = [key.decode() for key in internal_kv._internal_kv_list(prefix + HEARTBEAT, namespace=NAMESPACE)]
    values = {key: internal_kv._internal_kv_get(key, namespace=NAMESPACE) for key in keys}
    return {key: value.decode() for key, value in values.items() if value is not None}


def _kill(prefix: str, process: Process) -> bool:
    """Kill a process on its node, remove its heartbeat, and return whether it was still alive."""
    internal_kv._internal_kv_del(f"{prefix}{HEARTBEAT}{process.node}-{process.pid}", namespace=NAMESPACE)
    there = NodeAffinitySchedulingStrategy(process.node, soft=False)
    try:
        killer = ray.remote(num_cpus=0)(kill_here).options(scheduling_strategy=there)
        return bool(ray.get(killer.remote(process.pid, process.started_s), timeout=KILL_S))
    except RayError:
        return False  # the node is gone, and so is the process


def kill_here(pid: int, started_s: float) -> bool:
    """End a process of this machine, even a stopped one, and return whether it was still alive."""
    try:
        process = psutil.Process(pid)
        lives = process.status() != psutil.STATUS_ZOMBIE and abs(started_after_boot_s(pid) - started_s) < 1.0
        if lives:
            process.kill()
    except psutil.NoSuchProcess:
        return False
    return lives
