"""The results of a search: the table of trials, the winner after confirmation, and the winner's config."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pocl_ray.config import Config, ObjectiveConfig, TuneConfig
from pocl_ray.config.loading import dump_config
from pocl_ray.curriculum.hand_off import dev_loss, hand_off_figure
from pocl_ray.run_directory.storage import RunDirectory
from pocl_ray.tuning.candidates import Candidate, PlannedTrial

TRIALS = "tune/trials"
RECORD = "trial.json"
Status = Literal["running", "finished", "stopped", "failed", "diverged"]


@dataclass
class TrialRecord:
    """The record of one trial, `tune/trials/<name>/trial.json`, which is updated while the trial runs.

    Attributes:
        name: Name of its directory in `tune/trials`.
        candidate: Candidate that the trial trains.
        fingerprint: Fingerprint of its student.
        num_steps: Number of optimizer steps in its plan.
        num_samples: Number of training rows in its plan.
        status: State of the trial. `stopped`: by the scheduler; `diverged`: its loss was not finite.
        reason: Reason of a failure.
        reports: Reports to Tune, one for each dev evaluation; the last one is of the final student.
        seconds: Time from start to end, summed over all starts.
        start_s: Time from the last start to the first optimizer step.
        started_at: Time of the start, in UTC.
        node: Ray's id of the node of its first worker.
    """

    name: str
    candidate: Candidate
    fingerprint: str
    num_steps: int
    num_samples: int
    status: Status = "running"
    reason: str = ""
    reports: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    start_s: float | None = None
    started_at: str = ""
    node: str = ""

    @property
    def last(self) -> dict[str, Any]:
        """The last report, or an empty mapping before the first."""
        return self.reports[-1] if self.reports else {}

    def write(self, run_dir: RunDirectory) -> None:
        """Write the record to the run directory."""
        run_dir.write_json(f"{TRIALS}/{self.name}/{RECORD}", asdict(self))


def read_record(run_dir: RunDirectory, name: str) -> TrialRecord | None:
    """Return the record of a trial, or None if there is none."""
    rel = f"{TRIALS}/{name}/{RECORD}"
    if not run_dir.exists(rel):
        return None
    content = run_dir.read_json(rel, TrialRecord)
    return TrialRecord(**{**content, "candidate": Candidate(**content["candidate"])})


def figures_of(evaluations: Sequence[dict[str, Any]], hand_off: Literal["best", "last"]) -> dict[str, Any]:
    """Return the dev figures of the student that would be handed on now.

    With `best` these are the figures of the best evaluation in the current stage, with `last` those of the last
    evaluation.
    """
    last = evaluations[-1]
    chosen = last
    if hand_off == "best":
        of_stage = [e for e in evaluations if e["curriculum/stage"] == last["curriculum/stage"] and e["step"] > 0]
        chosen = max(of_stage or [last], key=hand_off_figure)
    return {key.removeprefix("eval/dev/"): value for key, value in chosen.items() if key.startswith("eval/dev/")}


RESULTS_PARQUET, RESULTS_CSV = "tune/results.parquet", "tune/results.csv"
BEST_CONFIG, BEST_STUDENT = "tune/best.yaml", "tune/best"
DECISIVE = "decisive"
"""The key, in a trial's reports to Ray Tune, of the number that schedulers compare; see the function of this name."""
TIE_SHARE = 1e-6  # of a figure from 0 to 100, or of a loss
FIGURES = ("rouge_l", "exact_match", "ce_loss", "kd_loss", "num_tokens")


@dataclass(frozen=True)
class Contender:
    """A trial, or the control, together with its repetitions on other seeds.

    Attributes:
        record: Record on the run's own seed.
        values: First objective by seed; the run's own seed comes first.
        losses: The dev loss by seed, which decides between equal means.
    """

    record: TrialRecord
    values: tuple[float, ...]
    losses: tuple[float, ...] = (math.inf,)

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """The standard deviation over seeds; None for a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Outcome:
    """The outcome of a search.

    Attributes:
        records: Records of the control, the trials and the repetitions.
        winner: Best trial; None if no trial reached its end.
        control: Control; None if there was none, or if it failed.
        contenders: Best trials, the best first.
    """

    records: tuple[TrialRecord, ...]
    winner: Contender | None
    control: Contender | None
    contenders: tuple[Contender, ...]


def best_first(records: Sequence[TrialRecord], objective: ObjectiveConfig) -> list[TrialRecord]:
    """Return the trials that reached their end, the best first by the first objective; dev loss decides ties."""
    finished = [r for r in records if r.candidate.kind == "trial" and r.status == "finished"]
    return sorted(
        finished,
        key=lambda r: (-objective.sign * r.last[objective.metric], dev_loss_of(r.last), r.candidate.number),
    )


def dev_loss_of(report: Mapping[str, Any]) -> float:
    """Return the dev loss of a trial's report."""
    return dev_loss({f"eval/dev/{key}": report[key] for key in ("kd_loss", "ce_loss") if key in report})


def decisive(report: Mapping[str, Any], objective: ObjectiveConfig) -> float:
    """Return the figure of an objective, moved so little by the dev loss that this decides between equal ones alone.

    Schedulers and samplers compare one number a trial. The share that the loss has is below `TIE_SHARE`, while two
    means over dev rows that differ do so by more.
    """
    loss = dev_loss_of(report)
    worse = 1.0 if math.isinf(loss) else loss / (1.0 + loss)
    return float(report[objective.metric]) - objective.sign * TIE_SHARE * worse


