"""SIGKILL of a worker of an on-policy run: rollouts, threshold and replay buffer go on to the bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
from faults import long_form, timeless
from test_kills import aside, begun, has_checkpoint, processes_of, wait_for  # noqa: F401 (aside is a fixture)
from tiny import config_tree, metrics, sha256

from pocl_ray.config import Config
from pocl_ray.pipeline import Pipeline

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800), long_form]

WEIGHTS = "student/model.safetensors"
# The threshold stands high and the buffer is full after two rollouts: rows, the student and the buffer all come up.
ROLLOUT = {"mode": "adaptive", "threshold_start": 0.7, "loss_rise": 0.0, "buffer_rows": 32, "max_new_tokens": 6}


def config_in(folder: Path, storage: Path) -> Config:
    tree = config_tree(
        folder,
        storage_path=str(storage),
        control=None,
        scaling__num_workers=2,
        distill={"loss": "skewed_reverse_kl", "teacher_cache": "none"},
        rollout=ROLLOUT,
        difficulty__signals=["ce_loss", "teacher_ce_loss"],
    )
    return Config.model_validate(tree)


def test_a_killed_worker_changes_no_bit_of_an_on_policy_run(cluster: None, tmp_path: Path, aside: Any) -> None:  # noqa: F811
    config, other = (config_in(tmp_path, tmp_path / name) for name in ("one", "other"))
    _ = Pipeline(config).ranking
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    run, killed = (tmp_path / name / "tiny" for name in ("one", "other"))
    _ = Pipeline(config).distilled
    sources = {record["rollout/source"] for record in metrics(run / "metrics.jsonl") if "train/loss" in record}
    assert sources == {"data", "student", "buffer"}

    training = aside(lambda: Pipeline(other).distilled)
    wait_for(lambda: has_checkpoint(killed), "a checkpoint", training.done)
    victims = processes_of("RayTrainWorker", psutil.Process())
    assert len(victims) == 2
    before = begun(killed)
    victims[1].kill()
    assert not training.done()
    training.result()
    assert sha256(killed / WEIGHTS) == sha256(run / WEIGHTS)
    assert timeless(killed / "metrics.jsonl") == timeless(run / "metrics.jsonl")
    assert metrics(killed / "metrics.jsonl")[: len(before)] == before, "the run went on, and did not begin again"
