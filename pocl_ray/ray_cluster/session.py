"""The Ray session: the cluster that `RAY_ADDRESS` or a job names, or else a new one on this machine."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from pocl_ray.errors import ResourceError, StorageError
from pocl_ray.ray_cluster.internals import hide_process_counts
from pocl_ray.ray_cluster.startup import put_off_collections, set_up_memory

# Settings of this process, also on a shared cluster. Ray's lines would mix with ours, and errors are raised anyway.
QUIET = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DEDUP_LOGS": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
START_ATTEMPTS = 3
RETRY_S = 2.0
REACH_S = 10.0
"""The time to wait for a head that has just started; Ray itself would try for many minutes."""
LOOK_S = 5.0
GRACE_S = 30.0
"""The time in which a process that has lost its raylet may end by itself."""
SOCKET_BYTES = (104 if sys.platform == "darwin" else 108) - 1
"""The longest path of a socket that the system takes."""
BELOW_TMPDIR = "/ray/session_2026-01-31_12-00-00_000000_1234567/sockets/plasma_store"
"""An example of the path that Ray appends to the directory for its files, with the longest process id."""
# Settings of our own cluster; a shared one decides for itself when a node is dead. Our only node is never dead, however
# long it does not answer on a machine under load. Otherwise Ray would end this process without a message.
HERE = {
    "RAY_health_check_timeout_ms": "60000",
    "RAY_health_check_failure_threshold": "20",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
    # Ray would start one for each CPU without our set-up hook, so that none of them would ever get work.
    "RAY_prestart_worker_first_driver": "0",
}


@contextmanager
def ray_session() -> Iterator[None]:
    """Connect to Ray while the block runs; a cluster that was started for it ends with the block.

    Raises:
        ResourceError: The cluster that `RAY_ADDRESS` names cannot be reached.
    """
    if ray.is_initialized():
        yield
        return
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    address = os.environ.get("RAY_ADDRESS")
    if address:
        check_address(address)
    try:
        with _muted_stderr():
            connect(address)
    except AuthenticationError:
        raise ResourceError(
            f"RAY_ADDRESS {address}: the cluster refuses our token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH to the one that it was started with"
        ) from None
    except (ConnectionError, TimeoutError) as error:
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        raise ResourceError(f"RAY_ADDRESS {address}: no Ray cluster answers there ({cause})") from None
    except RuntimeError as error:
        if not address or "connect to GCS" not in str(error):
            raise
        cause = str(error).strip().splitlines()[-1]
        raise ResourceError(f"RAY_ADDRESS {address}: what answers there is no Ray cluster of ours ({cause})") from None
    try:
        yield
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """Check that a cluster may be at an address: it is `host:port`, and a process listens there.

    Args:
        address: Value of `RAY_ADDRESS`; Ray handles `auto` and `local`.

    Raises:
        ResourceError: The address has another form, or nothing answers within `REACH_S`.
    """
    if address in ("auto", "local"):
        return
    scheme, has_scheme, _ = address.partition("://")
    if has_scheme:
        what = "a dashboard's address" if scheme.startswith("http") else "the address of a Ray client"
        raise ResourceError(
            f"RAY_ADDRESS {address}: {what}, from which no run can be driven; use `pocl-ray submit --address "
            "http://HEAD:8265`, or set it to HEAD:6379 on a node of the cluster"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ResourceError(f"RAY_ADDRESS {address}: not of the form HOST:PORT, such as 10.0.0.1:6379")
    if not 0 < int(port) < 1 << 16:  # the C library takes the last 16 bits of it, where another process may listen
        raise ResourceError(f"RAY_ADDRESS {address}: no Ray cluster answers there (ports go from 1 to 65535)")
    deadline = time.monotonic() + REACH_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
            return
        except OSError as error:
            if time.monotonic() > deadline or isinstance(error, socket.gaierror):
                raise ResourceError(f"RAY_ADDRESS {address}: no Ray cluster answers there ({error})") from None
        time.sleep(0.5)


def connect(address: str | None, **options: Any) -> None:
    """Connect to a cluster, or start one.

    Ray gives a new node half a minute to start, which is not enough on a machine under load. Then the start is
    repeated. A connection is also repeated if the head answers but its first node is not ready.

    Args:
        address: Address of the cluster; None starts one.
        options: Further arguments of `ray.init`, such as `num_cpus`.

    Raises:
        StorageError: A new cluster cannot make its files; the message names the variable to set.
    """
    if address in (None, "local"):
        check_places()
    hide_process_counts()
    for key, value in ({} if address else HERE).items():
        os.environ.setdefault(key, value)
    for attempt in range(START_ATTEMPTS):
        try:
            ray.init(
                address=address or "local",
                include_dashboard=None if address else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **{"runtime_env": {"worker_process_setup_hook": set_up_worker}, **options},
            )
            return
        except Exception as error:  # Ray raises no more specific class
            is_starting = "timed out during startup" in str(error) or (address and isinstance(error, ConnectionError))
            if not is_starting or attempt == START_ATTEMPTS - 1:
                raise
            ray.shutdown()
            time.sleep(RETRY_S)


def check_places() -> None:
    """Check that a cluster on this machine can make its socket below `RAY_TMPDIR`, and its token below `HOME`.

    Raises:
        StorageError: A path is too long or cannot be written.
    """
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), None)
    if name is not None:
        length, room = len(os.fsencode(os.environ[name])), SOCKET_BYTES - len(BELOW_TMPDIR)
        if length > room:
            raise StorageError(
                f"{name} {os.environ[name]}: {length} bytes, too long for Ray's sockets, which leave room for {room}; "
                "set RAY_TMPDIR to a shorter directory, such as /tmp"
            )
    if os.environ.get("RAY_AUTH_MODE") == "disabled" or {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & {*os.environ}:
        return
    remedy = "set HOME to a directory that can be written, or RAY_AUTH_TOKEN to a token of your own"
    try:
        folder = Path.home() / ".ray"
        token = folder / "auth_token"
        if token.is_file() and os.access(token, os.R_OK):
            return
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise StorageError(
            f"HOME {os.environ.get('HOME', '')}: Ray keeps its token there, and cannot ({reason}); {remedy}"
        ) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(f"HOME {os.environ.get('HOME', '')}: Ray keeps its token in {folder}, and cannot; {remedy}")


@contextmanager
def _muted_stderr() -> Iterator[None]:
    """Hide the lines that Ray's C++ core writes to the terminal while it starts; errors are raised anyway."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def set_up_worker() -> None:
    """Prepare a worker process of Ray before it does any work."""
    set_up_memory()
    put_off_collections()
    know_the_cluster()
    end_with_the_node()


def know_the_cluster() -> None:
    """Tell libraries in a worker which cluster it belongs to.

    Otherwise they read the address from a file of the machine, which may still name a dead cluster.
    """
    os.environ.setdefault("RAY_ADDRESS", ray.get_runtime_context().gcs_address)


def end_with_the_node() -> None:
    """Make this process end some time after its node's raylet has ended.

    Ray should end it at once. But after a killed driver one such process was seen to live for half an hour, until it
    was killed.
    """
    raylet = os.getppid()
    if os.environ.get("RAY_RAYLET_PID") == str(raylet):  # not if there is something between them, such as a container
        threading.Thread(target=_await_the_end_of, args=(raylet,), daemon=True).start()


def _await_the_end_of(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    time.sleep(GRACE_S)
    os._exit(1)
