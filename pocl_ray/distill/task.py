"""What a training worker is told: the parts of the config that it needs, and where its inputs lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pocl_ray.config import (
    DifficultyConfig,
    DistillConfig,
    GenerationConfig,
    LoraConfig,
    PlateauConfig,
    RolloutConfig,
    TrainConfig,
)
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
