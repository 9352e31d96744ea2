"""`experiment/report.html` and `experiment/table.md`: the comparisons with their intervals, and how they came about."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pocl_ray.config import Config
from pocl_ray.experiments.results import FOLDER, Comparison, Outcome, TrainingRecord
from pocl_ray.report.page import render_experiment
from pocl_ray.run_directory.storage import RunDirectory
from pocl_ray.trainings.statistics import FIGURES

if TYPE_CHECKING:
    from pocl_ray.report.plots import Plot

PAGE, TABLE = f"{FOLDER}/report.html", f"{FOLDER}/table.md"
BUDGETS = {"steps": "equal steps", "flops": "equal FLOPs"}
WORDS = {"ahead": "ahead of", "level": "level with", "behind": "behind"}
MAIN = ("rouge_l", "sampled_rouge_l", "kl")
"""The figures in the forest plots; the tables hold all figures."""


def write_page(run_dir: RunDirectory, config: Config, outcome: Outcome) -> str:
    """Write the page, the table in Markdown and the plots as PNG, and return the page's place."""
    from pocl_ray.experiments.plots import LABELS

    plots = {plot.name: plot for plot in _plots(outcome)}
    table = paper_table(outcome)
    context = {
        "name": config.name,
        "headline": headline(outcome),
        "outcome": outcome,
        "budgets": BUDGETS,
        "labels": LABELS,
        "figures": [figure for figure in FIGURES if any(one.figure == figure for one in outcome.comparisons)],
        "tables": _tables(outcome),
        "plots": plots,
        "paper": table,
        "arms": _arm_rows(outcome),
        "seeds": _seeds(outcome),
        "num_seconds": sum(record.seconds for record in outcome.records),
    }
    for plot in plots.values():
        run_dir.write_bytes(f"{FOLDER}/plots/{plot.name}.png", plot.png)
    run_dir.write_text(TABLE, paper_markdown(table))
    run_dir.write_text(PAGE, render_experiment(context))
    return run_dir.uri_of(PAGE)


def headline(outcome: Outcome) -> str:
    """Return the result in a few sentences: by each main figure the best arm, and how many arms were tried."""
    judged = [one for one in outcome.comparisons if one.phase == "confirm" and one.budget == "steps"]
    figures = [name for name in ("rouge_l", "sampled_rouge_l") if any(one.figure == name for one in judged)]
    sentences = [_best_arm(judged, figure) for figure in figures or [_main_figure(judged)]]
    text = " ".join(sentence for sentence in sentences if sentence)
    if not text:
        return "No arm has figures on two seeds, so nothing can be compared."
    if outcome.screened:
        text += f" {len(outcome.screened) - 1} arms were screened on dev rows."
    return text


def _best_arm(judged: Sequence[Comparison], figure: str) -> str:
    from pocl_ray.experiments.plots import LABELS

    found = [one for one in judged if one.figure == figure]
    if not found:
        return ""
    sign = 1 if FIGURES[figure] else -1
    best = max(found, key=lambda one: sign * one.difference.mean)
    difference = best.difference
    text = (
        f"{best.arm} is {WORDS[best.verdict]} {best.baseline} on {best.set}"
        if best.verdict != "level"
        else f"No arm is ahead of {best.baseline} on {best.set} by more than chance; the best one, {best.arm}, is level"
    )
    return (
        f"{text}: {LABELS[figure]} {difference.mean:+.2f} ± {difference.half_width:.2f} over "
        f"{difference.num_seeds} paired seeds, at equal steps."
    )


def _main_figure(comparisons: Sequence[Comparison]) -> str:
    return next((figure for figure in FIGURES if any(one.figure == figure for one in comparisons)), "rouge_l")


