"""The files of a run directory, read once into one frozen record. A missing file becomes `None` or empty."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pocl_ray.config import Config
from pocl_ray.config.race import RACE
from pocl_ray.data.row_counts import told_cuts
from pocl_ray.records import STEPS, RowsSummary, Stage
from pocl_ray.run_directory.claim import CONFIG, parse_config
from pocl_ray.run_directory.file_shapes import damaged, parse_json

ROWS_FILES = {"reference": "rows/train.arrow", "teacher": "responses/train.arrow"}


class RunFiles(Protocol):
    """The part of a run directory that the report needs; every path is relative to it."""

    def exists(self, rel: str) -> bool:
        """Return whether the file exists."""

    def read_bytes(self, rel: str) -> bytes:
        """Return the file's content."""

    def write_bytes(self, rel: str, data: bytes) -> None:
        """Write the file atomically, parents included."""

    def uri_of(self, rel: str) -> str:
        """Return the file's absolute path or URL."""


@dataclass(frozen=True)
class Plan:
    """The content of plan.json.

    Attributes:
        num_rows: Number of training rows.
        bucket_ends: Number of rows up to the end of each bucket, in the order of the ranking.
        global_batch_rows: Rows of an optimizer step.
        stages: Stages of the curriculum.
    """

    num_rows: int
    bucket_ends: tuple[int, ...]
    global_batch_rows: int
    stages: tuple[Stage, ...]

    @property
    def stage_ends(self) -> tuple[int, ...]:
        """The number of optimizer steps at the end of each stage, counted over all stages."""
        return tuple(int(end) for end in np.cumsum([stage.num_steps for stage in self.stages]))


@dataclass(frozen=True)
class Metrics:
    """The content of metrics.jsonl as columns, ordered by step; a missing value is NaN.

    Attributes:
        train: Mapping of column names to float64 arrays with one value for each logged optimizer step.
        evals: Same mapping for the lines of dev evaluations.
        frontier: Same mapping for the lines of stages that draw their rows; empty for other rules.
    """

    train: dict[str, np.ndarray]
    evals: dict[str, np.ndarray]
    frontier: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Rejects:
    """The counts of rejects.jsonl.

    Attributes:
        num_rows: Number of lines of the file.
        counts: Mapping of (source, reason) to the number of rows.
        first_rows: Mapping of (source, reason) to the number of the first such row.
    """

    num_rows: int
    counts: Counter[tuple[str, str]]
    first_rows: dict[tuple[str, str], str]


@dataclass(frozen=True)
class RunData:
    """All data that the report uses."""

    config: Config | None
    config_text: str
    environment: dict[str, Any]
    steps: dict[str, dict[str, Any]]
    scores: dict[str, np.ndarray] | None
    rows: pa.Table | None
    plan: Plan | None
    metrics: Metrics | None
    control: Metrics | None
    evaluation: dict[str, dict[str, Any]] = field(default_factory=dict)
    rejects: Rejects | None = None
    rescored: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    cuts: list[str] = field(default_factory=list)
    pairs: dict[str, Any] = field(default_factory=dict)
    race: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, Any] = field(default_factory=dict)


def read_run(files: RunFiles) -> RunData:
    """Return the data that a run directory holds so far.

    Raises:
        StorageError: A file exists but cannot be parsed.
    """
    config = _read_config(files)
    metrics = _read_metrics(files, "metrics.jsonl")
    race = _json(files, "race.json") if config is not None and config.curriculum.pacing == RACE else {}
    plan = _read_plan(files, race)
    evaluation = _json(files, "evaluation.json")
    return RunData(
        config=config,
        config_text=_text(files, CONFIG),
        environment=_json(files, "environment.json"),
        steps=dict(_json(files, "manifest.json").get("steps") or {}),
        scores=_read_scores(files, "scores.parquet"),
        rows=_read_rows(files, ROWS_FILES["reference" if config is None else config.data.responses]),
        plan=_as_taken(plan, metrics),
        metrics=metrics,
        control=_read_metrics(files, "control/metrics.jsonl"),
        evaluation=dict(evaluation.get("sets") or {}),
        rejects=_read_rejects(files),
        rescored=_read_rescored(files, plan),
        cuts=_read_cuts(files),
        pairs=_json(files, "pairs.json"),
        race=race,
        tasks=_tasks(evaluation, config),
    )