def constant_objective(records: Sequence[TrialRecord], objective: ObjectiveConfig) -> str:
    """Return a warning where all trials that reached their end agree in the first objective; empty where not."""
    found = [r.last[objective.metric] for r in records if r.candidate.kind == "trial" and r.status == "finished"]
    if len(found) < 2 or len(set(found)) > 1:
        return ""
    return (
        f"{objective.metric} is {found[0]:.4g} in all of {len(found)} trials, so it tells none from another and the "
        "dev loss names the winner; give tune.objectives another metric, such as kd_loss"
    )


def decide(records: Sequence[TrialRecord], tune: TuneConfig) -> Outcome:
    """Return the outcome. The winner is the repeated trial with the best mean over seeds, or else the best trial."""
    objective = tune.objectives[0]
    ranked = best_first(records, objective)
    if tune.confirm is not None:
        ranked = ranked[: tune.confirm.top_k]

    def contender(record: TrialRecord) -> Contender:
        again = [
            r.last
            for r in records
            if r.candidate.kind == "confirm"
            and r.candidate.number == record.candidate.number
            and r.status == "finished"
        ]
        reports = (record.last, *again)
        values = tuple(report[objective.metric] for report in reports)
        return Contender(record, values, tuple(map(dev_loss_of, reports)))

    contenders = [contender(record) for record in ranked]
    most = max((len(c.values) for c in contenders), default=0)
    # A trial that failed on another seed has fewer values. It must not win because of that.
    contenders.sort(key=lambda c: (most - len(c.values), -objective.sign * c.mean, statistics.fmean(c.losses)))
    controls = [r for r in records if r.candidate.kind == "control" and r.status == "finished"]
    return Outcome(
        records=tuple(records),
        winner=contenders[0] if contenders else None,
        control=contender(controls[0]) if controls else None,
        contenders=tuple(contenders),
    )


def pareto_front(records: Sequence[TrialRecord], objectives: Sequence[ObjectiveConfig]) -> set[str]:
    """Return the names of the finished trials that no other trial beats in every objective."""
    points = {
        r.name: [o.sign * r.last[o.metric] for o in objectives]
        for r in records
        if r.candidate.kind == "trial" and r.status == "finished"
    }

    def beaten(name: str) -> bool:
        own = points[name]
        return any(other != own and all(a >= b for a, b in zip(other, own, strict=True)) for other in points.values())

    return {name for name in points if not beaten(name)}


def table_rows(outcome: Outcome, tune: TuneConfig) -> list[dict[str, Any]]:
    """Return one row for each trial: parameters, metrics at the end and by stage, samples, seconds, status."""
    front = pareto_front(outcome.records, tune.objectives)
    num_stages = max((r["stage"] + 1 for record in outcome.records for r in record.reports), default=0)
    rows = []
    for record in outcome.records:
        candidate = record.candidate
        row: dict[str, Any] = {
            "trial": record.name,
            "kind": candidate.kind,
            "number": candidate.number,
            "seed": candidate.seed,
            "status": record.status,
            "reason": record.reason,
            "is_winner": outcome.winner is not None and outcome.winner.record.name == record.name,
            "is_pareto": record.name in front,
        }
        row.update({key: _cell(candidate.settings.get(key)) for key in tune.space})
        row.update({key: record.last.get(key) for key in FIGURES})
        row.update(num_steps=record.last.get("num_steps", 0), num_samples=record.last.get("num_samples", 0))
        row.update(planned_steps=record.num_steps, planned_samples=record.num_samples)
        row.update(
            seconds=record.seconds,
            start_s=record.start_s,
            started_at=record.started_at,
            node=record.node,
            fingerprint=record.fingerprint,
        )
        ends = {report["stage"]: report for report in record.reports}
        for stage in range(num_stages):
            for key in FIGURES[:4]:
                row[f"stage_{stage}/{key}"] = ends.get(stage, {}).get(key)
        rows.append(row)
    return rows


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, dict)) else value


def write_tables(run_dir: RunDirectory, rows: Sequence[dict[str, Any]]) -> None:
    """Write `tune/results.parquet` and `tune/results.csv`."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    for name, values in columns.items():  # a column of mixed types, such as schedules and numbers, becomes text
        kinds = {type(value) for value in values if value is not None}
        if len(kinds) > 1 and not kinds <= {int, float}:
            columns[name] = [None if value is None else str(value) for value in values]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    run_dir.write_bytes(RESULTS_PARQUET, sink.getvalue().to_pybytes())
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    run_dir.write_text(RESULTS_CSV, text.getvalue())


def best_config(planned: PlannedTrial) -> Config:
    """Return the config with which `pocl-ray run` trains the winner again, in a run directory of its own."""
    return planned.config.model_copy(update={"name": f"{planned.config.name}-best", "tune": None})


def write_winner(run_dir: RunDirectory, winner: Contender, planned: PlannedTrial) -> None:
    """Write `tune/best.yaml`, and the winner's student to `tune/best/`."""
    values = ", ".join(f"{key}={_cell(value)}" for key, value in winner.record.candidate.settings.items())
    shown = ", ".join(f"{value:.2f}" for value in winner.values)
    header = (
        f"# The winner of a search: {winner.record.candidate.label}, {values}.\n"
        f"# Its first objective on each seed, the one below first: {shown}.\n"
        f"# The student has the fingerprint {winner.record.fingerprint[:16]}.\n"
    )
    run_dir.write_text(BEST_CONFIG, header + dump_config(best_config(planned)))
    run_dir.publish(run_dir.local(f"{TRIALS}/{winner.record.name}/student"), BEST_STUDENT)
