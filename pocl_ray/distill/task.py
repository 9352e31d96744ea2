"""The task of a training worker: the parts of the config that it needs, and the places of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

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
from pocl_ray.tracking.run import TrackedRun, Tracking, memory
from pocl_ray.tracking.stream import Stream


@dataclass(frozen=True)
class TeacherTask:
    """One teacher of a training run.

    Attributes:
        ref: Frozen model.
        cache: Directory of its caches (`train`, `dev`), relative to the run directory; None to run it live.
        fingerprint: Fingerprint of the teacher that wrote the caches.
        weight: Weight of the teacher's divergence; the weights of a stage are normalised to sum 1.
        stages: Stages that use the teacher; None for all.
        sharded: Whether a live teacher is split over the workers.
        rows: Mapping of each set to the rows in the teacher's own tokens; None if it shares the student's tokenizer.
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
    """The settings for ranking the rows again between stages.

    Attributes:
        difficulty: Signals, their fusion, and settings of generation.
        seed: Seed of the answers and of ties.
        folder: Directory of the tables, relative to the run directory.
    """

    difficulty: DifficultyConfig
    seed: int
    folder: str


@dataclass(frozen=True)
class TrainTask:
    """One training run: the curriculum, its plain control, or supervised fine-tuning.

    Paths are relative to the run directory.

    Attributes:
        name: Name of the run: `distill`, `control`, `teacher_sft` or `student_sft`.
        fingerprint: Fingerprint of everything that the result depends on; it names the checkpoints.
        run_dir: Run directory.
        stages: Stages of the plan.
        student: Student before training.
        teachers: Frozen teachers; empty if no stage distils, as in supervised fine-tuning.
        tokenizer: Directory of the tokenizer.
        rows: Training rows.
        dev_rows: Dev rows.
        scores: Parquet file whose `rank` orders the rows; None for file order.
        train: Optimizer, batch and precision.
        distill: Loss and chunking.
        rollout: Settings of rollouts.
        hand_off: Checkpoint that the next stage starts from, and that is the result: the best or the last.
        plateau: Convergence of a stage with `min_epochs`.
        dev_generation: Settings of dev answers.
        max_dev_rows: Maximum rows of the dev ROUGE-L; None for all; 0: none are answered.
        max_tokens: Maximum tokens of prompt and response together.
        gradient_checkpointing: Whether the student recomputes its activations.
        seed: Seed of the order and of dropout.
        collective_timeout_s: Seconds after which a collective with a dead peer fails.
        output: Directory of the trained student.
        metrics: File of the metric stream.
        lora: Adapters that are trained in place of the student's weights; None to train the weights.
        rescoring: Settings for ranking the rows again before stages that need it; None if no stage does.
        frontier: Settings for drawing rows by their gaps; None if no stage does that.
        tracking: Trackers that receive the metric stream.
        until: Optimizer step at which training pauses with a checkpoint, before its result; None: it goes to its end.
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
    tracking: Tracking = field(default_factory=Tracking)
    until: int | None = None

    @property
    def identity(self) -> tuple[str, str]:
        """Name and fingerprint, under which checkpoints and the trackers' runs are found again."""
        return self.name, self.fingerprint

    def without_unread_answers(self) -> TrainTask:
        """Return the task without dev answers, unless training itself reads them; its weights come out the same."""
        reads = self.hand_off == "best" or any(stage.min_epochs is not None for stage in self.stages)
        return self if reads else replace(self, max_dev_rows=0)

    @property
    def num_steps(self) -> int:
        """The number of optimizer steps of all stages; the maximum if a stage ends on convergence."""
        return sum(stage.num_steps for stage in self.stages)

    @property
    def last_step(self) -> int:
        """The step at which training pauses or ends."""
        return self.num_steps if self.until is None else self.until

    @property
    def dev_rows_file(self) -> str:
        """The file of the losses of dev rows at the pause."""
        return f"{self.metrics.rpartition('/')[0]}/dev_rows-{self.until}.parquet"


RESCORED = "scores/stages"
"""The folder of the rankings between stages, next to the output of the run."""


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
    Without teachers, as when `kd_ratio` is 0 in all stages, no cache and no dev figures of a teacher are read.
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
        tracking=Tracking(config.tracking, config.name, config.model_dump(mode="json")),
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
            # Only a single teacher may have its own tokenizer.
            rows=(rows.for_teacher or None) if place == 0 else None,
        )
        for place, ((ref, fingerprint), one) in enumerate(
            zip(teachers, (config.teacher, *config.other_teachers), strict=False)
        )
    )


def cache_folder(config: Config, place: int) -> str | None:
    """Return the directory of a teacher's caches, by its index among the teachers; None if teachers run live."""
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

    `rows` are in the tokens of that model, and `tokenizer` is the directory of its tokenizer.

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
        seed=config.student_seed if role == "student" else config.seed,
        hand_off=sft.hand_off,
        gradient_checkpointing=config.student.gradient_checkpointing and role == "student",
        metrics=f"models/{role}_metrics.jsonl",
        # What distillation starts from is a plain model, whatever is written in the end.
        lora=lora.model_copy(update={"merge": True}) if role == "student" and lora is not None else None,
    )


def open_stream(task: TrainTask, records: Sequence[Mapping[str, Any]], warn: Callable[[str], object]) -> Stream | None:
    """Return the stream to the trackers of a training, which goes on after `records`; None if there are none.

    Args:
        task: Training task.
        records: Records of the metric stream so far.
        warn: Function that is called with a warning, from the thread of a tracker.
    """
    if not task.tracking.trackers:
        return None
    run = TrackedRun.begin(task.tracking, task.run_dir, *task.identity, records)
    return Stream(run, task.tracking.trackers, warn)


def send(stream: Stream, metrics: Sequence[Mapping[str, Any]], record: dict[str, Any]) -> None:
    """Send a record to the trackers if it is the last one of the metric stream; others are not logged.

    The record gets the memory of this process. So `metrics.jsonl` has everything that the trackers show, and they can
    be filled from it later.
    """
    if metrics and metrics[-1] is record:
        record.update(memory())
        stream.log(record)
