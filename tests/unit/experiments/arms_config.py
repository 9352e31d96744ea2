"""A config with an experiment that needs no rows: its models are never made."""

from __future__ import annotations

from typing import Any

from pocl_ray.config import Config

NUM_ROWS = 256
TREE: dict[str, Any] = {
    "name": "trial",
    "data": {"train": {"path": "rows.jsonl"}, "holdout_rows": 8},
    "teacher": {"path": "teacher"},
    "student": {"path": "student", "sft": {"num_epochs": 1}},
    "curriculum": {"pacing": "none", "num_buckets": 1, "num_steps": 24, "kd_temperature": 1.0, "kd_ratio": 1.0},
    "train": {"global_batch_rows": 32, "micro_batch_rows": 16, "precision": "fp32"},
}
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hot": {"curriculum.kd_temperature": {"start": 1.0, "end": 2.0, "by": "step"}},
    "fast": {"train": {"learning_rate": 5e-4}},
}


def experiment_config(arms: dict[str, dict[str, Any]] | None = None, **keys: Any) -> Config:
    arms = ARMS if arms is None else {"plain": {}, **arms}
    return Config.model_validate({**TREE, "experiment": {"arms": arms, "seeds": [1, 2, 3], **keys}})
