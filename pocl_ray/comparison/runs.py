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
from pocl_ray.report.figures import is_of_text
from pocl_ray.report.files import RunData, read_run, step_times
from pocl_ray.run_directory.claim import CONFIG
from pocl_ray.run_directory.digests import fingerprint
from pocl_ray.run_directory.opening import PastRun
from pocl_ray.tracking.run import flat_settings

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
    try:
        data = read_run(run.run_dir)
    except StorageError as error:
        raise StorageError(f"{run.place}: {error}") from None
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
    summary = run.run.run_dir.read_json("rows/summary.json")["sets"][name]
    try:
        table = pa.ipc.open_file(pa.BufferReader(run.run.run_dir.read_bytes(summary["path"]))).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise StorageError(f"{run.run.run_dir.uri_of(summary['path'])}: cannot be read ({error})") from None
    return table.num_rows, fingerprint(table[REFERENCES].to_pylist())


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
    cells = {}
    for metric, label in (("rouge_l", "ROUGE-L"), ("exact_match", "exact match")):
        if metric in found:
            spread = found[metric]["std"] if len(found[metric]["by_seed"]) > 1 else math.nan
            cells[f"{label}, sampled"] = Cell(found[metric]["mean"], spread)
        if metric in found.get("greedy", {}):
            cells[f"{label}, greedy"] = Cell(found["greedy"][metric])
    for metric, label in (("perplexity", "perplexity"), ("ce_loss", "CE (nats/token)")):
        if isinstance(found.get(metric), (int, float)):
            cells[label] = Cell(float(found[metric]))
    return cells


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
        total = sum(float(each.get("seconds", 0)) for name, each in run.run.steps.items() if name != "report")
        (time,) = step_times({"distill": step})
        num_steps, num_tokens = (float(counts.get(key, math.nan)) for key in ("num_steps", "num_tokens"))
        found.append(Cost(run.label, num_steps, num_tokens, time.seconds, time.tokens_per_s, total))
    return found
