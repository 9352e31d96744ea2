"""The lease of a run directory: one run at a time writes there, and a second one is refused.

The holder renews `lease.json` from a thread. Whether a holder on another machine lives is judged by the age of that
file, which the store measures with its own clock, and else by watching whether it is renewed, timed by the watcher's
monotonic clock; the clocks of two machines are never compared. A holder on this machine is looked up among its
processes, so that a run that was killed is taken over at once.

No filesystem here offers compare-and-swap, so taking is write, wait, read back: of two that start within
`SETTLE_S`, the later writer stays. A holder that was stopped for long and taken over notices when it renews.
"""

from __future__ import annotations

import _thread
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from pocl_ray.errors import StorageError
from pocl_ray.run_directory.storage import RunDirectory

FILE = "lease.json"
LEASE_S = 60.0
RENEW_S = 15.0
SETTLE_S = 0.5
POLL_S = 1.0
MARGIN_S = 60.0
"""More than `LEASE_S` without a renewal that a store must have seen before nobody watches any more."""

_held: set[str] = set()
"""Leases that this process holds."""


@dataclass(frozen=True)
class Holder:
    """What `lease.json` says.

    Attributes:
        id: Of this lease; a later run has another one.
        host: Name of the machine.
        machine: Tells machines, reboots and process namespaces apart.
        pid: The process.
        process_started_s: When it started, in seconds since the boot.
        taken_at: When the lease was taken, for the reader.
        renewed_at: Seconds since 1970 by the holder's clock; for the reader, nothing is decided by it.
        num_renewals: Rises with every renewal.
    """

    id: str
    host: str
    machine: str
    pid: int
    process_started_s: float
    taken_at: str
    renewed_at: float
    num_renewals: int = 0

    @classmethod
    def here(cls) -> Holder:
        """Return a new holder: this process."""
        return cls(
            id=uuid.uuid4().hex,
            host=socket.gethostname(),
            machine=machine(),
            pid=os.getpid(),
            process_started_s=started_after_boot_s(os.getpid()),
            taken_at=datetime.now(UTC).isoformat(timespec="seconds"),
            renewed_at=time.time(),
        )

    def lives(self) -> bool | None:
        """Whether the holder still runs; None where that cannot be told from here."""
        if self.machine == machine():
            if self.pid == os.getpid():
                return self.id in _held
            return _runs(self.pid, self.process_started_s)
        return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.taken_at}"


