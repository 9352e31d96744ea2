"""Ray metrics of a training run, for Prometheus and Grafana (`cluster/grafana-dashboard.json`); set on rank 0."""

from __future__ import annotations

from typing import Any

from ray.util.metrics import Gauge

TAGS = ("run", "task")
GAUGES = {
    "pocl_stage": "stage of the curriculum, from 0",
    "pocl_step": "optimizer steps done",
    "pocl_kd_temperature": "temperature of the distillation loss",
    "pocl_kd_ratio": "share of distillation in the loss",
    "pocl_loss": "training loss, in nats a token",
    "pocl_samples_per_s": "rows trained on in a second, over all workers",
    "pocl_tokens_per_s": "response tokens trained on in a second, over all workers",
    "pocl_num_workers": "training workers",
    "pocl_dev_rouge_l": "ROUGE-L of the dev rows, from 0 to 100",
}
SHORTEST_STEP_S = 1e-4


def figures(record: dict[str, Any], global_batch_rows: int) -> dict[str, float]:
    """Return the values of the gauges that a record of the metric stream sets.

    Args:
        record: A training step's, or an evaluation's.
        global_batch_rows: Rows of a step.
    """
    values: dict[str, Any] = {"pocl_step": record["step"], "pocl_stage": record["curriculum/stage"]}
    if "train/loss" in record:
        seconds = max(record["step_s"], SHORTEST_STEP_S)
        values |= {
            "pocl_kd_temperature": record["curriculum/kd_temperature"],
            "pocl_kd_ratio": record["curriculum/kd_ratio"],
            "pocl_loss": record["train/loss"],
            "pocl_samples_per_s": global_batch_rows / seconds,
            "pocl_tokens_per_s": record["num_response_tokens"] / seconds,
            "pocl_num_workers": record["num_workers"],
        }
    elif "eval/dev/rouge_l" in record:  # plain text has none
        values["pocl_dev_rouge_l"] = record["eval/dev/rouge_l"]
    return {name: float(value) for name, value in values.items()}


class Gauges:
    """The gauges of one task of one run."""

    def __init__(self, run: str, task: str, global_batch_rows: int) -> None:
        """Register them with Ray's metrics agent of this node."""
        self._global_batch_rows = global_batch_rows
        self._gauges = {name: Gauge(name, description=text, tag_keys=TAGS) for name, text in GAUGES.items()}
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run, "task": task})

    def show(self, record: dict[str, Any]) -> None:
        """Set what a record tells."""
        for name, value in figures(record, self._global_batch_rows).items():
            self._gauges[name].set(value)
