"""Server processes on loopback, for tests of what speaks to a server."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def server_on_loopback(
    command: Callable[[int], list[str]], path: str, timeout_s: float = 60, env: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Start a server, wait until it answers, give its address, and end it with all processes that it started.

    Args:
        command: Returns the command line for a port.
        path: Path that answers once the server is ready.
        timeout_s: Seconds to wait for that.
        env: Environment of the server; None for that of the tests.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, silent = f"http://127.0.0.1:{port}", subprocess.DEVNULL
    server = subprocess.Popen(command(port), env=env, stdout=silent, stderr=silent, start_new_session=True)
    try:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                urllib.request.urlopen(f"{url}{path}", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, "the server ended"
                assert time.monotonic() < deadline, "the server does not answer"
                time.sleep(0.1)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