def _tasks(evaluation: dict[str, Any], config: Config | None) -> dict[str, Any]:
    """The tasks of evaluation.json that the config names; those of an earlier one may stand there too."""
    found = evaluation.get("tasks") or {}
    named = found if config is None else [task.name for task in config.evaluation.tasks]
    return {name: found[name] for name in named if name in found}


def as_float(value: Any) -> float:
    """Return a number as float; anything else, such as None, text or more digits than a float has, becomes NaN."""
    try:
        return float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:
        return math.nan


def _text(files: RunFiles, rel: str) -> str:
    return files.read_bytes(rel).decode("utf-8", errors="replace") if files.exists(rel) else ""


def _json(files: RunFiles, rel: str) -> dict[str, Any]:
    found: dict[str, Any] = parse_json(files.read_bytes(rel), rel, files.uri_of(rel)) if files.exists(rel) else {}
    return found


def _read_config(files: RunFiles) -> Config | None:
    return parse_config(files.read_bytes(CONFIG), files.uri_of(CONFIG)) if files.exists(CONFIG) else None


def _read_rescored(files: RunFiles, plan: Plan | None) -> dict[int, dict[str, np.ndarray]]:
    """The rankings between stages, by the stage that uses each."""
    stages = [stage.index for stage in plan.stages if stage.rescore] if plan is not None else []
    found = {index: _read_scores(files, f"scores/stages/stage-{index}.parquet") for index in stages}
    return {index: table for index, table in found.items() if table is not None}


def _read_scores(files: RunFiles, rel: str) -> dict[str, np.ndarray] | None:
    if not files.exists(rel):
        return None
    try:
        table = pq.read_table(pa.BufferReader(files.read_bytes(rel)))
    except (pa.ArrowException, OSError) as error:
        raise damaged(files.uri_of(rel), error) from None
    return {
        name: table.column(name).to_numpy()
        for name in table.column_names
        if pa.types.is_integer(table.schema.field(name).type) or pa.types.is_floating(table.schema.field(name).type)
    }


def _read_rows(files: RunFiles, rel: str) -> pa.Table | None:
    if not files.exists(rel):
        return None
    try:
        return pa.ipc.open_file(pa.BufferReader(files.read_bytes(rel))).read_all()
    except (pa.ArrowException, OSError) as error:
        raise damaged(files.uri_of(rel), error) from None


def _read_plan(files: RunFiles, race: Mapping[str, Any]) -> Plan | None:
    data = _json(files, "plan.json")
    if not data:
        return None
    return Plan(
        num_rows=data["num_rows"],
        bucket_ends=tuple(data["bucket_ends"]),
        global_batch_rows=data["global_batch_rows"],
        # After a race those of the arm that it handed out.
        stages=tuple(Stage.from_json(stage) for stage in race.get("stages", data["stages"])),
    )


def _as_taken(plan: Plan | None, metrics: Metrics | None) -> Plan | None:
    """The plan with the steps that were taken: stages that end on convergence end at one of their evaluations."""
    if plan is None or metrics is None or "curriculum/stage" not in metrics.evals:
        return plan
    of_stage, steps = metrics.evals["curriculum/stage"], metrics.evals["step"]
    start, stages = 0, []
    for stage in plan.stages:
        own = steps[of_stage == stage.index]
        if stage.min_epochs is not None and len(own) and own[-1] > start:
            taken = int(own[-1]) - start
            stage = replace(stage, max_steps=taken, num_epochs=math.ceil(taken / stage.steps_per_epoch))
        start += stage.num_steps
        stages.append(stage)
    return replace(plan, stages=tuple(stages))


def _json_lines(files: RunFiles, rel: str) -> list[dict[str, Any]]:
    """The JSON lines of a file. The last one may be incomplete, since a killed run stops in mid-line."""
    lines = [line for line in _text(files, rel).splitlines() if line.strip()]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise damaged(f"{files.uri_of(rel)}:{number}", error) from None
        if not isinstance(row, dict):
            raise damaged(f"{files.uri_of(rel)}:{number}", "not a JSON object")
        rows.append(row)
    return rows


def _read_metrics(files: RunFiles, rel: str) -> Metrics | None:
    if not files.exists(rel):
        return None
    lines = _json_lines(files, rel)
    return Metrics(_columns(lines, "train/"), _columns(lines, "eval/"), _columns(lines, "frontier/"))


