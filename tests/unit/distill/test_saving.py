"""Files are written during training, in order, with a bounded memory, and a failure is not lost."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest

from pocl_ray.distill.checkpoint import CheckpointWriter, PendingCheckpoint, link_tree


def test_jobs_run_in_order_while_the_caller_goes_on() -> None:
    writer, may_go, done = CheckpointWriter(100), threading.Event(), []
    writer.submit(may_go.wait)
    for number in range(5):
        writer.submit(lambda number=number: done.append(number), num_bytes=20)
    assert done == []
    may_go.set()
    writer.join()
    assert done == [0, 1, 2, 3, 4]


def test_what_does_not_fit_the_buffer_waits_until_there_is_room() -> None:
    writer, may_go = CheckpointWriter(100), threading.Event()
    writer.submit(may_go.wait, num_bytes=60)
    threading.Timer(0.2, may_go.set).start()
    start = time.monotonic()
    writer.submit(lambda: None, num_bytes=60)
    assert time.monotonic() - start > 0.15
    writer.submit(lambda: None, num_bytes=1000).result()  # more than there ever is: alone


def test_without_a_buffer_a_job_is_done_when_the_call_returns() -> None:
    done: list[int] = []
    CheckpointWriter(0).submit(lambda: done.append(1), num_bytes=10)
    assert done == [1]


def test_a_failure_stops_what_comes_after_and_is_raised_in_every_later_call() -> None:
    writer, done = CheckpointWriter(100), []

    def full() -> None:
        raise OSError(28, "No space left on device")

    first = writer.submit(full, num_bytes=10)
    with pytest.raises(OSError, match="No space"):
        first.result()
    with pytest.raises(OSError, match="No space"):
        writer.submit(lambda: done.append(1))
    with pytest.raises(OSError, match="No space"):
        writer.join()
    writer.close()
    assert done == []


def test_a_checkpoint_whose_writing_failed_is_never_given_out(tmp_path: Path) -> None:
    writer, may_go = CheckpointWriter(100), threading.Event()

    def fail() -> None:
        may_go.wait()
        raise OSError(28, "No space left on device")

    writer.submit(fail)
    written = PendingCheckpoint(tmp_path, writer.submit(lambda: None))
    may_go.set()
    with pytest.raises(OSError, match="No space"):
        written.wait()


def test_linked_files_stay_when_the_first_name_is_gone_and_written_anew(tmp_path: Path) -> None:
    source, target = tmp_path / "best", tmp_path / "checkpoint" / "best"
    source.mkdir()
    (source / "0.safetensors").write_bytes(b"first")
    (tmp_path / "checkpoint").mkdir()
    link_tree(source, target)
    shutil.rmtree(source)
    source.mkdir()
    (source / "0.safetensors").write_bytes(b"second")
    assert (target / "0.safetensors").read_bytes() == b"first"
