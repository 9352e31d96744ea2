"""Temporary files of killed workers are deleted, and no files of living processes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pocl_ray.distill.checkpoint import make_scratch


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_leftovers_of_a_killed_process_go_and_those_of_one_that_runs_stay(tmp_path: Path) -> None:
    code = (
        "import sys, tempfile, time; tempfile.tempdir = sys.argv[1]\n"
        "from pocl_ray.distill.checkpoint import make_scratch\n"
        "(make_scratch() / 'state').write_text('x'); print('made', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        (theirs,) = tmp_path.iterdir()
        mine = make_scratch()
        assert {path.name for path in tmp_path.iterdir()} == {theirs.name, mine.name}
        other.kill()
        other.wait()
    second = make_scratch()
    assert {path.name for path in tmp_path.iterdir()} == {mine.name, second.name}


def test_directories_of_another_machine_or_of_others_are_left_alone(tmp_path: Path) -> None:
    kept = ["pocl-ray-0123456789ab-1-1-x", "pocl-ray-1000", "pocl-ray-old", f"other-{os.getpid()}"]
    for name in kept:
        (tmp_path / name).mkdir()
    mine = make_scratch()
    assert {path.name for path in tmp_path.iterdir()} == {*kept, mine.name}
