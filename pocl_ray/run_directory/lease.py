"""The lease of a run directory: one run at a time writes there, and a second run is refused.

The holder renews `lease.json` from a thread. The age of that file, measured by the store's own clock, shows whether a
holder on another machine is alive. If the store gives no times, the file is watched for a renewal, timed by the
watcher's monotonic clock. The clocks of two machines are never compared. A holder on this machine is looked up among
its processes, so that the directory of a killed run is free at once.

No filesystem here has compare-and-swap. So a lease is taken by write, wait and read back: if two runs start within
`SETTLE_S`, the later writer gets the lease. A holder that was suspended and lost its lease notices that at the next
renewal.
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
"""The age of a lease, longer than `LEASE_S`, after which it is over without further watching."""

_held: set[str] = set()
"""The leases that this process holds."""


@dataclass(frozen=True)
class Holder:
    """The content of `lease.json`.

    Attributes:
        id: Id of this lease; a later run has another one.
        host: Name of the machine.
        machine: Id that distinguishes machines, reboots and process namespaces.
        pid: Id of the process.
        process_started_s: Start of the process, in seconds since the boot.
        taken_at: Time at which the lease was taken, for human readers.
        renewed_at: Seconds since 1970 by the holder's clock, for human readers; no decision uses it.
        num_renewals: Number of renewals.
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
        """Return a new holder for this process."""
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
        """Return whether the holder still runs; None if this machine cannot know."""
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
        """Release the run directory; a second call does nothing, and neither does a call when another run holds it."""
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
                continue  # the store may be unreachable for a while; try again, well within the lease
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
        run_dir: Run directory.
        say: Function that is called with the reason of a delay.

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
    """Return the error for a run that may not write."""
    return StorageError(
        f"{run_dir.uri}: another run writes there ({holder}); wait until it ends or stop it, or choose another name"
    )


def read_holder(run_dir: RunDirectory) -> Holder | None:
    """Return the holder of the run directory, or None."""
    try:
        content: Any = run_dir.read_json(FILE) if run_dir.exists(FILE) else None
    except StorageError:
        if run_dir.exists(FILE):
            raise
        return None  # it was released just now
    try:
        return None if content is None else Holder(**content)
    except TypeError:
        raise StorageError(
            f"{run_dir.uri_of(FILE)}: written by another version of pocl-ray; delete it if no run writes there"
        ) from None


def _is_over(run_dir: RunDirectory) -> bool:
    """Return whether the store has seen no renewal for so long that the lease is over."""
    age_s = age_in_store(run_dir, FILE)
    return age_s is not None and age_s > LEASE_S + MARGIN_S


def _renews(run_dir: RunDirectory, seen: Holder) -> bool:
    """Watch a lease for its full length, and return whether its holder or another one renewed it."""
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
        is_the_same = abs(started_after_boot_s(pid) - started) < 1.0  # a pid may be used again
        return is_the_same and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def machine() -> str:
    """Return an id of this machine, boot and process namespace, since others may have the same host name."""
    parts = [socket.gethostname()]
    boot = Path("/proc/sys/kernel/random/boot_id")
    if boot.exists():
        parts += [boot.read_text(encoding="ascii").strip(), os.readlink("/proc/self/ns/pid")]
    return "/".join(parts)


def age_in_store(run_dir: RunDirectory, rel: str) -> float | None:
    """Return the age of a file by the clock of the store alone.

    A new file is written and the store is asked for its time. No clock of a machine that runs pocl-ray is used.

    Args:
        run_dir: The run directory.
        rel: Path of the file, relative to the run directory.

    Returns:
        Age in seconds; None if the store gives no times, or if the file is gone.

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
    """Return the start of a local process in seconds since the boot, which no setting of the clock changes.

    Raises:
        psutil.NoSuchProcess: There is no such process.
    """
    stat = Path(f"/proc/{pid}/stat")
    if not Path("/proc/self/stat").exists():
        return psutil.Process(pid).create_time() - psutil.boot_time()
    try:
        after_name = stat.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None
    return int(after_name[19]) / os.sysconf("SC_CLK_TCK")
