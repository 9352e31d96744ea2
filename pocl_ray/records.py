"""Column names, and the frozen records that one step hands to the next."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# Columns of the rows (rows/<set>.arrow). `id` is the row's position in the file, 0-based.
ID = "id"
SOURCE_ROW = "source_row"
TOPIC = "topic"
PROMPT = "prompt"
REFERENCES = "references"
PROMPT_IDS = "prompt_ids"
RESPONSE_IDS = "response_ids"

# Columns of scores.parquet, beside one column per signal.
NUM_PROMPT_TOKENS = "num_prompt_tokens"
NUM_RESPONSE_TOKENS = "num_response_tokens"
RRF_SCORE = "rrf_score"
RANK = "rank"

# Models of evaluation.json.
STUDENT = "student"
STUDENT_BEFORE = "student_before"
STUDENT_KD = "student_kd"
TEACHER = "teacher"


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum.

    Attributes:
        index: 0 for the first stage.
        buckets: The buckets it trains on, 0 the easiest.
        first_rank: Rank of its easiest row, from 0 in the sorted order.
        end_rank: One past the rank of its hardest row; the stage trains on `[first_rank, end_rank)`.
        num_epochs: Passes over these rows.
        steps_per_epoch: Optimizer steps of a pass; rows that do not fill a global batch are left out of it.
        kd_temperature: Softens both distributions.
        kd_ratio: Weight of the distillation loss; the rest is cross-entropy.
        restart_optimizer: Whether the stage starts with fresh moments.
        lr_first_step: Position in the LR schedule at which the stage starts.
        lr_num_steps: Length of the LR schedule that the stage belongs to.
        max_steps: Ends the stage early, within an epoch; None: after its epochs.
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

    @property
    def num_rows(self) -> int:
        """Rows that the stage trains on."""
        return self.end_rank - self.first_rank

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the stage."""
        steps = self.num_epochs * self.steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def to_json(self) -> dict[str, Any]:
        """Return the stage as plan.json holds it."""
        return {**asdict(self), "buckets": list(self.buckets), "num_rows": self.num_rows, "num_steps": self.num_steps}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Stage:
        """Read a stage of plan.json."""
        kept = {k: v for k, v in data.items() if k not in ("num_rows", "num_steps")}
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
