"""The Ray session: the cluster that `RAY_ADDRESS` or a job names, else one of this machine's own."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from pocl_ray.errors import ResourceError

QUIET = {"RAY_DEDUP_LOGS": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
START_ATTEMPTS = 3
QUIET_HERE = {"RAY_BACKEND_LOG_LEVEL": "fatal"}  # of a cluster of our own; a shared one keeps its logs


@contextmanager
def ray_session() -> Iterator[None]:
    """Connect to Ray while the block runs; a cluster that was started for it ends with it.

    Raises:
        ResourceError: The cluster that `RAY_ADDRESS` names cannot be reached.
    """
    if ray.is_initialized():
        yield
        return
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        for key, value in QUIET_HERE.items():
            os.environ.setdefault(key, value)
    try:
        with _muted_stderr():
            _connect(address)
    except (ConnectionError, TimeoutError) as error:
        raise ResourceError(f"RAY_ADDRESS {address}: no Ray cluster answers there ({error})") from None
    try:
        yield
    finally:
        ray.shutdown()


def _connect(address: str | None) -> None:
    """Connect, or start a cluster; Ray gives a new node half a minute, which is not enough on a machine under load."""
    for attempt in range(START_ATTEMPTS):
        try:
            ray.init(
                address=address or "local",
                include_dashboard=None if address else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"worker_process_setup_hook": know_the_cluster},
            )
            return
        except Exception as error:  # Ray raises nothing more special
            if "timed out during startup" not in str(error) or attempt == START_ATTEMPTS - 1:
                raise
            ray.shutdown()


@contextmanager
def _muted_stderr() -> Iterator[None]:
    """Keep the lines that Ray's C++ core writes while it starts off the terminal; what goes wrong is raised."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def know_the_cluster() -> None:
    """Tell libraries in a worker which cluster it belongs to.

    They look it up in a file of the machine otherwise, which may still name a cluster that died.
    """
    os.environ.setdefault("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
