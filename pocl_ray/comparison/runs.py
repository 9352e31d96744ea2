"""The runs of a comparison, and the refusal of runs that cannot be compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pyarrow as pa

from pocl_ray.config.neutral import neutral_free
from pocl_ray.errors import StorageError, UserError
from pocl_ray.records import REFERENCES, STUDENT
from pocl_ray.report.figures import METRICS, figure_of, is_of_text
from pocl_ray.report.files import RunData, as_float, read_run, step_times
from pocl_ray.run_directory.claim import CONFIG
from pocl_ray.run_directory.digests import fingerprint
from pocl_ray.run_directory.file_shapes import damaged
from pocl_ray.run_directory.opening import PastRun
from pocl_ray.tracking.run import flat_settings

SUMMARY = "rows/summary.json"
# What a run is called and what it sends where changes nothing that a reader would compare.
UNTOLD = ("name",)


@dataclass(frozen=True)
class ComparedRun:
    """One run of a comparison.

    Attributes:
        label: Name that the page shows, which no other run has.
        run: Run directory and config.
        data: Files of the run.
    """

    label: str
    run: PastRun
    data: RunData


@dataclass(frozen=True)
class Cell:
    """One figure of one run: the mean and the spread over sampling seeds, or one greedy value without a spread.

    For a task of lm-eval `mean` is the figure, and `std` its standard error.
    """

    mean: float
    std: float = math.nan


@dataclass(frozen=True)
class Row:
    """One line of a table of figures: set, model and figure, with a cell for each run; None if a run has none."""

    set: str
    model: str
    figure: str
    cells: tuple[Cell | None, ...]


def compared_runs(runs: Sequence[PastRun]) -> list[ComparedRun]:
    """Read runs and check that they can be compared.

    Raises:
        UserError: There is one run only, or runs were judged on other rows, by another metric or with other settings.
        StorageError: A run is not finished, or cannot be read.
    """
    if len(runs) < 2:
        raise UserError("compare: one run alone cannot be compared; name two or more")
    if len({run.run_dir.uri for run in runs}) < len(runs):
        raise UserError("compare: a run is named twice")
    for run in runs:
        run.require(["distill", "evaluation"])
    compared = [ComparedRun(label, run, _read(run)) for label, run in zip(_labels(runs), runs, strict=True)]
    _check_sets(compared)
    for one, other in pairwise(compared):
        _check_metric(one, other)
        _check_rows(one, other)
        _check_settings(one, other)
    return compared


def _read(run: PastRun) -> RunData:
    data = read_run(run.run_dir)
    if not data.evaluation:
        raise StorageError(
            f"{run.place}: evaluation.json is gone or empty; have it made again with `pocl-ray run "
            f"{run.run_dir.uri_of(CONFIG)}`"
        )
    return data


def _labels(runs: Sequence[PastRun]) -> list[str]:
    """The names of the runs; the places where two have one name."""
    names = [run.config.name for run in runs]
    return names if len(set(names)) == len(names) else [run.place for run in runs]


def _check_metric(one: ComparedRun, other: ComparedRun) -> None:
    reads = [any(map(is_of_text, run.data.evaluation.values())) for run in (one, other)]
    if reads[0] != reads[1]:
        first, second = ("perplexity" if is_read else "ROUGE-L" for is_read in reads)
        raise UserError(
            f"compare: {one.label} was judged by {first} and {other.label} by {second}, which is another metric"
        )


def _check_sets(runs: Sequence[ComparedRun]) -> None:
    """Refuse runs without a set that all of them have: two by two they may share some, and the page would be empty."""
    if not common_sets(runs):
        told = "; ".join(f"{run.label} has {', '.join(sorted(run.data.evaluation))}" for run in runs)
        raise UserError(f"compare: no set is common to all runs: {told}")


def common_sets(runs: Sequence[ComparedRun]) -> list[str]:
    """Return the evaluation sets that all runs have."""
    return [name for name in runs[0].data.evaluation if all(name in run.data.evaluation for run in runs)]


def _check_rows(one: ComparedRun, other: ComparedRun) -> None:
    for name in common_sets((one, other)):
        counts, digests = zip(*(_rows_of(run, name) for run in (one, other)), strict=True)
        if digests[0] != digests[1]:
            raise UserError(
                f"compare: {one.label} and {other.label} were judged on other rows: their sets {name} have "
                f"{counts[0]} and {counts[1]} rows" + ("" if counts[0] != counts[1] else " with other references")
            )


def _rows_of(run: ComparedRun, name: str) -> tuple[int, str]:
    """The number of rows of a set, and a digest of their references; prompts may have another template."""
    run_dir = run.run.run_dir
    summary = run_dir.read_json(SUMMARY)["sets"].get(name)
    if summary is None:
        raise damaged(run_dir.uri_of(SUMMARY), f"no set {name}, which evaluation.json has")
    try:
        table = pa.ipc.open_file(pa.BufferReader(run_dir.read_bytes(summary["path"]))).read_all()
        return table.num_rows, fingerprint(table[REFERENCES].to_pylist())
    except (pa.ArrowException, KeyError, OSError) as error:
        raise damaged(run_dir.uri_of(summary["path"]), error) from None


def _check_settings(one: ComparedRun, other: ComparedRun) -> None:
    """Refuse figures of other decoding settings: their difference would not be the students'."""
    settings = [
        flat_settings(run.run.config.evaluation.model_dump(mode="json", include={"seeds", "generation"}))
        for run in (one, other)
    ]
    for key, value in settings[0].items():
        theirs = settings[1].get(key)
        if value != theirs and key != "generation.batch_rows":
            raise UserError(
                f"compare: answers were drawn with other settings: evaluation.{key} is {value} in {one.label} and "
                f"{theirs} in {other.label}"
            )


