"""What a training worker is told: the parts of the config that it needs, and where its inputs lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pocl_ray.config import (
    Config,
    DifficultyConfig,
    DistillConfig,
    GenerationConfig,
    LoraConfig,
    PlateauConfig,
    RolloutConfig,
    TrainConfig,
)
from pocl_ray.curriculum.schedule import plan_sft
from pocl_ray.data.prepare import Rows
from pocl_ray.models.places import ModelRef
from pocl_ray.records import RowsSummary, Stage
from pocl_ray.run_directory.storage import RunDirectory


@dataclass(frozen=True)
class TeacherTask:
    """One teacher of a training run.

    Attributes:
        ref: The frozen model.
        cache: Directory of its caches (`train`, `dev`), relative to the run directory; None to run it live.
        fingerprint: Of the teacher that the caches must have been made by.
        weight: Of its divergence; the weights of a stage are made to sum to 1.
        stages: In which it teaches; None for all.
        sharded: Whether it is split over the workers, where it runs live.
        rows: Set -> the rows in its own tokens; None where its tokenizer is the student's.
    """

    ref: ModelRef
    cache: str | None
    fingerprint: str
    weight: float = 1.0
    stages: tuple[int, ...] | None = None
    sharded: bool = False
    rows: Mapping[str, RowsSummary] | None = None


@dataclass(frozen=True)
class Rescoring:
    """How the rows are ranked anew between stages.

    Attributes:
        difficulty: The signals, how they are fused, and how answers are generated.
        seed: Of the answers, and of ties.
        folder: Where the tables of it go, relative to the run directory.
    """

    difficulty: DifficultyConfig
    seed: int
    folder: str


@dataclass(frozen=True)
class TrainTask:
    """One training run: the curriculum, its plain control, or supervised fine-tuning.

    Paths are relative to the run directory.

    Attributes:
        name: `distill`, `control`, `teacher_sft` or `student_sft`.
        fingerprint: Of all that the result depends on; names the checkpoints.
        run_dir: The run directory.
        stages: The plan.
        student: What is trained, as it is before.
        teacher: The frozen teacher; None where no stage distils, as in supervised fine-tuning.
        teacher_cache: Directory of the caches (`train`, `dev`); None to run the teacher live.
        teacher_fingerprint: Of the teacher that the caches must have been made by.
        tokenizer: Tokenizer directory.
        rows: The training rows.
        dev_rows: The dev rows.
        scores: Parquet file whose `rank` orders the rows; None for file order.
        train: Optimizer, batch and precision.
        distill: Loss and chunking.
        rollout: Responses of the student's own.
        hand_off: What the next stage, and the result, starts from.
        plateau: When a stage with `min_epochs` has converged.
        dev_generation: How dev answers are generated.
        max_dev_rows: Rows of the dev ROUGE-L, at most; None for all.
        max_tokens: Prompt and response together.
        gradient_checkpointing: Whether the student recomputes its activations.
        seed: Seed of the order and of dropout.
        collective_timeout_s: After so long a dead peer is noticed.
        output: Where the trained student goes.
        metrics: Where the metric stream goes.
        teacher_weight: Of the teacher's divergence beside those of the other teachers.
        teacher_stages: In which it teaches; None for all.
        teacher_sharded: Whether it is split over the workers, where it runs live.
        teacher_rows: Set -> the rows in the teacher's own tokens; None where its tokenizer is the student's.
        other_teachers: Further teachers.
        lora: Adapters that are trained in place of the student's weights; None to train these.
        rescoring: How rows are ranked anew before the stages that say so; None where none does.
    """

    name: str
    fingerprint: str
    run_dir: RunDirectory
    stages: tuple[Stage, ...]
    student: ModelRef
    teacher: ModelRef | None
    teacher_cache: str | None
    teacher_fingerprint: str
    tokenizer: str
    rows: RowsSummary
    dev_rows: RowsSummary
    scores: str | None
    train: TrainConfig
    distill: DistillConfig
    rollout: RolloutConfig
    hand_off: Literal["best", "last"]
    plateau: PlateauConfig
    dev_generation: GenerationConfig
    max_dev_rows: int | None
    max_tokens: int
    gradient_checkpointing: bool
    seed: int
    collective_timeout_s: float
    output: str
    metrics: str
    teacher_weight: float = 1.0
    teacher_stages: tuple[int, ...] | None = None
    teacher_sharded: bool = False
    teacher_rows: Mapping[str, RowsSummary] | None = None
    other_teachers: tuple[TeacherTask, ...] = ()
    lora: LoraConfig | None = None
    rescoring: Rescoring | None = None

    @property
    def teachers(self) -> tuple[TeacherTask, ...]:
        """All teachers; none for supervised fine-tuning."""
        if self.teacher is None:
            return ()
        first = TeacherTask(
            self.teacher,
            self.teacher_cache,
            self.teacher_fingerprint,
            self.teacher_weight,
            self.teacher_stages,
            self.teacher_sharded,
            self.teacher_rows,
        )
        return (first, *self.other_teachers)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of all stages; the most of them where a stage ends on convergence."""
        return sum(stage.num_steps for stage in self.stages)


# Training tasks from the config: the curriculum and its control, and supervised fine-tuning.

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
