"""Column names, and the frozen records that one step hands to the next."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

# Columns of the rows (rows/<set>.arrow). `id` is the row's position in the file, 0-based.
ID = "id"
SOURCE_ROW = "source_row"
TOPIC = "topic"
PROMPT = "prompt"
REFERENCES = "references"
PROMPT_IDS = "prompt_ids"
RESPONSE_IDS = "response_ids"

# A numeric column of the user's own, carried along as a difficulty signal, is called `column:NAME`.
COLUMN = "column:"

# Columns of scores.parquet, beside one column per signal.
NUM_PROMPT_TOKENS = "num_prompt_tokens"
NUM_RESPONSE_TOKENS = "num_response_tokens"
RRF_SCORE = "rrf_score"
RANK = "rank"

# And of scores/stages/stage-<k>.parquet, beside these: where the row stood in the ranking before.
PREVIOUS_RANK = "previous_rank"

# Models of evaluation.json.
STUDENT = "student"
STUDENT_BEFORE = "student_before"
STUDENT_KD = "student_kd"
TEACHER = "teacher"

PROGRESS = "progress.json"
"""The last file of a checkpoint to be written; without it the checkpoint is incomplete."""


@dataclass(frozen=True)
class Ramp:
    """A value that moves over positions: stages, or the optimizer steps of a whole run.

    Attributes:
        points: The values that it goes through, evenly spaced from the first position to the last.
        shape: How it goes from one point to the next.
        num_positions: Length of the ramp.
        first_position: Position at which its owner starts; a stage counts its steps from there.
    """

    points: tuple[float, ...]
    shape: Literal["linear", "cosine"]
    num_positions: int
    first_position: int = 0

    def at(self, step: int) -> float:
        """Return the value at a step of the owner, from 0.

        Between points a and b at share s of the way: linear is a + s (b - a), cosine a + (1 - cos(pi s)) / 2 (b - a).
        Beyond the last position it stays.
        """
        share = min(1.0, (self.first_position + step) / max(1, self.num_positions - 1))
        segment, within = divmod(share * (len(self.points) - 1), 1)
        if int(segment) == len(self.points) - 1:
            return self.points[-1]
        if self.shape == "cosine":
            within = (1 - math.cos(math.pi * within)) / 2
        start, end = self.points[int(segment)], self.points[int(segment) + 1]
        return start + within * (end - start)


Order = Literal["rank", "random"]


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum: a slice of an order of the rows, and how it is trained on.

    Attributes:
        index: 0 for the first stage.
        buckets: The buckets that its rows lie in, wholly or in part; 0 is the first of the order.
        first_rank: Place of its first row in the order, from 0.
        end_rank: One past the place of its last row; the stage trains on `[first_rank, end_rank)`.
        num_epochs: Passes over these rows; the most of them where `min_epochs` is set.
        steps_per_epoch: Optimizer steps of a pass; rows that do not fill a global batch are left out of it.
        kd_temperature: Softens both distributions; that of the first step where it moves.
        kd_ratio: Weight of the distillation loss, the rest is cross-entropy; that of the first step where it moves.
        restart_optimizer: Whether the stage starts with fresh moments.
        lr_first_step: Position in the LR schedule at which the stage starts.
        lr_num_steps: Length of the LR schedule that the stage belongs to.
        max_steps: Ends the stage early, within an epoch; None: after its epochs.
        order: What the places count in: the ranking, 0 the easiest row, or an order drawn by the seed of the run.
        min_epochs: The stage ends on convergence, but not before so many passes; None: after its epochs.
        kd_temperature_ramp: Over the steps of the run; None: one value for the stage.
        kd_ratio_ramp: The same of `kd_ratio`.
        rescore: Whether the rows are ranked anew before it, by the student as it then is.
    """

    index: int
    buckets: tuple[int, ...]
    first_rank: int
    end_rank: int
    num_epochs: int
    steps_per_epoch: int
    kd_temperature: float
    kd_ratio: float
    restart_optimizer: bool
    lr_first_step: int
    lr_num_steps: int
    max_steps: int | None = None
    order: Order = "rank"
    min_epochs: int | None = None
    kd_temperature_ramp: Ramp | None = None
    kd_ratio_ramp: Ramp | None = None
    rescore: bool = False

    def kd_temperature_at(self, step: int) -> float:
        """Return the temperature of a step of the stage, from 0."""
        return self.kd_temperature if self.kd_temperature_ramp is None else self.kd_temperature_ramp.at(step)

    def kd_ratio_at(self, step: int) -> float:
        """Return the `kd_ratio` of a step of the stage, from 0."""
        return self.kd_ratio if self.kd_ratio_ramp is None else self.kd_ratio_ramp.at(step)

    @property
    def uses_teacher(self) -> bool:
        """Whether its loss has a distillation part at any step; with `kd_ratio` 0 the teacher is not read."""
        return self.kd_ratio > 0 if self.kd_ratio_ramp is None else max(self.kd_ratio_ramp.points) > 0

    @property
    def num_rows(self) -> int:
        """Rows that the stage trains on."""
        return self.end_rank - self.first_rank

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the stage; the most of them where `min_epochs` is set."""
        steps = self.num_epochs * self.steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def to_json(self) -> dict[str, Any]:
        """Return the stage as plan.json holds it."""
        return {**asdict(self), "buckets": list(self.buckets), "num_rows": self.num_rows, "num_steps": self.num_steps}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Stage:
        """Read a stage of plan.json."""
        kept = {k: v for k, v in data.items() if k not in ("num_rows", "num_steps")}
        for key in ("kd_temperature_ramp", "kd_ratio_ramp"):
            if kept.get(key) is not None:
                kept[key] = Ramp(**{**kept[key], "points": tuple(kept[key]["points"])})
        return cls(**{**kept, "buckets": tuple(kept["buckets"])})


@dataclass(frozen=True)
class RowsSummary:
    """What the rows step made of one set.

    Attributes:
        name: `train`, `dev`, or the name of a test set.
        path: Arrow file, relative to the run directory.
        num_rows: Usable rows.
        num_rejected: Rows in rejects.jsonl.
        num_prompt_tokens: Sum over rows.
        num_response_tokens: Sum over rows, the end-of-sequence token included.
        max_response_tokens: Longest response.
        fingerprint: Digest of the file's content.
    """

    name: str
    path: str
    num_rows: int
    num_rejected: int
    num_prompt_tokens: int
    num_response_tokens: int
    max_response_tokens: int
    fingerprint: str
