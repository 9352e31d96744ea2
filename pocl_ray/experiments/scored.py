"""The shared start of the arms of one scoring, which the pipeline's steps make once, and the jobs that follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet as pq

from pocl_ray.arms import Arm
from pocl_ray.config import Config
from pocl_ray.data.row_store import RowStore
from pocl_ray.difficulty.choice import rank_table
from pocl_ray.distill.task import TrainTask, curriculum_task
from pocl_ray.experiments.flops import ArmFlops, FlopsCounter, model_size
from pocl_ray.fingerprints import distill_dependencies, ranking_dependencies, reads_teacher
from pocl_ray.pipeline import SCORES, SIGNALS, Pipeline
from pocl_ray.records import RowsSummary
from pocl_ray.run_directory.manifest import step_fingerprint
from pocl_ray.trainings.judge import judge_task
from pocl_ray.trainings.process import Job

RANKINGS = "experiment/rankings"


class ScoredRun:
    """Rows, models, signals and caches in one run directory, and the trainings that start from them."""

    def __init__(self, pipeline: Pipeline) -> None:
        """Do the steps up to the ranking that are not done yet; a Ray cluster is connected."""
        self.pipeline, self.run_dir = pipeline, pipeline.run_dir
        inputs = pipeline.inputs
        self.own_ranking, self.signals = pipeline.ranking, pipeline.signals
        self.rows, self.student, self.teacher = inputs.rows, inputs.student, inputs.teacher
        self.teachers = inputs.teachers
        sizes = (model_size(self.student.ref), model_size(self.teacher.ref))
        self.flops = FlopsCounter(*sizes, self.rows.train)

    @property
    def num_rows(self) -> int:
        """Training rows."""
        return self.rows.train.num_rows

    def planned_flops(self, arm: Arm) -> ArmFlops:
        """Return the FLOPs of an arm's plan."""
        return self.flops.planned(arm.config, arm.stages)

    def measured_flops(self, arm: Arm, result: Mapping[str, Any]) -> ArmFlops:
        """Return the FLOPs of a training of an arm that was run."""
        num_rows = result["num_steps"] * arm.config.train.global_batch_rows
        return self.flops.measured(arm.config, arm.stages, num_rows, result["num_tokens"])

    def job(self, config: Config, arm: Arm, seed: int, sets: Mapping[str, RowsSummary]) -> Job:
        """Return the training of an arm on a seed, judged on these sets as the experiment's config says."""
        train = arm.config.train.model_copy(update={"seed": seed})
        own = arm.config.model_copy(update={"train": train})
        ranking = step_fingerprint("ranking", ranking_dependencies(own, self.signals))
        evaluation = config.evaluation.model_dump(mode="json", include={"seeds", "generation"})
        judged = [{name: made.fingerprint for name, made in sets.items()}, evaluation, self.teacher.fingerprint]
        depends = [distill_dependencies(own, ranking, self.student.fingerprint, arm.stages), judged]
        fingerprint = step_fingerprint("experiment", depends)
        name = f"{arm.name}-seed-{seed}-{fingerprint[:8]}"
        records_rows = config.experiment is not None and config.experiment.record_dev_rows
        tenths = sorted({max(1, arm.num_steps * part // 10) for part in range(1, 11)})
        return Job(
            name,
            self._task(own, arm, name, fingerprint, ranking),
            judge_task(config, self.run_dir, sets, self.teacher.ref),
            row_steps=tuple(tenths) if records_rows else (),
        )

    def _task(self, config: Config, arm: Arm, name: str, fingerprint: str, ranking: str) -> TrainTask:
        is_taught = reads_teacher(config, arm.stages)
        task = curriculum_task(
            config,
            name=name,
            fingerprint=fingerprint,
            run_dir=self.run_dir,
            stages=arm.stages,
            student=self.student.ref,
            teachers=self.teachers if is_taught else (),
            rows=self.rows,
            output=f"experiment/students/{name}/student",
        )
        return replace(task, scores=self._scores(config, ranking))

    def _scores(self, config: Config, ranking: str) -> str:
        """Return the table of a ranking; one that differs from the base config's is made from the same signals."""
        if ranking == self.own_ranking:
            return SCORES
        path = f"{RANKINGS}/{ranking[:12]}.parquet"
        if not self.run_dir.exists(path):
            rows = RowStore.open(self.run_dir.local(self.rows.train.path))
            table = rank_table(self.run_dir.read_table(SIGNALS), rows, config.difficulty, config.seed)
            with TemporaryDirectory() as scratch:
                pq.write_table(table, Path(scratch) / "scores.parquet")
                self.run_dir.publish(Path(scratch) / "scores.parquet", path)
        return path
