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
from pocl_ray.config.training import FRONTIER, FrontierConfig
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
        teachers: The frozen teachers; none where no stage distils, as in supervised fine-tuning.
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
        lora: Adapters that are trained in place of the student's weights; None to train these.
        rescoring: How rows are ranked anew before the stages that say so; None where none does.
        frontier: How rows are drawn by their gaps; None where no stage does that.
    """

    name: str
    fingerprint: str
    run_dir: RunDirectory
    stages: tuple[Stage, ...]
    student: ModelRef
    teachers: tuple[TeacherTask, ...]
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
    lora: LoraConfig | None = None
    rescoring: Rescoring | None = None
    frontier: FrontierConfig | None = None

    @property
    def num_steps(self) -> int:
        """Optimizer steps of all stages; the most of them where a stage ends on convergence."""
        return sum(stage.num_steps for stage in self.stages)


# How a config becomes a training task: for the curriculum and its control, and for supervised fine-tuning.

RESCORED = "scores/stages"
"""Tables of the rankings made between stages, beside the output of the run that made them."""


def curriculum_task(
    config: Config,
    name: str,
    fingerprint: str,
    run_dir: RunDirectory,
    stages: tuple[Stage, ...],
    student: ModelRef,
    teachers: Sequence[tuple[ModelRef, str]],
    rows: Rows,
    output: str,
) -> TrainTask:
    """Return the task that distils the student through `stages`; its result goes to `output`.

    `teachers` are the models of `config.teacher` and `config.other_teachers`, each with its fingerprint.
    Without any, as where `kd_ratio` is 0 in all stages, neither a cache nor dev figures of a teacher are read.
    """
    folder = output.removesuffix("student")
    rescores = any(stage.rescore for stage in stages)
    return TrainTask(
        name=name,
        fingerprint=fingerprint,
        run_dir=run_dir,
        stages=stages,
        student=student,
        teachers=_teacher_tasks(config, teachers, rows, len(stages)),
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
        lora=config.student.lora,
        rescoring=Rescoring(config.difficulty, config.seed, f"{folder}{RESCORED}") if rescores else None,
        frontier=config.curriculum.frontier if any(stage.order == FRONTIER for stage in stages) else None,
    )


def _teacher_tasks(
    config: Config, teachers: Sequence[tuple[ModelRef, str]], rows: Rows, num_stages: int
) -> tuple[TeacherTask, ...]:
    return tuple(
        TeacherTask(
            ref=ref,
            cache=cache_folder(config, place),
            fingerprint=fingerprint,
            weight=one.weight,
            stages=one.stages_of(num_stages),
            sharded=one.sharded,
            # Only a teacher that is alone may have a tokenizer of its own.
            rows=(rows.for_teacher or None) if place == 0 else None,
        )
        for place, ((ref, fingerprint), one) in enumerate(
            zip(teachers, (config.teacher, *config.other_teachers), strict=False)
        )
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
        teachers=(),
        rows=rows,
        output=f"models/{role}",
    )
    return replace(
        task,
        tokenizer=tokenizer,
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
