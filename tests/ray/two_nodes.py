"""Two Ray nodes on this machine, started with `ray start` as a user does, and ended process by process."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

START_S = 240.0


@dataclass(frozen=True)
class TwoNodes:
    """A cluster of two nodes with two logical CPUs each, which asks for a token.

    Attributes:
        address: Address of the dashboard.
        gcs_address: Address of the cluster itself, for `RAY_ADDRESS`.
        env: The environment of those who know the token.
    """

    address: str
    gcs_address: str
    env: Mapping[str, str]

    def dashboard(self, path: str) -> str:
        """Return what the dashboard answers to one who knows the token."""
        headers = {"Authorization": f"Bearer {self.env['RAY_AUTH_TOKEN']}"}
        with urllib.request.urlopen(
            urllib.request.Request(f"{self.address}/{path}", headers=headers), timeout=60
        ) as it:
            return str(it.read().decode())


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """Start the cluster, and end exactly its processes."""
    gcs, dashboard, agent, client = free_ports(4)
    token = secrets.token_hex(32)
    bin_dir = str(Path(sys.executable).parent)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env = {
        **inherited,
        "PATH": f"{bin_dir}:{inherited['PATH']}",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_worker_niceness": "0",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": str(int(START_S)),
    }
    # The paths of Unix sockets are limited to 107 characters, which a test's own directory would use up.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as scratch:
        common = ["--num-cpus=2", "--object-store-memory=100000000", "--node-ip-address=127.0.0.1", "--block"]
        head = [
            "--head",
            f"--port={gcs}",
            f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={agent}",
            f"--ray-client-server-port={client}",
            f"--temp-dir={scratch}",
        ]
        other = [f"--address=127.0.0.1:{gcs}", "--dashboard-agent-listen-port=0"]
        address = f"http://127.0.0.1:{dashboard}"
        started: list[subprocess.Popen[bytes]] = []
        try:
            for options in (head, other):
                started.append(ray_start([*options, *common], env, Path(scratch) / f"node{len(started)}.log"))
                _wait_for_port(gcs, started)  # the other starts while the head's dashboard does
            _wait_for_nodes(address, token, len(started), started)
            yield TwoNodes(address, f"127.0.0.1:{gcs}", env)
        finally:
            for process in reversed(started):
                end(process)


def ray_start(options: list[str], env: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Run `ray start` with these options."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options]
    with log.open("wb") as output:
        return subprocess.Popen(command, env=dict(env), stdout=output, stderr=output, start_new_session=True)


def _wait_for_port(port: int, started: list[subprocess.Popen[bytes]]) -> None:
    """Wait until a process listens on a port."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert all(process.poll() is None for process in started), "`ray start` ended"
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=10).close()
            return
        time.sleep(0.1)
    raise AssertionError(f"nothing listens on port {port} after {START_S:.0f} s")


def _wait_for_nodes(address: str, token: str, count: int, started: list[subprocess.Popen[bytes]]) -> None:
    """Wait until the dashboard counts so many nodes alive."""
    url = f"{address}/nodes?view=summary"
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert all(process.poll() is None for process in started), "`ray start` ended"
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                if answer.read().decode().count('"ALIVE"') >= count:
                    return
        except OSError:
            pass  # the dashboard is not up yet
        time.sleep(0.5)
    raise AssertionError(f"{count} nodes did not stand within {START_S:.0f} s")


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill `ray start --block` and its processes, which would take their time to end by themselves."""
    family = [psutil.Process(process.pid)]
    with contextlib.suppress(psutil.NoSuchProcess):
        family += family[0].children(recursive=True)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