def config_differences(runs: Sequence[ComparedRun]) -> list[tuple[str, tuple[str, ...]]]:
    """Return each key whose value is not the same in all runs, with the values; a key that a run lacks is empty."""
    trees = [flat_settings(neutral_free(run.run.config)) for run in runs]
    keys = dict.fromkeys(key for tree in trees for key in tree if key not in UNTOLD)
    rows = [(key, tuple(tree.get(key, "") for tree in trees)) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def figure_rows(runs: Sequence[ComparedRun]) -> list[Row]:
    """Return the figures of all models on the sets that all runs have, the students first."""
    rows = []
    for name in common_sets(runs):
        found = [run.data.evaluation[name] for run in runs]
        models = dict.fromkeys([STUDENT, *(model for models in found for model in models)])
        for model in models:
            of_runs = [_cells(models.get(model, {})) for models in found]
            for figure in dict.fromkeys(figure for cells in of_runs for figure in cells):
                rows.append(Row(name, model, figure, tuple(cells.get(figure) for cells in of_runs)))
    return rows


def _cells(found: Mapping[str, Any]) -> dict[str, Cell]:
    """The figures of one model on one set, as evaluation.json holds them."""
    cells: dict[str, Cell] = {}
    for metric, label in METRICS.items():
        figure = figure_of(found, metric)
        cells |= {f"{label}, sampled": Cell(figure.mean, figure.std), f"{label}, greedy": Cell(figure.greedy)}
    for metric, label in (("perplexity", "perplexity"), ("ce_loss", "CE (nats/token)")):
        cells[label] = Cell(as_float(found.get(metric)))
    return {label: cell for label, cell in cells.items() if math.isfinite(cell.mean)}


@dataclass(frozen=True)
class Cost:
    """The cost of a run; a number that is not known is NaN.

    Attributes:
        label: Name of the run.
        num_steps: Optimizer steps of the distillation.
        num_tokens: Response tokens that it trained on.
        distill_s: Its wall time.
        tokens_per_s: Tokens of the last start of the distillation in a second.
        total_s: Wall time of all steps of the run but the report.
    """

    label: str
    num_steps: float
    num_tokens: float
    distill_s: float
    tokens_per_s: float
    total_s: float


def costs(runs: Sequence[ComparedRun]) -> list[Cost]:
    """Return the cost of each run."""
    found = []
    for run in runs:
        step = run.run.steps["distill"]
        counts = step.get("counts", {})
        total = sum(as_float(each.get("seconds", 0)) for name, each in run.run.steps.items() if name != "report")
        (time,) = step_times({"distill": step})
        num_steps, num_tokens = (as_float(counts.get(key)) for key in ("num_steps", "num_tokens"))
        found.append(Cost(run.label, num_steps, num_tokens, time.seconds, time.tokens_per_s, total))
    return found