class Lease:
    """A lease that this process holds, renewed until it is released or the process ends."""

    def __init__(self, run_dir: RunDirectory, holder: Holder) -> None:
        """Start renewing a lease that `take` has won."""
        self.run_dir, self.holder = run_dir, holder
        self.lost_to: Holder | None = None
        self._interrupts = threading.current_thread() is threading.main_thread()
        self._released = threading.Event()
        _held.add(holder.id)
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the run directory back; nothing happens the second time, or when another run holds it now."""
        if self._released.is_set():
            return
        self._released.set()
        _held.discard(self.holder.id)
        self._thread.join(timeout=RENEW_S)
        present = read_holder(self.run_dir)
        if present is not None and present.id == self.holder.id:
            self.run_dir.delete(FILE)

    def _keep(self) -> None:
        while not self._released.wait(RENEW_S):
            try:
                self._renew()
            except StorageError:
                continue  # the store may be away for a while; it is tried again, well within the lease
            if self.lost_to is not None:
                _held.discard(self.holder.id)
                if self._interrupts:
                    _thread.interrupt_main()
                return

    def _renew(self) -> None:
        present = read_holder(self.run_dir)
        if present is not None and present.id != self.holder.id:
            self.lost_to = present
        elif not self._released.is_set():
            self.holder = Holder(
                **{**asdict(self.holder), "renewed_at": time.time(), "num_renewals": self.holder.num_renewals + 1}
            )
            self.run_dir.write_json(FILE, asdict(self.holder))


def take(run_dir: RunDirectory, say: Callable[[str], None]) -> Lease:
    """Take the lease of a run directory.

    Args:
        run_dir: The run directory.
        say: Is told why it takes a while, when it does.

    Raises:
        StorageError: Another run holds it.
    """
    present = read_holder(run_dir)
    if present is not None:
        lives = present.lives()
        if lives is None and _is_over(run_dir):
            lives = False
        if lives is None:
            say(f"{run_dir.uri} was in use by {present}; waiting {LEASE_S:.0f} s at most to see whether it still is")
            lives = _renews(run_dir, present)
        if lives:
            raise refusal(run_dir, present)
    mine = Holder.here()
    run_dir.write_json(FILE, asdict(mine))
    time.sleep(SETTLE_S)
    winner = read_holder(run_dir)
    if winner is not None and winner.id != mine.id:
        raise refusal(run_dir, winner)
    return Lease(run_dir, mine)


def refusal(run_dir: RunDirectory, holder: Holder) -> StorageError:
    """Return what a run is told that may not write."""
    return StorageError(
        f"{run_dir.uri}: another run writes there ({holder}); wait until it ends or stop it, or choose another name"
    )


def read_holder(run_dir: RunDirectory) -> Holder | None:
    """Return who holds the run directory, or None."""
    try:
        content: Any = run_dir.read_json(FILE) if run_dir.exists(FILE) else None
    except StorageError:
        if run_dir.exists(FILE):
            raise
        return None  # released in this moment
    try:
        return None if content is None else Holder(**content)
    except TypeError:
        raise StorageError(
            f"{run_dir.uri_of(FILE)}: written by another version of pocl-ray; delete it if no run writes there"
        ) from None


def _is_over(run_dir: RunDirectory) -> bool:
    """Whether the store has seen no renewal for so long that there is nothing to watch."""
    age_s = age_in_store(run_dir, FILE)
    return age_s is not None and age_s > LEASE_S + MARGIN_S


def _renews(run_dir: RunDirectory, seen: Holder) -> bool:
    """Watch a lease for as long as one lasts; whether its holder, or another one, renewed it."""
    deadline = time.monotonic() + LEASE_S
    while time.monotonic() < deadline:
        time.sleep(POLL_S)
        present = read_holder(run_dir)
        if present is None:
            return False
        if present != seen:
            return True
    return False


def _runs(pid: int, started: float) -> bool:
    try:
        is_the_same = abs(started_after_boot_s(pid) - started) < 1.0  # a pid may be given again
        return is_the_same and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def machine() -> str:
    """Return what tells this machine, boot and process namespace from others with the same host name."""
    parts = [socket.gethostname()]
    boot = Path("/proc/sys/kernel/random/boot_id")
    if boot.exists():
        parts += [boot.read_text(encoding="ascii").strip(), os.readlink("/proc/self/ns/pid")]
    return "/".join(parts)


def age_in_store(run_dir: RunDirectory, rel: str) -> float | None:
    """Return how long ago a file was written, by the clock of the store alone.

    The store is asked for the time of a file that is written now; no clock of a machine that runs pocl-ray is read.

    Args:
        run_dir: The run directory.
        rel: The file, relative to it.

    Returns:
        Seconds; None where the store tells no times, or the file is gone.

    Raises:
        StorageError: The store does not answer.
    """
    written = run_dir.written_at(rel)
    if written is None:
        return None
    probe = f".clock-{uuid.uuid4().hex}"
    run_dir.write_bytes(probe, b"now")
    try:
        now = run_dir.written_at(probe)
    finally:
        run_dir.delete(probe)
    return None if now is None else now - written


def started_after_boot_s(pid: int) -> float:
    """Return when a process of this machine started, in seconds since the boot: no setting of the clock changes it.

    Raises:
        psutil.NoSuchProcess: There is none.
    """
    stat = Path(f"/proc/{pid}/stat")
    if not Path("/proc/self/stat").exists():
        return psutil.Process(pid).create_time() - psutil.boot_time()
    try:
        after_name = stat.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None
    return int(after_name[19]) / os.sysconf("SC_CLK_TCK")
