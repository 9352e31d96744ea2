"""Shared helpers of the tests."""

from __future__ import annotations

import os
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.servers import server_on_loopback

ROOT = Path(__file__).resolve().parents[1]

# Processes of a test are forked from one that has imported what takes longest.
set_forkserver_preload(["deepspeed", "pocl_ray.distill.setup"])


class RayApart(LoadScopeScheduling):
    """Keeps the tests of a file together, and those that start clusters in two lanes, which fill two cores.

    The files that copy the session's full run are one lane, so that it is made once; all others of `tests/ray` are the
    other. Whichever process ends its lane first goes on with the unit tests.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        if not file.startswith("tests/ray/"):
            return file
        copies_the_full_run = "full_run" in (ROOT / file).read_text(encoding="utf-8")
        return "tests/ray, full run" if copies_the_full_run else "tests/ray"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> RayApart:
    """Hand tests to the processes of `make test`."""
    return RayApart(config, log)


def shared_dir() -> Path:
    """Return the folder of shared rows and parity numbers next to the checkout, or skip the test."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("POCL_SHARED", beside))
    if not folder.is_dir():
        pytest.skip(f"no shared rows and parity numbers at {folder} (set POCL_SHARED to point to them)")
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared rows and parity numbers."""
    return shared_dir()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a real S3 server process on loopback."""
    pytest.importorskip("moto.server", reason="the S3 server of the dev extra is not installed")
    with server_on_loopback(
        lambda port: [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], "/moto-api/"
    ) as url:
        yield url


@pytest.fixture
def s3_bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """An empty bucket as `s3://...`; endpoint and credentials stand in the environment, as a user gives them."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("POCL_RAY_CACHE", str(tmp_path / "node-cache"))
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    request = urllib.request.Request(f"{s3_server}/{name}", method="PUT")
    urllib.request.urlopen(request, timeout=30).close()
    return f"s3://{name}"