def _tables(outcome: Outcome) -> list[tuple[str, str, str, dict[str, dict[str, Comparison]]]]:
    """Return phase, set, budget and arm -> figure -> comparison of each table, the test rows first."""
    tables: dict[tuple[str, str, str], dict[str, dict[str, Comparison]]] = {}
    for one in outcome.comparisons:
        tables.setdefault((one.phase, one.set, one.budget), {}).setdefault(one.arm, {})[one.figure] = one
    return [(*key, rows) for key, rows in tables.items()]


def paper_table(outcome: Outcome) -> dict[str, Any]:
    """Return sampled ROUGE-L in the layout of the paper's tables: methods down, test sets across, their mean last.

    A cell is the mean over training seeds and its standard deviation; where there are no answers, it is the CE.
    """
    records = [r for r in outcome.records if r.phase == "confirm" and not r.failure]
    has_answers = any("sampled_rouge_l" in figures for record in records for figures in record.figures.values())
    figure = "sampled_rouge_l" if has_answers else "ce_loss"
    sets = list(dict.fromkeys(name for record in records for name in record.figures))
    rows = {}
    for arm in outcome.arms:
        own = [record for record in records if record.arm == arm]
        if own:
            cells = [_spread([record.figures[name][figure] for record in own]) for name in sets]
            mean = _spread([statistics.fmean(record.figures[name][figure] for name in sets) for record in own])
            rows[arm] = [*cells, *([mean] if len(sets) > 1 else [])]
    return {"figure": figure, "sets": [*sets, *(["mean"] if len(sets) > 1 else [])], "rows": rows}


def paper_markdown(table: Mapping[str, Any]) -> str:
    """Return the table as Markdown."""
    lines = [
        f"| method ({table['figure']}) | " + " | ".join(table["sets"]) + " |",
        "|---|" + "---:|" * len(table["sets"]),
        *(
            f"| {arm} | " + " | ".join(f"{mean:.2f} ± {std:.2f}" for mean, std in cells) + " |"
            for arm, cells in table["rows"].items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _arm_rows(outcome: Outcome) -> list[dict[str, Any]]:
    """One row for each arm: its changes, its cost, and the number of its trainings."""
    rows = []
    for arm in outcome.arms.values():
        own = [record for record in outcome.records if record.arm == arm.name]
        done = [record for record in own if not record.failure]
        means = {
            key: statistics.fmean(record.flops.get(key, 0.0) for record in done) if done else float("nan")
            for key in ("scoring", "refreshing", "training")
        }
        rows.append(
            {
                "name": arm.name,
                "overrides": arm.overrides,
                "num_steps": arm.num_steps,
                "flops": means,
                "total": sum(means.values()),
                "seconds": statistics.fmean(r.seconds for r in done) if done else float("nan"),
                "num_done": len(done),
                "failures": [record.failure for record in own if record.failure],
            }
        )
    return rows


def _seeds(outcome: Outcome) -> dict[str, list[int]]:
    return {
        phase: list(dict.fromkeys(record.seed for record in outcome.records if record.phase == phase))
        for phase in ("screen", "confirm")
    }


def _plots(outcome: Outcome) -> list[Plot]:
    from pocl_ray.experiments.plots import forest, learning_curves
    from pocl_ray.report.plots import render

    plots = []
    for phase, name, budget, rows in _tables(outcome):
        chosen = [one for of_arm in rows.values() for one in of_arm.values()]
        figures = [figure for figure in MAIN if any(one.figure == figure for one in chosen)]
        title = f"differences from the baseline on {name}, at {BUDGETS[budget]}"
        plots.append(render(f"forest_{phase}_{name}_{budget}", title, forest(chosen, figures or ["ce_loss"])))
    of_arm: dict[str, list[TrainingRecord]] = {}
    for record in outcome.records:
        if record.curve:
            of_arm.setdefault(record.arm, []).append(record)
    for figure, label in (("rouge_l", "dev ROUGE-L (0 to 100)"), ("ce_loss", "dev CE (nats/token)")):
        if any(figure in point for own in of_arm.values() for record in own for point in record.curve):
            plots.append(render(f"curves_{figure}", label, learning_curves(of_arm, figure, label)))
    return plots
