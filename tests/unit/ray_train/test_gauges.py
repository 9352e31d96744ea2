"""Ray's metrics of a run, the Grafana dashboard that shows exactly these, and the prefix of a worker's log."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from pocl_ray.ray_train.worker import GAUGES, TAGS, WorkerLog, figures

DASHBOARD = Path(__file__).resolve().parents[3] / "cluster" / "grafana-dashboard.json"
STEP = {
    "step": 7,
    "train/loss": 1.5,
    "curriculum/stage": 2,
    "curriculum/kd_temperature": 1.33,
    "curriculum/kd_ratio": 0.8,
    "num_response_tokens": 300,
    "num_workers": 4,
    "step_s": 0.5,
}
EVALUATION = {"step": 8, "curriculum/stage": 2, "eval/dev/rouge_l": 41.0}


def queries() -> list[str]:
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_a_step_sets_rates_and_curriculum() -> None:
    assert figures(STEP, global_batch_rows=16) == {
        "pocl_step": 7,
        "pocl_stage": 2,
        "pocl_kd_temperature": 1.33,
        "pocl_kd_ratio": 0.8,
        "pocl_loss": 1.5,
        "pocl_samples_per_s": 32,
        "pocl_tokens_per_s": 600,
        "pocl_num_workers": 4,
    }


def test_an_evaluation_sets_the_dev_figure() -> None:
    assert figures(EVALUATION, 16) == {"pocl_step": 8, "pocl_stage": 2, "pocl_dev_rouge_l": 41.0}


def test_plain_text_has_no_dev_rouge_l_to_show() -> None:
    losses = {key: value for key, value in EVALUATION.items() if key != "eval/dev/rouge_l"}
    assert figures(losses, 16) == {"pocl_step": 8, "pocl_stage": 2}


def test_a_step_too_short_to_measure_has_a_finite_rate() -> None:
    assert figures({**STEP, "step_s": 0.0}, 16)["pocl_tokens_per_s"] < float("inf")


def test_each_gauge_is_set_by_some_record() -> None:
    assert {*figures(STEP, 16), *figures(EVALUATION, 16)} == set(GAUGES)


def test_the_dashboard_shows_each_gauge_under_the_name_that_ray_exports() -> None:
    shown = {name for query in queries() for name in re.findall(r"ray_(pocl_\w+)", query)}
    assert shown == set(GAUGES)


def test_the_dashboard_selects_by_the_tags_that_the_gauges_have() -> None:
    for query in queries():
        assert set(re.findall(r"(\w+)=~", query)) == set(TAGS)
    variables = {variable["name"] for variable in json.loads(DASHBOARD.read_text())["templating"]["list"]}
    assert {"datasource", *TAGS} <= variables


def test_a_line_of_the_log_names_run_task_stage_and_rank(caplog: pytest.LogCaptureFixture) -> None:
    log = WorkerLog("quickstart", "distill", 3)
    log.logger.propagate = True
    log.stage = 2
    with caplog.at_level(logging.INFO, logger=log.logger.name):
        log.info("checkpoint at step %d", 12)
    log.logger.propagate = False
    assert caplog.messages == ["run=quickstart task=distill stage=2 rank=3 checkpoint at step 12"]
