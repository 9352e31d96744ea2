"""Small training runs: every pacing rule, stages that end on convergence, values that move by step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import runs
import torch

from pocl_ray.config import CurriculumConfig, DistillConfig, PlateauConfig, RolloutConfig
from pocl_ray.curriculum.pacing import PACINGS
from pocl_ray.curriculum.schedule import loss_schedules, plan_curriculum, with_loss_ramps
from pocl_ray.data.batching import global_batches, random_order
from pocl_ray.data.row_store import RowStore
from pocl_ray.distill.task import TrainTask
from pocl_ray.records import Ramp

RAMP = Ramp((1.0, 3.0), "linear", 12)
BETA = {"beta": {"start": 0, "end": 0.5, "by": "step"}}
# 2 steps an epoch in stage 0 and 4 in stage 1; at most 6 epochs, of which the runs below need two or three.
# Frontier pacing and the race have tests of their own; the plan of a race is that of plain distillation.
RULES_BY_PLACES = [name for name, rule in PACINGS.items() if rule.order != "frontier" and name != "race"]
RULES: dict[str, dict[str, Any]] = {"competence": {"start": 0.3, "num_stages": 3}}  # parameters of rules
# A ratio that rises by stage together with a temperature that falls by step, whatever the rule.
SCHEDULES: dict[str, Any] = {
    "kd_ratio": {"start": 0.5, "end": 1.0},
    "kd_temperature": {"shape": "cosine", "start": 2.0, "end": 1.0, "by": "step"},
}
EARLY = tuple(runs.stage(i, end, num_epochs=6, min_epochs=1) for i, end in enumerate((16, 32)))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> TrainTask:
    return runs.prepare(tmp_path_factory.mktemp("pacing"))


def evaluated_steps(outcome: runs.Outcome) -> list[tuple[int, int]]:
    return [(r["curriculum/stage"], r["step"]) for r in outcome.metrics if "eval/dev/ce_loss" in r]


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "step_s"} for record in records]


def test_a_stage_that_stops_improving_ends_and_a_resumed_run_ends_it_at_the_same_step(
    task: TrainTask, tmp_path: Path
) -> None:
    # At a learning rate of next to nothing the dev loss is the same at every evaluation.
    frozen = runs.TRAIN.model_copy(update={"learning_rate": 1e-30, "weight_decay": 0.0})
    plateau = PlateauConfig(metric="kd_loss", patience=1)
    early = replace(task, stages=EARLY, train=frozen, plateau=plateau, hand_off="best")
    whole = runs.train(early, tmp_path / "whole")
    assert evaluated_steps(whole) == [(0, 0), (0, 2), (0, 4), (1, 8), (1, 12)]

    end_of_stage_0 = whole.checkpoints[1]
    assert end_of_stage_0.name == "00004"
    resumed = runs.train(early, tmp_path / "resumed", resume=end_of_stage_0)
    assert without_times(resumed.metrics) == without_times(whole.metrics)
    assert all(torch.equal(resumed.weights[name], tensor) for name, tensor in whole.weights.items())


def test_two_workers_end_a_stage_together_and_a_stage_that_improves_goes_on(task: TrainTask, tmp_path: Path) -> None:
    plateau = PlateauConfig(metric="ce_loss", patience=1)
    learning = replace(task, stages=(replace(EARLY[0], num_epochs=3),), plateau=plateau)
    outcome = runs.train(learning, tmp_path, num_workers=2)
    losses = [r["eval/dev/ce_loss"] for r in outcome.metrics if "eval/dev/ce_loss" in r]
    assert losses == sorted(losses, reverse=True), "it learns from evaluation to evaluation"
    assert evaluated_steps(outcome)[-1] == (0, 6), "its most epochs"


def of_rule(task: TrainTask, rule: str) -> TrainTask:
    keys = {"pacing": rule, "pacing_args": RULES.get(rule, {}), "num_buckets": 2, "interval_epochs": 1}
    curriculum = CurriculumConfig.model_validate({**keys, **SCHEDULES})
    return replace(task, stages=plan_curriculum(curriculum, runs.NUM_ROWS, 8))


@pytest.fixture(scope="module")
def trained(task: TrainTask, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[TrainTask, runs.Outcome]]:
    """A run of each rule, and one whose temperature moves by step, whole and resumed; all in one process."""
    folder = tmp_path_factory.mktemp("trained")
    stages = tuple(
        replace(stage, kd_temperature_ramp=replace(RAMP, first_position=first))
        for stage, first in zip(runs.STAGES, (0, 4), strict=True)
    )
    checkpointed = runs.TRAIN.model_copy(update={"checkpoint_every_steps": 5})
    tasks = {rule: of_rule(task, rule) for rule in RULES_BY_PLACES}
    jsd = DistillConfig.model_validate({"teacher_cache": "none", "loss": "generalized_jsd", "loss_args": BETA})
    stages = with_loss_ramps(stages, loss_schedules(jsd, RolloutConfig()))
    tasks["moving"] = tasks["resumed"] = replace(task, stages=stages, train=checkpointed, distill=jsd)
    resume = {"resumed": folder / "moving" / "checkpoints" / "00005"}
    outcomes = runs.train_all([(one, folder / name, resume.get(name)) for name, one in tasks.items()])
    return {name: (one, outcome) for (name, one), outcome in zip(tasks.items(), outcomes, strict=True)}


def test_values_move_by_step_and_a_resumed_run_goes_on_with_them(trained: dict[str, Any]) -> None:
    moving, resumed = trained["moving"][1], trained["resumed"][1]
    temperatures = [record["curriculum/kd_temperature"] for record in steps_of(moving)]
    assert temperatures == pytest.approx([1 + 2 * k / 11 for k in range(12)])
    betas = [record["distill/loss_args/beta"] for record in steps_of(moving)]
    assert betas == pytest.approx([0.5 * k / 11 for k in range(12)])
    assert resumed.losses == moving.losses
    assert all(torch.equal(resumed.weights[name], tensor) for name, tensor in moving.weights.items())


@pytest.mark.parametrize("rule", RULES_BY_PLACES)
def test_a_rule_trains_on_the_rows_of_its_stages_at_their_values(trained: dict[str, Any], rule: str) -> None:
    task, outcome = trained[rule]
    rank = pq.read_table(task.run_dir.local("scores.parquet"))["rank"].to_numpy()
    orders = {"rank": rank.argsort(), "random": random_order(len(rank), task.seed)}
    expected = []
    for stage in task.stages:
        expected += expected_tokens(task, stage, orders[stage.order][stage.first_rank : stage.end_rank])
    assert tokens_of(outcome) == expected
    records, places = steps_of(outcome), [(stage, k) for stage in task.stages for k in range(stage.num_steps)]
    assert [r["curriculum/stage"] for r in records] == [stage.index for stage, _ in places]
    assert [r["curriculum/kd_ratio"] for r in records] == [stage.kd_ratio for stage, _ in places]
    temperatures = [record["curriculum/kd_temperature"] for record in records]
    assert temperatures == [stage.kd_temperature_at(k) for stage, k in places]
    assert (temperatures[0], temperatures[-1]) == (2.0, 1.0)
    assert all(record["train/grad_norm"] > 0 for record in records)


def test_no_two_rules_train_on_the_same_rows(trained: dict[str, Any]) -> None:
    assert len({tuple(tokens_of(trained[rule][1])) for rule in RULES_BY_PLACES}) == len(RULES_BY_PLACES)


def steps_of(outcome: runs.Outcome) -> list[dict[str, Any]]:
    return [record for record in outcome.metrics if "train/loss" in record]


def tokens_of(outcome: runs.Outcome) -> list[int]:
    return [record["num_response_tokens"] for record in steps_of(outcome)]


def expected_tokens(task: TrainTask, stage: Any, rows: Any) -> list[int]:
    lengths = RowStore.open(task.run_dir.local(task.rows.path)).response_lengths
    return [int(lengths[ids].sum()) for ids in global_batches(stage, rows, 8, task.seed)]
