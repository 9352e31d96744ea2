"""Training tasks from the config: the curriculum and its control, and supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from pocl_ray.config import Config, RolloutConfig
from pocl_ray.curriculum.schedule import plan_sft
from pocl_ray.data.prepare import Rows
from pocl_ray.distill.task import Rescoring, TeacherTask, TrainTask
from pocl_ray.models.places import ModelRef
from pocl_ray.records import Stage
from pocl_ray.run_directory.storage import RunDirectory

RESCORED = "scores/stages"
"""Tables of the rankings made between stages, beside the output of the run that made them."""


def curriculum_task(
    config: Config,
    name: str,
    fingerprint: str,
    run_dir: RunDirectory,
    stages: tuple[Stage, ...],
    student: ModelRef,
    teacher: ModelRef | None,
    teacher_fingerprint: str,
    rows: Rows,
    output: str,
    other_teachers: Sequence[tuple[ModelRef, str]] = (),
) -> TrainTask:
    """Return the task that distils the student through `stages`; its result goes to `output`.

    `other_teachers` are the models of `config.other_teachers`, each with its fingerprint.
    Without a teacher, which `kd_ratio` 0 in all stages does not need, neither a cache nor dev figures of it are read.
    """
    folder = output.removesuffix("student")
    rescores = any(stage.rescore for stage in stages)
    return TrainTask(
        name=name,
        fingerprint=fingerprint,
        run_dir=run_dir,
        stages=stages,
        student=student,
        teacher=teacher,
        teacher_cache=cache_folder(config, 0) if teacher is not None else None,
        teacher_fingerprint=teacher_fingerprint,
        tokenizer="tokenizer",
        rows=rows.train,
        dev_rows=rows.dev,
        scores="scores.parquet",
        train=config.train,
        distill=config.distill,
        rollout=config.rollout,
        hand_off=config.curriculum.hand_off,
        plateau=config.curriculum.plateau,
        dev_generation=config.evaluation.dev_generation,
        max_dev_rows=config.evaluation.max_dev_rows,
        max_tokens=config.data.max_tokens,
        gradient_checkpointing=config.student.gradient_checkpointing,
        seed=config.seed if config.train.seed is None else config.train.seed,
        collective_timeout_s=config.scaling.collective_timeout_s,
        output=output,
        metrics=f"{folder}metrics.jsonl",
        teacher_weight=config.teacher.weight,
        teacher_stages=config.teacher.stages_of(len(stages)),
        teacher_sharded=config.teacher.sharded,
        teacher_rows=rows.for_teacher or None,
        other_teachers=tuple(
            TeacherTask(ref, cache_folder(config, place), made_by, one.weight, one.stages_of(len(stages)), one.sharded)
            for place, (ref, made_by) in enumerate(other_teachers, start=1)
            for one in [config.other_teachers[place - 1]]
        ),
        lora=config.student.lora,
        rescoring=Rescoring(config.difficulty, config.seed, f"{folder}{RESCORED}") if rescores else None,
    )


def cache_folder(config: Config, place: int) -> str | None:
    """Return the directory of a teacher's caches, by its place among the teachers; None where teachers run live."""
    if config.distill.teacher_cache == "none":
        return None
    return "teacher_cache" if place == 0 else f"teacher_cache_{place + 1}"


def sft_task(
    config: Config,
    role: Literal["teacher", "student"],
    start: ModelRef,
    rows: Rows,
    run_dir: RunDirectory,
    fingerprint: str,
    tokenizer: str = "tokenizer",
) -> TrainTask:
    """Return the task that fine-tunes the teacher or the student on the references, before anything else.

    `rows` are in the tokens of that model, and `tokenizer` is the directory of what made them.

    Raises:
        ConfigError: There are fewer rows than one global batch holds.
    """
    sft, lora = getattr(config, role).sft, config.student.lora
    train = config.sft_train(sft)
    key = f"{role}.sft"
    stages = plan_sft(rows.train.num_rows, sft.num_epochs, sft.max_steps, train.global_batch_rows, key)
    task = curriculum_task(
        config,
        name=f"{role}_sft",
        fingerprint=fingerprint,
        run_dir=run_dir,
        stages=stages,
        student=start,
        teacher=start,
        teacher_fingerprint="",
        rows=rows,
        output=f"models/{role}",
    )
    return replace(
        task,
        teacher=None,
        teacher_cache=None,
        tokenizer=tokenizer,
        other_teachers=(),
        scores=None,
        train=train,
        rollout=RolloutConfig(),
        seed=config.seed,
        hand_off=sft.hand_off,
        gradient_checkpointing=config.student.gradient_checkpointing and role == "student",
        metrics=f"models/{role}_metrics.jsonl",
        # What distillation starts from is a plain model, whatever is written in the end.
        lora=lora.model_copy(update={"merge": True}) if role == "student" and lora is not None else None,
    )
