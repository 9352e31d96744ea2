"""The results of an experiment: one record for each training and one row for each comparison, as Parquet and CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pocl_ray.arms import Arm
from pocl_ray.run_directory.storage import RunDirectory
from pocl_ray.trainings.statistics import FIGURES, PairedDifference, paired_difference

FOLDER = "experiment"
TRAININGS, COMPARISONS, CURVES = f"{FOLDER}/trainings", f"{FOLDER}/comparisons", f"{FOLDER}/curves"
DEV_ROWS = f"{FOLDER}/dev_rows.parquet"

Phase = Literal["screen", "confirm"]
Budget = Literal["steps", "flops"]


@dataclass(frozen=True)
class TrainingRecord:
    """One training, as `experiment/<phase>/<name>.json` holds it.

    Attributes:
        name: Name of the file, made of arm, seed and fingerprint.
        phase: `screen` if it is judged on dev rows, `confirm` if on the test rows.
        arm: Name of the arm.
        seed: Training seed.
        num_steps: Optimizer steps taken.
        num_tokens: Response tokens trained on.
        seconds: Wall time of training and judging.
        flops: FLOPs of scoring, refreshing and training.
        figures: Set -> figure -> value.
        curve: Dev figures at each evaluation.
        losses: Training loss, thinned.
        row_losses: `ce_loss`, and with a teacher `kl` -> step -> that loss of each dev row.
        failure: Reason why there are no figures; empty if there are.
    """

    name: str
    phase: Phase
    arm: str
    seed: int
    num_steps: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    flops: dict[str, float] = field(default_factory=dict)
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)
    losses: list[dict[str, float]] = field(default_factory=list)
    row_losses: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    failure: str = ""

    def write(self, run_dir: RunDirectory) -> None:
        """Write the record; the training then counts as done."""
        run_dir.write_json(_place(self.phase, self.name), asdict(self))


def read_record(run_dir: RunDirectory, phase: Phase, name: str) -> TrainingRecord | None:
    """Read a record; None where the training is not done."""
    place = _place(phase, name)
    return TrainingRecord(**run_dir.read_json(place, TrainingRecord)) if run_dir.exists(place) else None


def _place(phase: Phase, name: str) -> str:
    return f"{FOLDER}/{phase}/{name}.json"


@dataclass(frozen=True)
class Comparison:
    """The comparison of one arm with the baseline in one figure.

    Attributes:
        phase: Phase with the rows and seeds of the comparison.
        set: Name of the set.
        budget: `steps`: the baseline as it is; `flops`: the baseline for the FLOPs of the arm.
        arm: Name of the arm.
        baseline: Name of the arm that it is compared with.
        figure: One of `FIGURES`.
        arm_mean: Mean of the arm over the seeds that both have.
        baseline_mean: Mean of the baseline over these seeds.
        difference: Difference, paired by seed.
    """

    phase: Phase
    set: str
    budget: Budget
    arm: str
    baseline: str
    figure: str
    arm_mean: float
    baseline_mean: float
    difference: PairedDifference

    @property
    def verdict(self) -> str:
        """`ahead`, `behind` or `level`."""
        return self.difference.verdict(FIGURES[self.figure])


@dataclass(frozen=True)
class Outcome:
    """The results of an experiment.

    Attributes:
        arms: All arms of the config, in its order, and the baselines of equal FLOPs behind them.
        baseline: The arm that the others are compared with.
        screened: Arms that were screened, the baseline among them; empty without screening.
        judged: Arms that were judged on the test rows.
        records: All trainings.
        comparisons: Comparisons of all phases.
        notes: Notes for the reader.
    """

    arms: Mapping[str, Arm]
    baseline: str
    screened: tuple[str, ...]
    judged: tuple[str, ...]
    records: tuple[TrainingRecord, ...]
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...]


def compare(
    records: Sequence[TrainingRecord], pairs: Sequence[tuple[str, str, Budget]], phase: Phase
) -> list[Comparison]:
    """Compare arms on every set and figure, over the seeds on which both of a pair have figures.

    Args:
        records: Records of all phases.
        pairs: Arm, baseline and budget of each comparison.
        phase: Phase whose records are compared.
    """
    of_arm: dict[str, dict[int, TrainingRecord]] = {}
    for record in records:
        if record.phase == phase and not record.failure:
            of_arm.setdefault(record.arm, {})[record.seed] = record
    found = []
    for arm, baseline, budget in pairs:
        ours, theirs = of_arm.get(arm, {}), of_arm.get(baseline, {})
        seeds = [seed for seed in ours if seed in theirs]
        if len(seeds) < 2:
            continue
        for name, figures in ours[seeds[0]].figures.items():
            for figure in (each for each in FIGURES if each in figures):
                values = [[of[seed].figures[name][figure] for seed in seeds] for of in (ours, theirs)]
                difference = paired_difference(values[0], values[1], FIGURES[figure])
                means = (statistics.fmean(values[0]), statistics.fmean(values[1]))
                found.append(Comparison(phase, name, budget, arm, baseline, figure, *means, difference))
    return found


def training_rows(records: Sequence[TrainingRecord]) -> list[dict[str, Any]]:
    """Return one row for each training and set."""
    rows = []
    for record in records:
        common = {
            "phase": record.phase,
            "arm": record.arm,
            "seed": record.seed,
            "num_steps": record.num_steps,
            "num_tokens": record.num_tokens,
            "seconds": record.seconds,
            **{f"{key}_flops": record.flops.get(key, 0.0) for key in ("scoring", "refreshing", "training")},
            "failure": record.failure,
        }
        for name, figures in (record.figures or {"": {}}).items():
            rows.append({**common, "set": name, **{figure: figures.get(figure) for figure in FIGURES}})
    return rows


def comparison_rows(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Return one row for each comparison."""
    return [
        {
            **{key: value for key, value in asdict(one).items() if key != "difference"},
            **asdict(one.difference),
            "verdict": one.verdict,
        }
        for one in comparisons
    ]


