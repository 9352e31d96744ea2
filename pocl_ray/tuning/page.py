"""The page `tune/report.html`: the trials, the keys that mattered, and the winner next to the control."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pocl_ray.config import Config
from pocl_ray.report.page import render_search
from pocl_ray.run_directory.storage import RunDirectory
from pocl_ray.tuning.candidates import Planner
from pocl_ray.tuning.results import Contender, Outcome, TrialRecord, pareto_front
from pocl_ray.tuning.watching import short_key, values_text

if TYPE_CHECKING:
    from pocl_ray.report.plots import Plot
    from pocl_ray.tuning.plots import Point

PAGE = "tune/report.html"
TEMPERATURE_RANGE = "kd_temperature, last stage less first"
LABELS = {
    "rouge_l": "dev ROUGE-L (0 to 100)",
    "exact_match": "dev exact match (0 to 100)",
    "ce_loss": "dev CE (nats/token)",
    "kd_loss": "dev KD loss (nats/token)",
    "num_tokens": "training tokens",
    "num_samples": "training samples",
    "num_steps": "optimizer steps",
    "seconds": "seconds",
}


def write_page(run_dir: RunDirectory, config: Config, outcome: Outcome, planner: Planner, num_skipped: int) -> str:
    """Write the page of a search and its plots as PNG, and return the place of the page.

    Args:
        run_dir: Run directory.
        config: Base config.
        outcome: Result of the search.
        planner: Planner, which gives the stages of a trial.
        num_skipped: Number of samples that were drawn again.
    """
    assert config.tune is not None
    objective = config.tune.objectives[0]
    plots = {plot.name: plot for plot in _plots(config, outcome, planner)}
    context = {
        "name": config.name,
        "metric": objective.metric,
        "label": LABELS[objective.metric],
        "is_max": objective.sign > 0,
        "headline": headline(outcome, config),
        "outcome": outcome,
        "winner": outcome.winner,
        "control": outcome.control,
        "difference": _difference(outcome),
        "contenders": [*outcome.contenders, *([outcome.control] if outcome.control else [])],
        "counts": _counts(outcome),
        "num_skipped": num_skipped,
        "trials": outcome.records,
        "changes": _changes(outcome.winner, config),
        "values_text": values_text,
        "plots": plots,
        "by_key": [plot for name, plot in plots.items() if name.startswith("by_")],
        "seconds": sum(record.seconds for record in outcome.records),
    }
    for plot in plots.values():
        run_dir.write_bytes(f"tune/plots/{plot.name}.png", plot.png)
    run_dir.write_text(PAGE, render_search(context))
    return run_dir.uri_of(PAGE)


def headline(outcome: Outcome, config: Config) -> str:
    """Return the result in one sentence, for the page and the terminal."""
    assert config.tune is not None
    metric = config.tune.objectives[0].metric
    if outcome.winner is None:
        return "No trial reached its end."
    winner = outcome.winner
    text = f"{winner.record.candidate.label} won with {metric} {_mean_text(winner)}"
    if outcome.control is None:
        return f"{text}."
    control = outcome.control
    sign = config.tune.objectives[0].sign
    difference = sign * (winner.mean - control.mean)
    spread = max(winner.std or 0.0, control.std or 0.0)
    if abs(difference) <= spread:
        return f"{text}, level with plain distillation at {_mean_text(control)}: they differ by less than seeds do."
    than = "better" if difference > 0 else "worse"
    return f"{text}, {abs(difference):.2f} {than} than plain distillation at {_mean_text(control)}."


def _mean_text(contender: Contender) -> str:
    spread = "" if contender.std is None else f" ± {contender.std:.2f}"
    return f"{contender.mean:.2f}{spread} ({len(contender.values)} {'seeds' if contender.std is not None else 'seed'})"


def _difference(outcome: Outcome) -> float | None:
    if outcome.winner is None or outcome.control is None:
        return None
    return outcome.winner.mean - outcome.control.mean


def _counts(outcome: Outcome) -> dict[str, int]:
    statuses = [record.status for record in outcome.records]
    return {status: statuses.count(status) for status in dict.fromkeys(statuses)}


def _changes(winner: Contender | None, config: Config) -> list[tuple[str, Any, Any]]:
    """The changed keys, each with the value of the base config and the value of the winner."""
    if winner is None:
        return []
    tree = config.model_dump(mode="json")
    return [(key, _look_up(tree, key), value) for key, value in winner.record.candidate.settings.items()]


def _look_up(tree: Mapping[str, Any], key: str) -> Any:
    node: Any = tree
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _plots(config: Config, outcome: Outcome, planner: Planner) -> Iterator[Plot]:
    """The plots for which there is data."""
    from pocl_ray.report.plots import (
        render,
    )  # matplotlib takes a second to import, so import it only if something is drawn
    from pocl_ray.tuning import plots

    assert config.tune is not None
    objective, label = config.tune.objectives[0], LABELS[config.tune.objectives[0].metric]
    seen = [_point(r, outcome, planner, objective.metric) for r in outcome.records if r.candidate.kind == "trial"]
    points = [point for point in seen if point is not None]
    if not points:
        return
    own = outcome.control.record if outcome.control else None  # the control on the trials' own seed
    control = None if own is None else float(own.last[objective.metric])
    yield render("history", "Optimisation history", plots.history(points, control, label, objective.sign))
    control_curve = [] if own is None else _curve(own, objective.metric)
    yield render("curves", f"{label} over training samples", plots.curves(points, control_curve, label))
    names = {key: short_key(key, config.tune.space) for key in config.tune.space}
    finished = [point for point in points if point.is_finished]
    if len(points) > 1:
        figure = plots.parallel(points, names, control, label, objective.sign)
        yield render("parallel", "Parallel coordinates", figure)
    if len(finished) > 2:
        shares = plots.explained_shares(finished, list(names))
        yield render("importance", "Importance", plots.importance({names[key]: s for key, s in shares.items()}))
    if any(key.startswith("curriculum.kd_temperature") for key in names):
        names[TEMPERATURE_RANGE] = TEMPERATURE_RANGE
    for key, name in names.items():
        yield render(f"by_{key}", f"{label} by {name}", plots.by_setting(points, key, name, control, label))
    for other in config.tune.objectives[1:]:
        front = pareto_front(outcome.records, (objective, other))
        pair = None if own is None else (float(own.last[objective.metric]), float(own.last[other.metric]))
        figure = plots.trade_off(finished, pair, front, other.metric, (label, LABELS[other.metric]))
        yield render(f"against_{other.metric}", f"{label} against {LABELS[other.metric]}", figure)


def _point(record: TrialRecord, outcome: Outcome, planner: Planner, metric: str) -> Point | None:
    """The trial as a point of the plots; None if it reported nothing."""
    from pocl_ray.tuning.plots import Point

    if metric not in record.last:
        return None
    stages = planner.plan(record.candidate).stages
    settings = {**record.last, **record.candidate.settings}
    settings[TEMPERATURE_RANGE] = round(stages[-1].kd_temperature - stages[0].kd_temperature, 6)
    return Point(
        label=record.name,
        value=float(record.last[metric]),
        is_finished=record.status == "finished",
        is_winner=outcome.winner is not None and outcome.winner.record.name == record.name,
        settings=settings,
        curve=_curve(record, metric),
    )


def _curve(record: TrialRecord, metric: str) -> list[tuple[int, float]]:
    return [(int(r["num_samples"]), float(r[metric])) for r in record.reports if metric in r]
