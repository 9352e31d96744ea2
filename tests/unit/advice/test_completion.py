"""Completion in the shell: names of configs and of runs, in bash itself too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pocl_ray.advice.completion import complete_config, complete_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("mine.yaml", "more/other.yml", "more/rows.jsonl", "runs/a/manifest.json", "runs/b/else.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_configs_are_files_here_and_names_of_the_package() -> None:
    assert complete_config("m")[:2] == ["mine.yaml", "more/"]
    assert complete_config("more/") == ["more/other.yml"]
    assert complete_config("quick") == ["quickstart"]
    assert "methods/seqkd" in complete_config("methods/s")
    assert complete_config("nothing/such") == []


def test_runs_have_a_manifest() -> None:
    assert complete_run("runs/") == ["runs/a", "runs/a/", "runs/b/"]
    assert complete_run("more/") == []


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not here")
@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("plan qui", "quickstart"),
        ("push runs/a", "runs/a runs/a/"),
        ("chat runs/a", "runs/a runs/a/"),
        ("compare runs/a runs/a", "runs/a runs/a/"),
    ],
)
def test_bash_completes_configs_and_runs(folder: Path, words: str, found: str) -> None:
    program = folder / "bin" / "pocl-ray"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom pocl_ray.cli import main\nmain()\n", encoding="utf-8")
    program.chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{program.parent}:{os.environ['PATH']}"}
    shown = subprocess.run(
        [program], env={**environment, "_POCL_RAY_COMPLETE": "source_bash"}, capture_output=True, text=True, timeout=60
    )
    assert shown.returncode == 0, shown.stderr
    script = (
        f"{shown.stdout}\nCOMP_WORDS=(pocl-ray {words}); COMP_CWORD={len(words.split())}\n"
        '_pocl_ray_completion pocl-ray\necho "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == found, done.stderr
