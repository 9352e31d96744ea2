"""The page and the table of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from pocl_ray.comparison.compared_tasks import ComparedTasks
from pocl_ray.comparison.paired import Difference, PairTable
from pocl_ray.comparison.plots import curves_of_runs
from pocl_ray.comparison.runs import Cell, ComparedRun, Row, config_differences, costs, figure_rows
from pocl_ray.records import STUDENT
from pocl_ray.report.curves import Curve, curve_of
from pocl_ray.report.headline import PAIR_FIGURES, model_names
from pocl_ray.report.page import render_comparison, signed
from pocl_ray.report.plots import Plot, render
from pocl_ray.run_directory.storage import replacing_file

AXES = {
    "eval/dev/rouge_l": "dev ROUGE-L (0 to 100)",
    "eval/dev/ce_loss": "dev CE (nats/token)",
    "eval/dev/kd_loss": "dev KD loss (nats/token)",
}


def write_comparison(runs: Sequence[ComparedRun], pairs: PairTable, tasks: ComparedTasks, path: Path) -> None:
    """Write the page of a comparison; everything that comes from the runs is escaped.

    Raises:
        StorageError: The file cannot be written.
    """
    rows = figure_rows(runs)
    context = {
        "labels": [run.label for run in runs],
        "places": [run.run.place for run in runs],
        "students": [(row, best_of(row)) for row in rows if row.model == STUDENT],
        "others": [(row, best_of(row)) for row in rows if row.model != STUDENT],
        "pairs": pairs,
        "tasks": tasks,
        "names": model_names(None),
        "differences": config_differences(runs),
        "plots": dev_plots(runs),
        "costs": costs(runs),
    }
    with replacing_file(path, "--out") as new:
        new.write_text(render_comparison(context), encoding="utf-8", errors="replace")


def dev_plots(runs: Sequence[ComparedRun]) -> list[Plot]:
    """Return the dev figures of all runs over optimizer steps, each figure on one axis."""
    plots = []
    for key, label in AXES.items():
        curves: dict[str, Curve] = {}
        for run in runs:
            curve = curve_of(run.data.metrics.evals, key) if run.data.metrics is not None else None
            if curve is not None:
                curves[run.label] = curve
        if curves:
            plots.append(render(f"compare_{key.rpartition('/')[2]}", label, curves_of_runs(curves, label)))
    return plots


def best_of(row: Row) -> int | None:
    """Return the run whose figure is ahead of all others by more than both spreads; None without spreads."""
    sign = -1 if row.figure.startswith(("perplexity", "CE")) else 1
    known = [(sign * cell.mean, cell.std, at) for at, cell in enumerate(row.cells) if cell is not None]
    if len(known) < 2:
        return None
    (first, own, best), (second, its, _) = sorted(known, reverse=True)[:2]
    return best if first - second > own + its else None  # never with NaN, which a figure without a spread has


def figures_table(runs: Sequence[ComparedRun], pairs: PairTable, tasks: ComparedTasks) -> Table:
    """Return the students' figures as a table for the terminal, with what the pairs say, tasks, time and tokens."""
    table = Table("set", "figure")
    for run in runs:
        table.add_column(Text(run.label), justify="right")
    for row in (row for row in figure_rows(runs) if row.model == STUDENT):
        table.add_row(Text(row.set), row.figure, *_texts(row.cells, best_of(row)))
    _add_pairs(table, runs, pairs)
    if tasks.students:
        table.add_section()
    for line in tasks.students:
        task, metric = (Text(text.strip()) for text in (line.row.task, f"{line.row.metric} {line.row.arrow}"))
        table.add_row(task, metric, *_texts(line.cells, line.best, places=4))
    spent = costs(runs)
    table.add_section()
    table.add_row("", "optimizer steps", *(f"{cost.num_steps:,.0f}" for cost in spent))
    table.add_row("", "response tokens", *(f"{cost.num_tokens:,.0f}" for cost in spent))
    table.add_row("", "distillation, s", *(f"{cost.distill_s:,.0f}" for cost in spent))
    return table


def _add_pairs(table: Table, runs: Sequence[ComparedRun], pairs: PairTable) -> None:
    """Add the differences over seeds of training, with their 95 % intervals."""
    lines = {
        "less plain distillation": [(row, row.over_control) for row in pairs.rows],
        f"less {runs[0].label}": [(row, row.over_first) for row in pairs.rows],
    }
    for than, found in lines.items():
        shown = [(row, cells) for row, cells in found if row.figure in PAIR_FIGURES and any(cells)]
        if shown:
            table.add_section()
        for row, cells in shown:
            texts = [
                Text(_interval(one, row.places), style="bold" if one is not None and one.verdict != "level" else "")
                for one in cells
            ]
            table.add_row(Text(row.set), Text(f"{row.label}, {than}"), *texts)


def _interval(one: Difference | None, places: int) -> str:
    if one is None:
        return "-"
    mean, low, high = (signed(end, places) for end in (one.paired.mean, one.paired.t_low, one.paired.t_high))
    return f"{mean} ({low} to {high})"


def _texts(cells: Sequence[Cell | None], best: int | None, places: int = 2) -> list[Text]:
    """The figures of a line, the best one in bold."""
    return [Text(_shown(cell, places), style="bold" if at == best else "") for at, cell in enumerate(cells)]


def _shown(cell: Cell | None, places: int) -> str:
    if cell is None:
        return "-"
    spread = f" ± {cell.std:.{places}f}" if math.isfinite(cell.std) else ""
    return f"{cell.mean:.{places}f}{spread}"
