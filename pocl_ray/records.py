"""Column names, and the frozen records that one step passes to the next."""

from __future__ import annotations

import math
from collections.abc import Mapping
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

# A numeric column of the user's data that serves as a difficulty signal is called `column:NAME`.
COLUMN = "column:"

# Columns of scores.parquet, in addition to one column for each signal.
NUM_PROMPT_TOKENS = "num_prompt_tokens"
NUM_RESPONSE_TOKENS = "num_response_tokens"
RRF_SCORE = "rrf_score"
RANK = "rank"

# The signal by which frontier pacing draws rows until training has seen them.
GAP = "teacher_student_kl"

# A further column of scores/stages/stage-<k>.parquet: the rank of the row in the ranking before.
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
        points: Values of the ramp, evenly spaced from the first position to the last.
        shape: Shape of the ramp between two points.
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
        After the last position the value stays the same.
        """
        share = min(1.0, (self.first_position + step) / max(1, self.num_positions - 1))
        segment, within = divmod(share * (len(self.points) - 1), 1)
        if int(segment) == len(self.points) - 1:
            return self.points[-1]
        if self.shape == "cosine":
            within = (1 - math.cos(math.pi * within)) / 2
        start, end = self.points[int(segment)], self.points[int(segment) + 1]
        return start + within * (end - start)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Ramp:
        """Return a ramp from its form in plan.json."""
        return cls(**{**data, "points": tuple(data["points"])})


Order = Literal["rank", "random", "frontier"]


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum: a slice of an order of the rows, and the settings of its training.

    Attributes:
        index: Index of the stage, from 0.
        buckets: Buckets of its rows, complete or in part; 0 is the first in the order.
        first_rank: Place of its first row in the order, from 0.
        end_rank: Place after its last row; the stage trains on `[first_rank, end_rank)`.
        num_epochs: Number of passes over these rows; the maximum if `min_epochs` is set.
        steps_per_epoch: Optimizer steps of a pass; rows that do not fill a global batch are left out.
        kd_temperature: Temperature that softens both distributions; if it moves, the value at the first step.
        kd_ratio: Weight of the distillation loss, the rest is cross-entropy; if it moves, the value at the first step.
        restart_optimizer: Whether the stage starts with new moments.
        lr_first_step: Position in the LR schedule at which the stage starts.
        lr_num_steps: Length of the LR schedule that the stage belongs to.
        max_steps: Number of steps after which the stage ends within an epoch; None: it ends after its epochs.
        order: Order that the places refer to: the ranking, with the easiest row at 0, or an order drawn by the run's
            seed. With `frontier` there are no places: the stage draws its samples from all rows by their gaps, some
            of them more than once, and has one epoch of as many steps as it takes.
        min_epochs: Minimum number of passes of a stage that ends on convergence; None: it ends after its epochs.
        kd_temperature_ramp: Ramp of the temperature over the steps of the run; None: one value for the stage.
        kd_ratio_ramp: Ramp of `kd_ratio` over the steps of the run; None: one value for the stage.
        rescore: Whether the current student ranks the rows again before the stage.
        loss_ramps: Ramps of the losses' parameters that move over the run, each with its key in the config, such as
            `distill.loss_args.beta`.
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
    loss_ramps: tuple[tuple[str, Ramp], ...] = ()

    def kd_temperature_at(self, step: int) -> float:
        """Return the temperature of a step of the stage, from 0."""
        return self.kd_temperature if self.kd_temperature_ramp is None else self.kd_temperature_ramp.at(step)

    def kd_ratio_at(self, step: int) -> float:
        """Return the `kd_ratio` of a step of the stage, from 0."""
        return self.kd_ratio if self.kd_ratio_ramp is None else self.kd_ratio_ramp.at(step)

    def loss_args_at(self, step: int, section: str = "") -> dict[str, float]:
        """Return the parameters of a loss that move, at a step of the stage, from 0.

        Args:
            step: Step of the stage.
            section: `distill` or `rollout` for the parameters of one loss by name; empty: all, by their keys.
        """
        prefix = f"{section}.loss_args." if section else ""
        return {key.removeprefix(prefix): ramp.at(step) for key, ramp in self.loss_ramps if key.startswith(prefix)}

    @property
    def moving(self) -> dict[str, str]:
        """The settings of the loss that a table of stages shows, each with its heading: two, and what else moves."""
        headings = {key: key.removeprefix("distill.").replace("loss_args.", "") for key, _ in self.loss_ramps}
        return {"kd_temperature": "kd_temperature", "kd_ratio": "kd_ratio", **headings}

    def setting_at(self, key: str, step: int) -> float:
        """Return one of the settings of `moving` at a step of the stage, from 0."""
        known = {"kd_temperature": self.kd_temperature_at, "kd_ratio": self.kd_ratio_at}
        return known[key](step) if key in known else dict(self.loss_ramps)[key].at(step)

    @property
    def uses_teacher(self) -> bool:
        """Return whether the loss has a distillation part at any step; with `kd_ratio` 0 the teacher is not read."""
        return self.kd_ratio > 0 if self.kd_ratio_ramp is None else max(self.kd_ratio_ramp.points) > 0

    @property
    def num_rows(self) -> int:
        """The number of rows that the stage trains on."""
        return self.end_rank - self.first_rank

    @property
    def num_steps(self) -> int:
        """The number of optimizer steps of the stage; the maximum if `min_epochs` is set."""
        steps = self.num_epochs * self.steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def to_json(self) -> dict[str, Any]:
        """Return the stage in the form of plan.json."""
        content = {**asdict(self), "buckets": list(self.buckets), "num_rows": self.num_rows}
        content |= {"num_steps": self.num_steps, "loss_ramps": {key: asdict(ramp) for key, ramp in self.loss_ramps}}
        if not self.loss_ramps:  # a newer key counts, in a fingerprint too, only if it is used
            del content["loss_ramps"]
        return content

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Stage:
        """Return a stage from its form in plan.json."""
        kept = {k: v for k, v in data.items() if k not in ("num_rows", "num_steps")}
        for key in ("kd_temperature_ramp", "kd_ratio_ramp"):
            if kept.get(key) is not None:
                kept[key] = Ramp.from_json(kept[key])
        ramps = tuple((key, Ramp.from_json(ramp)) for key, ramp in kept.get("loss_ramps", {}).items())
        return cls(**{**kept, "buckets": tuple(kept["buckets"]), "loss_ramps": ramps})


@dataclass(frozen=True)
class RowsSummary:
    """The result of step `rows` for one set.

    Attributes:
        name: Name of the set: `train`, `dev`, or the name of a test set.
        path: Arrow file, relative to the run directory.
        num_rows: Number of usable rows.
        num_rejected: Number of rows in rejects.jsonl.
        num_prompt_tokens: Number of prompt tokens of all rows.
        num_response_tokens: Number of response tokens of all rows, including end-of-sequence tokens.
        max_response_tokens: Tokens of the longest response.
        fingerprint: Digest of the file's content.
        num_cut_prompts: Number of rows of the source whose prompt lost tokens, turns or a part of its document.
        num_cut_responses: Number of rows of the source whose response lost its end.
        num_lost_tokens: Number of tokens that prompts and responses lost.
        num_special: Number of rows of the source with special tokens written as text, which are read as text.
    """

    name: str
    path: str
    num_rows: int
    num_rejected: int
    num_prompt_tokens: int
    num_response_tokens: int
    max_response_tokens: int
    fingerprint: str
    num_cut_prompts: int = 0
    num_cut_responses: int = 0
    num_lost_tokens: int = 0
    num_special: int = 0


@dataclass(frozen=True)
class Step:
    """One step of the data flow; the manifest and the report read the table of them, the documentation shows it.

    Attributes:
        name: Name in the manifest, the terminal and the report.
        what: Its work in a few words.
        depends_on: Steps whose results it reads; some configs need only some of them.
        writes: Files and directories that it writes to the run directory; some configs need only some of them.
        cluster: Whether it needs Ray: always, never, or only if it trains a model.
    """

    name: str
    what: str
    depends_on: tuple[str, ...]
    writes: tuple[str, ...]
    cluster: Literal["always", "to train", "never"] = "never"


STEPS = {
    step.name: step
    for step in (
        Step("tokenizer", "tokenizer fetched or trained", (), ("tokenizer/", "teacher_tokenizer/")),
        Step("rows", "rows read, checked and tokenized", ("tokenizer",), ("rows/", "rejects.jsonl")),
        Step("teacher", "teacher loaded or fine-tuned", ("tokenizer", "rows"), ("models/",), "to train"),
        Step(
            "responses",
            "training prompts answered by the teacher",
            ("tokenizer", "rows", "teacher"),
            ("responses/", "rejects.jsonl"),
            "always",
        ),
        Step(
            "student",
            "student loaded, cut or fine-tuned",
            ("tokenizer", "rows", "teacher", "responses"),
            ("models/",),
            "to train",
        ),
        Step("plan", "buckets and stages", ("rows", "responses"), ("plan.json",)),
        Step(
            "scores",
            "difficulty and teacher cache",
            ("rows", "responses", "teacher", "student"),
            ("scores/signals.parquet", "teacher_cache/"),
            "always",
        ),
        Step("ranking", "signals fused into one order", ("scores",), ("scores.parquet",)),
        Step(
            "race",
            "plain distillation against curricula, until one is left",
            ("plan", "ranking", "teacher", "student"),
            ("race.json", "race/"),
            "always",
        ),
        Step(
            "distill",
            "distillation, all stages",
            ("plan", "ranking", "race", "teacher", "student"),
            ("student/", "metrics.jsonl", "scores/stages/"),
            "always",
        ),
        Step(
            "control",
            "plain distillation as control",
            ("plan", "ranking", "teacher", "student", "distill"),
            ("control/",),
            "always",
        ),
        Step(
            "evaluation",
            "answers generated and scored",
            ("rows", "teacher", "student", "distill", "control"),
            ("evaluation.json", "predictions.parquet"),
            "always",
        ),
        Step(
            "tasks",
            "tasks of lm-eval on each model",
            ("teacher", "student", "distill", "control", "evaluation"),
            ("evaluation.json", "tasks/"),
            "always",
        ),
        Step(
            "pairs",
            "curriculum and control in pairs, on further seeds",
            ("rows", "plan", "ranking", "teacher", "student"),
            ("pairs.json", "pairs/"),
            "always",
        ),
        Step(
            "report", "report and model card", ("evaluation", "tasks", "pairs"), ("report.html", "report.md", "plots/")
        ),
    )
}
"""Every step by name; a step comes after those that it depends on."""


# Adapters.

_LITTLE = 0.5  # the share of adapted weights under which the user is warned


@dataclass(frozen=True)
class Coverage:
    """The share of a student that its adapters change, among all matrices but those of embeddings and LM head.

    Attributes:
        num_weights: Number of weights in these matrices.
        num_adapted: Number of weights in those that an adapter changes.
        left_out: Ends of the names of fused experts that no adapter changes.
    """

    num_weights: int
    num_adapted: int
    left_out: tuple[str, ...] = ()

    @property
    def is_little(self) -> bool:
        """Whether most of the layers stay as they are."""
        return self.num_adapted < _LITTLE * self.num_weights

    def counts(self) -> dict[str, int]:
        """Return both numbers, for the manifest."""
        return {"num_layer_weights": self.num_weights, "num_adapted_weights": self.num_adapted}

    @staticmethod
    def of_counts(counts: Mapping[str, Any]) -> Coverage | None:
        """Return what `counts` wrote; None if it is not there."""
        if "num_adapted_weights" not in counts:
            return None
        return Coverage(counts["num_layer_weights"], counts["num_adapted_weights"])

    def __str__(self) -> str:
        share = self.num_adapted / max(1, self.num_weights)
        text = f"adapters change {self.num_adapted:,} of the {self.num_weights:,} weights in the student's layers"
        if self.is_little and self.left_out:
            names = ", ".join(self.left_out)
            return f"{text} ({share:.0%}); to adapt experts too, set student.lora.target_parameters: [{names}]"
        return f"{text} ({share:.0%})"