def _columns(lines: list[dict[str, Any]], prefix: str) -> dict[str, np.ndarray]:
    """The lines with a key of `prefix` as columns. A resumed run may log a step twice; the last line counts."""
    by_step = {as_float(line.get("step")): line for line in lines if any(key.startswith(prefix) for key in line)}
    steps = sorted(step for step in by_step if math.isfinite(step))
    names = dict.fromkeys(key for step in steps for key in by_step[step])
    return {name: np.array([as_float(by_step[step].get(name)) for step in steps]) for name in names}


def _read_cuts(files: RunFiles) -> list[str]:
    """One line for each set about the tokens that its rows lost when they were cut to length."""
    sets = _json(files, "rows/summary.json").get("sets") or {}
    return [line for _, line in told_cuts(RowsSummary(**summary) for summary in sets.values())]


def _read_rejects(files: RunFiles) -> Rejects | None:
    if not files.exists("rejects.jsonl"):
        return None
    counts: Counter[tuple[str, str]] = Counter()
    first_rows: dict[tuple[str, str], str] = {}
    for line in _json_lines(files, "rejects.jsonl"):
        key = (str(line.get("source", "")), str(line.get("reason", "")))
        counts[key] += 1
        first_rows.setdefault(key, str(line.get("row", "")))
    return Rejects(sum(counts.values()), counts, first_rows)


@dataclass(frozen=True)
class StepTime:
    """A step of the pipeline; a number that is not in the manifest is NaN.

    Attributes:
        name: Name in manifest.json.
        what: Description of the work.
        status: Status in manifest.json.
        seconds: Wall time.
        share_of_longest: Time relative to the longest step, 0 to 1.
        num_rows: Number of rows that the step handled.
        num_steps: Number of optimizer steps of its last start; those of an earlier one, or of the race before it, are
            not among them.
        num_tokens: Number of tokens that it handled in that start; in training only response tokens count.
        training_s: Wall time of the training in that start, a part of which may have passed beside another step.
    """

    name: str
    what: str
    status: str
    seconds: float
    share_of_longest: float
    num_rows: float
    num_steps: float
    num_tokens: float
    training_s: float

    @property
    def tokens_per_s(self) -> float:
        """The tokens per second, or NaN."""
        seconds = self.training_s if math.isfinite(self.training_s) else self.seconds
        return self.num_tokens / seconds if seconds > 0 else math.nan

    @property
    def is_beside(self) -> bool:
        """Whether a part of the training passed beside another step, and is not among the seconds of its own."""
        return self.training_s > self.seconds + 1.0


def step_times(steps: Mapping[str, Mapping[str, Any]]) -> list[StepTime]:
    """Return the steps of the manifest in the order of the data flow, without the report, which is not finished."""
    names = [name for name in STEPS if name in steps] + [name for name in steps if name not in STEPS]
    seconds = {name: as_float(steps[name].get("seconds")) for name in names}
    longest = max((s for name, s in seconds.items() if name != "report" and math.isfinite(s)), default=0.0)
    counts = {name: steps[name].get("counts") or {} for name in names}
    return [
        StepTime(
            name=name,
            what=STEPS[name].what if name in STEPS else "",
            status=str(steps[name].get("status", "")),
            seconds=seconds[name],
            share_of_longest=seconds[name] / longest if longest > 0 and math.isfinite(seconds[name]) else 0.0,
            num_rows=as_float(counts[name].get("num_rows")),
            num_steps=as_float(counts[name].get("num_steps")) - as_float(counts[name].get("earlier_steps", 0)),
            num_tokens=as_float(counts[name].get("num_tokens")) - as_float(counts[name].get("earlier_tokens", 0)),
            training_s=as_float(counts[name].get("training_s")),
        )
        for name in names
        if name != "report"
    ]


def total_seconds(steps: Mapping[str, Mapping[str, Any]]) -> float:
    """Return the wall time of all steps except the report."""
    seconds = (as_float(step.get("seconds")) for name, step in steps.items() if name != "report")
    return sum(s for s in seconds if math.isfinite(s))


@dataclass(frozen=True)
class RejectLine:
    """Rows of one source that were left out for one reason."""

    source: str
    reason: str
    num_rows: int
    first_row: str


def reject_lines(rejects: Rejects, limit: int = 20) -> list[RejectLine]:
    """Return at most `limit` reasons, the most frequent first."""
    return [
        RejectLine(source, reason, count, rejects.first_rows[source, reason])
        for (source, reason), count in rejects.counts.most_common(limit)
    ]


def is_done(steps: Mapping[str, Mapping[str, Any]], name: str) -> bool:
    """Return whether a step is done according to the manifest."""
    return steps.get(name, {}).get("status") == "done"
