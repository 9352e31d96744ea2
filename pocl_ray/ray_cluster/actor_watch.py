"""The watch over Ray Data's actors, which Ray Data itself waits for without end: one that hangs is killed.

Each actor's process writes its pulse into the cluster's key-value store from a thread of its own; the driver reads
them. An actor whose pulse is too old, or who writes no more (a stopped process), is killed on its node; Ray Data then
starts another one and gives it the batch again, as after any loss. When that has happened too often, the next actor
raises what the user is to know, which travels to the driver like any mistake. What dies by itself Ray Data replaces
without end as well; here each task's actors are counted, so that one that kills all of them ends the job.
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
from ray.experimental import internal_kv
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.markup import escape

from pocl_ray.config import ScalingConfig
from pocl_ray.console import console
from pocl_ray.errors import GaveUpError, StalledError
from pocl_ray.heartbeat import ProcessStatus, beat, process_status, rest
from pocl_ray.run_directory.lease import started_after_boot_s

NAMESPACE = "pocl_ray"
PULSE, TRIES, VERDICT = "pulse/", "tries/", "verdict"
REMEDY = "if it was only slow, raise scaling.stall_timeout_s"
KILL_S = 60.0
Watched = Callable[[type], type]


@dataclass(frozen=True)
class Process:
    """A process of the cluster.

    Attributes:
        node: Ray's id of its node.
        pid: Its number there.
        started_s: When it started, in seconds since the boot; a number may be given again.
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
    """Finds the processes that stand still in what they wrote; time is the reader's own.

    Attributes:
        actor_timeout_s: Nobody may take longer to get on.
        clock: Seconds.
    """

    actor_timeout_s: float
    clock: Callable[[], float] = time.monotonic
    _heard: dict[str, _Heard] = field(default_factory=dict)

    def forget_silence(self) -> None:
        """Begin anew to wait for each: the reader itself could not hear."""
        for heard in self._heard.values():
            heard.at = self.clock()

    def find(self, written: Mapping[str, str]) -> list[tuple[Process, str]]:
        """Return the processes that stand still, each with what is said of it; each is returned once.

        Args:
            written: By key, what `heartbeat_text` gave.
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
    """Return what a process writes of itself, different each time."""
    return json.dumps({"process": asdict(process), "vital": asdict(seen), "count": count})


def _parsed(text: str) -> tuple[Process, ProcessStatus]:
    content = json.loads(text)
    return Process(**content["process"]), ProcessStatus(**content["vital"])


@contextmanager
def stall_watch(scaling: ScalingConfig, what: str) -> Iterator[Watched]:
    """Watch the actors of a Ray Data job while the block runs.

    Args:
        scaling: How long an actor may stand still, and how many are killed before the job is given up.
        what: Is being done, for the user.

    Yields:
        A function that makes an actor's class a watched one.
    """
    # Where several clusters are known to a process, Ray's key-value functions may know another one, or none.
    internal_kv._initialize_internal_kv(ray._private.worker.global_worker.gcs_client)  # type: ignore[attr-defined]
    prefix = f"{uuid.uuid4().hex}/"
    period_s = min(30.0, max(0.5, scaling.stall_timeout_s / 10))
    over = threading.Event()
    keeper = threading.Thread(target=_keep, args=(prefix, scaling, what, period_s, over), name="stalls", daemon=True)
    keeper.start()
    try:
        yield partial(watched, prefix=prefix, period_s=period_s, begin=partial(begin_task, prefix, what, scaling))
    finally:
        over.set()
        keeper.join(KILL_S)
        with suppress(RayError):
            internal_kv._internal_kv_del(prefix, del_by_prefix=True, namespace=NAMESPACE)


def watched(actor: type, prefix: str, period_s: float, begin: Callable[[str], None]) -> type:
    """Return the class of an actor that writes its pulse, under the name of the original.

    Args:
        actor: A class for `map_batches` whose `__call__` yields.
        prefix: Of the keys that are written.
        period_s: How often.
        begin: Called with the id of each task.
    """

    class WatchedActor(actor):  # type: ignore[misc, valid-type]
        _is_new, _task = True, ""

        def __call__(self, batch: Any) -> Iterator[Any]:
            if self._is_new:
                self._is_new = False
                _raise_verdict(prefix)
                threading.Thread(target=_write, args=(prefix, period_s), name="pulse", daemon=True).start()
            task = ray.get_runtime_context().get_task_id() or ""
            if task != self._task:
                begin(task)
                self._task = task
            beat("starting a batch")
            try:
                for given in super().__call__(batch):
                    rest()  # it may wait long until somebody takes it
                    yield given
                    beat("going on with a batch")
            finally:
                rest()

    WatchedActor.__name__ = WatchedActor.__qualname__ = actor.__name__  # Ray shows it
    return WatchedActor


def begin_task(prefix: str, what: str, scaling: ScalingConfig, task: str) -> None:
    """Note which process begins a task.

    Ray's own count of retries would not do: while a lost node is not known as lost, each of them fails at once.

    Raises:
        GaveUpError: As many as may have lost their lives over it.
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
    """Write the pulse of this process for as long as it lives."""
    process, count = Process.here(), 0
    while True:
        with suppress(Exception):  # the store may be away for a while, and the thread must outlast that
            text = heartbeat_text(process, process_status(), count)
            internal_kv._internal_kv_put(f"{prefix}{PULSE}{process.node}-{process.pid}", text, namespace=NAMESPACE)
        count += 1
        time.sleep(period_s)


def _keep(prefix: str, scaling: ScalingConfig, what: str, period_s: float, over: threading.Event) -> None:
    """Read the pulses, kill what stands still, and give up after too many."""
    finder, num_killed = StallFinder(scaling.stall_timeout_s), 0
    while not over.wait(period_s):
        try:
            found = finder.find(_read(prefix))
        except Exception:  # Ray's errors of a store that is away have no class of their own
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
    keys = [key.decode() for key in internal_kv._internal_kv_list(prefix + PULSE, namespace=NAMESPACE)]
    values = {key: internal_kv._internal_kv_get(key, namespace=NAMESPACE) for key in keys}
    return {key: value.decode() for key, value in values.items() if value is not None}


def _kill(prefix: str, process: Process) -> bool:
    """Kill a process on its node, and forget it; whether it still lived."""
    internal_kv._internal_kv_del(f"{prefix}{PULSE}{process.node}-{process.pid}", namespace=NAMESPACE)
    there = NodeAffinitySchedulingStrategy(process.node, soft=False)
    try:
        killer = ray.remote(num_cpus=0)(kill_here).options(scheduling_strategy=there)
        return bool(ray.get(killer.remote(process.pid, process.started_s), timeout=KILL_S))
    except RayError:
        return False  # the node is gone, and the process with it


def kill_here(pid: int, started_s: float) -> bool:
    """End a process of this machine, a stopped one too; whether it still lived."""
    try:
        process = psutil.Process(pid)
        lives = process.status() != psutil.STATUS_ZOMBIE and abs(started_after_boot_s(pid) - started_s) < 1.0
        if lives:
            process.kill()
    except psutil.NoSuchProcess:
        return False
    return lives
