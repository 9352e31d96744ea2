"""Clocks that disagree: ages by one clock alone, and one clear line where a clock is far off."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow.fs as pafs
import pytest

from pocl_ray.errors import StorageError
from pocl_ray.ray_cluster.versions import skew_s, skew_warning
from pocl_ray.run_directory.disk import machine_fault
from pocl_ray.run_directory.lease import age_in_store, started_after_boot_s
from pocl_ray.run_directory.storage import RunDirectory, clock_is_off

BODY = b"<Error><Code>RequestTimeTooSkewed</Code><Message>The difference is too large.</Message></Error>"


class SkewedStore(http.server.BaseHTTPRequestHandler):
    """An S3 server for which every request comes a day late."""

    def _refuse(self) -> None:
        self.send_response(403)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(BODY)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _refuse

    def date_time_string(self, timestamp: float | None = None) -> str:
        return super().date_time_string(time.time() + 86400)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def skewed_store() -> Iterator[pafs.S3FileSystem]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), SkewedStore)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield pafs.S3FileSystem(
        access_key="a",
        secret_key="b",
        endpoint_override=f"http://127.0.0.1:{server.server_port}",
        region="us-east-1",
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=1),
    )
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_age_of_a_file_is_the_stores_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = RunDirectory.open(str(tmp_path), "run")
    run_dir.write_text("lease.json", "{}")
    hour_ago = time.time() - 3600.0
    os.utime(run_dir.local("lease.json"), (hour_ago, hour_ago))
    monkeypatch.setattr(time, "time", lambda: 0.0)
    age_s = age_in_store(run_dir, "lease.json")
    assert age_s == pytest.approx(3600.0, abs=30.0)
    assert [path.name for path in Path(run_dir.uri).iterdir()] == ["lease.json"]
    assert age_in_store(run_dir, "nothing") is None


def test_an_object_store_tells_ages_as_well(s3_bucket: str) -> None:
    run_dir = RunDirectory.open(f"{s3_bucket}/runs", "run")
    run_dir.write_text("lease.json", "{}")
    age_s = age_in_store(run_dir, "lease.json")
    assert age_s is not None
    assert -1.0 <= age_s < 60.0


def test_the_start_of_a_process_counts_from_the_boot() -> None:
    before = started_after_boot_s(os.getpid())
    with subprocess.Popen([sys.executable, "-c", ""]) as other:
        assert before <= started_after_boot_s(other.pid) <= time.clock_gettime(time.CLOCK_BOOTTIME) + 1.0
    with pytest.raises(psutil.NoSuchProcess):
        started_after_boot_s(other.pid)


@pytest.mark.parametrize(("theirs", "ahead_s"), [(100.0, 0.0), (105.0, 0.0), (3710.0, 3600.0), (-3500.0, -3600.0)])
def test_a_slow_answer_is_no_skew(theirs: float, ahead_s: float) -> None:
    assert skew_s(100.0, theirs, 110.0) == ahead_s


def test_a_clock_far_off_is_one_line_with_the_node_and_the_remedy() -> None:
    assert skew_warning("node 10.0.0.4", 200.0) is None
    ahead, behind = skew_warning("node 10.0.0.4", 3600.0), skew_warning("node 10.0.0.4", -3600.0)
    assert ahead is not None
    assert behind is not None
    assert ahead.startswith("node 10.0.0.4: its clock is 3600 s ahead of the driver's")
    assert "3600 s behind the driver's" in behind
    assert ahead.endswith("synchronise it (NTP)")


def test_what_pyarrow_raises_for_a_skewed_clock_is_known(skewed_store: pafs.S3FileSystem) -> None:
    with pytest.raises(OSError, match="REQUEST_TIME_TOO_SKEWED") as raised:
        skewed_store.get_file_info(pafs.FileSelector("bucket/runs"))
    assert clock_is_off(raised.value)


def test_a_store_that_refuses_the_time_is_one_clear_line(
    skewed_store: pafs.S3FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pocl_ray.run_directory.storage.resolve", lambda uri: (skewed_store, "bucket/run"))
    run_dir = RunDirectory("s3://bucket/run")
    with pytest.raises(StorageError) as refused:
        run_dir.write_bytes("file", b"x" * 10)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith("s3://bucket/run/file: cannot be written (the clock of this machine is off")


def test_a_wrong_clock_behind_any_error_is_the_users_to_set() -> None:
    error = RuntimeError("upload failed")
    error.__cause__ = OSError("AWS Error REQUEST_TIME_TOO_SKEWED during PutObject operation: too large")
    fault = machine_fault(error, "training on node 10.0.0.4")
    assert isinstance(fault, StorageError)
    assert "training on node 10.0.0.4: the clock of this machine is off" in str(fault)
    assert machine_fault(RuntimeError("another"), "training") is None
