"""One run at a time writes a run directory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from pocl_ray.errors import StorageError
from pocl_ray.run_directory import lease
from pocl_ray.run_directory.lease import FILE, Holder, read_holder, started_after_boot_s, take
from pocl_ray.run_directory.storage import RunDirectory


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same lease, a hundred times as fast."""
    for name, seconds in {"LEASE_S": 1.0, "MARGIN_S": 1.0, "RENEW_S": 0.1, "SETTLE_S": 0.05, "POLL_S": 0.05}.items():
        monkeypatch.setattr(lease, name, seconds)


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDirectory:
    return RunDirectory.open(str(tmp_path), "run")


def elsewhere(**changes: object) -> Holder:
    """A holder on another machine."""
    return replace(Holder.here(), machine="another", host="node-7", pid=4242, **changes)  # type: ignore[arg-type]


def write(run_dir: RunDirectory, holder: Holder) -> None:
    run_dir.write_json(FILE, asdict(holder))


def test_a_second_run_is_refused_and_told_by_whom(run_dir: RunDirectory) -> None:
    held = take(run_dir, print)
    with pytest.raises(StorageError, match="another run writes there"):
        take(run_dir, print)
    held.release()
    take(run_dir, print).release()
    assert not run_dir.exists(FILE)


def test_a_run_in_another_process_of_this_machine_is_refused_at_once(run_dir: RunDirectory) -> None:
    code = (
        "import sys, time; from pocl_ray.run_directory.lease import take\n"
        "from pocl_ray.run_directory.storage import RunDirectory\n"
        "take(RunDirectory(sys.argv[1]), print); print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, run_dir.uri]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(StorageError, match=f"process {other.pid} on "):
            take(run_dir, pytest.fail)
        other.kill()
        other.wait()
        take(run_dir, pytest.fail).release()  # a killed run does not hold its restart up: nobody is told to wait


def test_a_holder_elsewhere_that_renews_is_refused_whatever_its_clock_says(
    run_dir: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 60.0)  # a renewal may come late on a machine under load
    for skew in (-3600.0, -250.0, 3600.0):
        present = elsewhere(renewed_at=time.time() + skew)
        write(run_dir, present)
        renewal = threading.Timer(0.3, write, (run_dir, replace(present, num_renewals=1)))
        renewal.start()
        with pytest.raises(StorageError, match="process 4242 on node-7"):
            take(run_dir, lambda _: None)
        renewal.join()


def test_a_holder_elsewhere_that_stopped_renewing_is_taken_over_after_a_wait_that_is_announced(
    run_dir: RunDirectory,
) -> None:
    write(run_dir, elsewhere())
    said: list[str] = []
    start = time.monotonic()
    take(run_dir, said.append).release()
    assert time.monotonic() - start >= lease.LEASE_S
    assert "node-7" in said[0]
    assert "waiting" in said[0]


@pytest.mark.parametrize("skew", [-3600.0, 0.0, 3600.0])
def test_a_lease_of_yesterday_is_taken_over_at_once_whatever_the_clocks_say(
    run_dir: RunDirectory, monkeypatch: pytest.MonkeyPatch, skew: float
) -> None:
    write(run_dir, elsewhere(renewed_at=time.time() + skew))
    yesterday = time.time() - 86400
    os.utime(run_dir.local(FILE), (yesterday, yesterday))  # by the clock of the store
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() - 2 * skew)
    take(run_dir, pytest.fail).release()
    assert not any(Path(run_dir.uri).iterdir())


@pytest.mark.parametrize("skew", [-3600.0, 3600.0])
def test_a_fresh_lease_of_a_dead_holder_costs_one_wait_whatever_the_clocks_say(
    run_dir: RunDirectory, monkeypatch: pytest.MonkeyPatch, skew: float
) -> None:
    write(run_dir, elsewhere(renewed_at=time.time() + skew))
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() - 2 * skew)
    start = time.monotonic()
    take(run_dir, lambda _: None).release()
    assert lease.LEASE_S <= time.monotonic() - start < 30.0


def test_a_store_that_tells_no_times_has_its_leases_watched(
    run_dir: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(run_dir, elsewhere(renewed_at=0.0))
    monkeypatch.setattr(RunDirectory, "written_at", lambda *_: None)
    said: list[str] = []
    take(run_dir, said.append).release()
    assert "waiting" in said[0]


def test_a_clock_that_is_set_does_not_make_a_running_process_look_dead(
    run_dir: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = psutil.Process.create_time
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as other:
        started = started_after_boot_s(other.pid)
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: plain(self) + 3600.0)
        write(run_dir, replace(Holder.here(), id="another", pid=other.pid, process_started_s=started))
        with pytest.raises(StorageError, match=f"process {other.pid} on "):
            take(run_dir, pytest.fail)
        other.kill()


def test_of_two_that_start_together_one_goes_on(run_dir: RunDirectory) -> None:
    won, refused = [], []
    barrier = threading.Barrier(2)

    def start() -> None:
        barrier.wait()
        try:
            won.append(take(run_dir, print))
        except StorageError as error:
            refused.append(error)

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 1)
    won[0].release()


def test_a_run_that_was_taken_over_learns_of_it_and_leaves_the_lease_alone(run_dir: RunDirectory) -> None:
    held = take(run_dir, print)
    held._interrupts = False
    deadline = time.monotonic() + 60
    while held.lost_to is None and time.monotonic() < deadline:
        write(run_dir, elsewhere(id="later"))  # again and again: a renewal under way may write over it
        time.sleep(0.15)
    assert held.lost_to is not None
    assert held.lost_to.id == "later"
    held.release()
    present = read_holder(run_dir)
    assert present is not None
    assert present.id == "later"


def test_a_lease_is_renewed_while_it_is_held(run_dir: RunDirectory) -> None:
    held = take(run_dir, print)
    deadline = time.monotonic() + 60
    while held.holder.num_renewals < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    held.release()
    assert held.holder.num_renewals >= 2


def test_a_lease_on_an_object_store_holds_as_well(s3_bucket: str) -> None:
    run_dir = RunDirectory.open(f"{s3_bucket}/runs", "run")
    held = take(run_dir, print)
    with pytest.raises(StorageError, match="another run writes there"):
        take(run_dir, print)
    held.release()
    assert not run_dir.exists(FILE)
