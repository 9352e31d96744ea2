"""A config with a search that needs no rows: its models are never made."""

from __future__ import annotations

from typing import Any

from pocl_ray.config import Config

TREE: dict[str, Any] = {
    "name": "search",
    "seed": 3,
    "data": {"train": {"path": "rows.jsonl"}, "holdout_rows": 8},
    "teacher": {"path": "teacher"},
    "student": {"path": "student", "sft": {"num_epochs": 1}},
    "curriculum": {"num_buckets": 4, "interval_epochs": 1},
    "train": {"global_batch_rows": 32, "micro_batch_rows": 16, "precision": "fp32"},
}
SPACE: dict[str, Any] = {
    "curriculum.num_buckets": {"choice": [2, 4]},
    "curriculum.interval_epochs": {"randint": [1, 3]},
    "curriculum.kd_temperature.end": {"uniform": [1.0, 3.0]},
}
NUM_ROWS = 256


def search_config(**tune: Any) -> Config:
    """Build the config; keywords are keys of `tune`."""
    return Config.model_validate({**TREE, "tune": {"space": SPACE, "num_trials": 6, **tune}})
