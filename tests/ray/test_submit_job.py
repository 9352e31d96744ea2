"""The tiny flow as a job on two nodes that ask for a token, submitted by both commands.

Its rows are plain texts, which no other test on a cluster has.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from tiny import config_tree, manifest, metrics, write_texts
from two_nodes import TwoNodes, two_nodes

from pocl_ray.ray_cluster.submit import EXCLUDES

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

PACKAGE = Path(__file__).resolve().parents[2] / "pocl_ray"
SCALING = {"num_workers": 2, "placement": "STRICT_SPREAD", "evaluation_actors": 1, "start_timeout_s": 300}


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    with two_nodes() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def working_dir(ready_made: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout: the package, and a config; results go elsewhere."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(PACKAGE, folder / "pocl_ray", ignore=shutil.ignore_patterns("__pycache__"))
    shared = tmp_path_factory.mktemp("shared")
    changes = {"control": None, "curriculum__interval_epochs": 1, "scaling": SCALING, **write_texts(shared)}
    tree = config_tree(shared, **ready_made, **changes)
    (folder / "run.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return folder


def command(nodes: TwoNodes, words: list[str], folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, env={**nodes.env, **env}, capture_output=True, text=True
    )


def submit(nodes: TwoNodes, folder: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    line = ["pocl_ray", "submit", "run.yaml", *words, "--address", nodes.address, "--env", "OMP_NUM_THREADS=1"]
    return command(nodes, line, folder, **env)


def test_a_wrong_token_is_told_in_one_line(nodes: TwoNodes, working_dir: Path) -> None:
    done = submit(nodes, working_dir, RAY_AUTH_TOKEN="0" * 64)
    assert done.returncode == 2
    assert "refuses ours" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_mistake_that_the_job_finds_comes_back_as_its_exit_code(nodes: TwoNodes, working_dir: Path) -> None:
    done = submit(nodes, working_dir, "data.train.path=nowhere.jsonl")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "nowhere.jsonl" in done.stdout


@pytest.fixture(scope="module")
def run(nodes: TwoNodes, working_dir: Path) -> Path:
    """The directory of a run that was submitted and has come to its end."""
    done = submit(nodes, working_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ray job stop" in done.stderr
    return Path(yaml.safe_load((working_dir / "run.yaml").read_text(encoding="utf-8"))["storage_path"]) / "tiny"


def test_the_flow_runs_to_its_end_on_two_nodes_by_either_command(nodes: TwoNodes, working_dir: Path, run: Path) -> None:
    assert (run / "student" / "model.safetensors").exists()
    assert (run / "report.html").exists()
    assert len(json.loads((run / "environment.json").read_text(encoding="utf-8"))["nodes"]) == 2
    assert not (run / "lease.json").exists()
    on_train_page = json.loads(nodes.dashboard("api/train/v2/runs/v1"))["train_runs"]
    assert {shown["status"] for shown in on_train_page} == {"FINISHED"}
    (shown,) = [shown for shown in on_train_page if shown["name"].startswith("distill-")]
    assert [len(attempt["workers"]) for attempt in shown["attempts"]] == [2]

    excludes = yaml.safe_dump({"excludes": list(EXCLUDES)})
    (working_dir / "runtime_env.yaml").write_text(excludes, encoding="utf-8")
    line = ["ray.scripts.scripts", "job", "submit", "--address", nodes.address, "--working-dir", "."]
    line += ["--runtime-env", "runtime_env.yaml", "--", "python", "-m", "pocl_ray", "run", "run.yaml"]
    again = command(nodes, line, working_dir)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "distill is done already" in again.stdout + again.stderr


def test_plain_text_is_distilled_and_measured_by_perplexity(run: Path) -> None:
    figures = json.loads((run / "evaluation.json").read_text())["sets"]["held_out"]
    assert set(figures) == {"student", "student_before", "teacher"}
    for found in figures.values():
        assert found["perplexity"] == pytest.approx(math.exp(found["ce_loss"])) and found["num_rows"] >= 6
    assert figures["student"]["ce_loss"] < figures["student_before"]["ce_loss"]
    scores = pq.read_table(run / "scores.parquet")
    assert "rouge_l" not in scores.column_names and scores.num_rows > 60
    assert scores["num_prompt_tokens"].unique().to_pylist() == [1]
    evaluations = [record for record in metrics(run / "metrics.jsonl") if "eval/dev/kd_loss" in record]
    assert evaluations and not any("eval/dev/rouge_l" in record for record in evaluations)
    assert "perplexity" in (run / "report.md").read_text() and "perplexity" in (run / "student/README.md").read_text()
    assert {step["status"] for step in manifest(run).values()} == {"done"}