def curve_rows(records: Sequence[TrainingRecord]) -> list[dict[str, Any]]:
    """Return one row for each dev evaluation of a training."""
    keys = ("rouge_l", "exact_match", "ce_loss", "kd_loss")
    return [
        {
            "phase": record.phase,
            "arm": record.arm,
            "seed": record.seed,
            "step": point["step"],
            "num_tokens": point["num_tokens"],
            **{key: point.get(key) for key in keys},
        }
        for record in records
        for point in record.curve
    ]


def dev_row_table(records: Sequence[TrainingRecord]) -> pa.Table:
    """Return one row for each dev row, training and measured step, with `ce_loss` and, if a teacher was read, `kl`."""
    parts = []
    for record in records:
        for step, ce_losses in record.row_losses.get("ce_loss", {}).items():
            num_rows = len(ce_losses)
            kl = record.row_losses.get("kl", {}).get(step)
            parts.append(
                pa.table(
                    {
                        "phase": [record.phase] * num_rows,
                        "arm": [record.arm] * num_rows,
                        "seed": pa.array([record.seed] * num_rows, pa.int64()),
                        "step": pa.array([int(step)] * num_rows, pa.int64()),
                        "row": pa.array(range(num_rows), pa.int64()),
                        "ce_loss": pa.array(ce_losses, pa.float64()),
                        "kl": pa.nulls(num_rows, pa.float64()) if kl is None else pa.array(kl, pa.float64()),
                    }
                )
            )
    return pa.concat_tables(parts) if parts else pa.table({})


def write_tables(run_dir: RunDirectory, records: Sequence[TrainingRecord], comparisons: Sequence[Comparison]) -> None:
    """Write trainings, comparisons and learning curves, each as Parquet and as CSV, and dev rows as Parquet."""
    dev_rows = dev_row_table(records)
    if dev_rows.num_rows:
        _write_parquet(run_dir, DEV_ROWS, dev_rows)
    tables = {TRAININGS: training_rows(records), COMPARISONS: comparison_rows(comparisons), CURVES: curve_rows(records)}
    for place, rows in tables.items():
        if rows:
            _write_table(run_dir, place, rows)


def _write_parquet(run_dir: RunDirectory, place: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    run_dir.write_bytes(place, sink.getvalue().to_pybytes())


def _write_table(run_dir: RunDirectory, place: str, rows: Sequence[Mapping[str, Any]]) -> None:
    _write_parquet(run_dir, f"{place}.parquet", pa.Table.from_pylist([dict(row) for row in rows]))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    run_dir.write_text(f"{place}.csv", text.getvalue())
