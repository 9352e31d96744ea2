"""The plots of a search; each shows the control as a dashed line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pocl_ray.records import STUDENT, STUDENT_BEFORE, STUDENT_KD
from pocl_ray.report.plots import COLOURS, INK, LINE, MUTED, new_figure, styled

OWN, CONTROL, FADED = COLOURS[STUDENT], COLOURS[STUDENT_KD], COLOURS[STUDENT_BEFORE]


@dataclass(frozen=True)
class Point:
    """A trial as a point of the plots.

    Attributes:
        label: Name of the trial.
        value: Objective of its student, or of a stopped trial at the stop.
        is_finished: Whether the trial reached its end.
        is_winner: Whether the trial won.
        settings: Values of the trial by axis.
        curve: Training samples and objective at each dev evaluation.
    """

    label: str
    value: float
    is_finished: bool
    is_winner: bool
    settings: Mapping[str, Any]
    curve: Sequence[tuple[int, float]] = ()


@styled
def history(points: Sequence[Point], control: float | None, label: str, sign: int) -> Figure:
    """Return a plot of the objective of each trial in the order of their start, and of the best so far."""
    figure = new_figure(2.7)
    ax = figure.add_subplot()
    best: list[tuple[int, float]] = []
    for place, point in enumerate(points):
        _mark(ax, place, point)
        if point.is_finished and (not best or sign * point.value > sign * best[-1][1]):
            best.append((place, point.value))
    if best:
        best.append((len(points) - 1, best[-1][1]))
        ax.step(*zip(*best, strict=True), where="post", color=OWN, linewidth=1.2, zorder=1)
    _control_line(ax, control)
    ax.set_xlabel("trial")
    ax.set_ylabel(label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, control)
    return figure


@styled
def curves(points: Sequence[Point], control: Sequence[tuple[int, float]], label: str) -> Figure:
    """Return a plot of each trial's objective over training samples, with the points at which trials were stopped."""
    figure = new_figure(2.7)
    ax = figure.add_subplot()
    for point in sorted(points, key=lambda p: (p.is_winner, p.is_finished)):
        if point.curve:
            colour = OWN if point.is_winner else FADED
            ax.plot(*zip(*point.curve, strict=True), color=colour, linewidth=1.8 if point.is_winner else 0.9)
            if not point.is_finished:
                ax.plot(*point.curve[-1], "x", color=FADED, markersize=5)
    if control:
        ax.plot(*zip(*control, strict=True), color=CONTROL, linewidth=1.4, linestyle=(0, (4, 2)))
    handles = [
        *ax.plot([], [], color=OWN, linewidth=1.8, label="winner"),
        *ax.plot([], [], color=FADED, linewidth=0.9, label="other trials"),
        *ax.plot([], [], "x", color=FADED, markersize=5, linestyle="none", label="stopped"),
        *(ax.plot([], [], color=CONTROL, linestyle=(0, (4, 2)), label="plain KD") if control else []),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=4)
    ax.set_xlabel("training samples")
    ax.set_ylabel(label)
    return figure


@styled
def by_setting(points: Sequence[Point], key: str, name: str, control: float | None, label: str) -> Figure:
    """Return a plot of the objective against the values of one key."""
    figure = new_figure(2.4, 3.5)
    ax = figure.add_subplot()
    places, ticks = axis_places([p.settings[key] for p in points])
    for place, point in zip(places, points, strict=True):
        _mark(ax, place, point)
    if ticks is not None:
        ax.set_xticks(range(len(ticks)), ticks)
        ax.set_xlim(-0.5, len(ticks) - 0.5)
    _control_line(ax, control)
    ax.set_xlabel(name)
    ax.set_ylabel(label)
    ax.margins(x=0.08)
    return figure


@styled
def parallel(points: Sequence[Point], names: Mapping[str, str], control: float | None, label: str, sign: int) -> Figure:
    """Return a plot with one line for each trial through its values; the last axis is the objective, dark is better."""
    figure = new_figure(3.0, 9.6)
    ax = figure.add_subplot()
    columns = [axis_places([p.settings[key] for p in points]) for key in names]
    scaled = [_unit(places) for places, _ in columns]
    values = np.array([p.value for p in points])
    ends = [*values, control] if control is not None else list(values)
    low, high = min(ends), max(ends)
    heights = (values - low) / (high - low) if high > low else np.full(len(values), 0.5)
    goodness = heights if sign > 0 else 1 - heights
    for index in np.argsort(goodness):
        point = points[index]
        line = [column[index] for column in scaled] + [heights[index]]
        colour = OWN if point.is_finished else FADED
        ax.plot(
            range(len(line)), line, color=colour, alpha=0.15 + 0.75 * goodness[index], linewidth=1 + goodness[index]
        )
    for place, (places, ticks) in enumerate(columns):
        _axis_ticks(ax, place, places, ticks)
    _axis_ticks(ax, len(columns), np.array([low, high]), None)
    if control is not None:
        share = (control - low) / (high - low) if high > low else 0.5
        ax.plot([len(columns) - 0.12, len(columns) + 0.12], [share, share], color=CONTROL, linewidth=2.2)
    ax.set_xticks(range(len(columns) + 1), [*names.values(), label])
    ax.tick_params(axis="x", labelcolor=INK)
    ax.set_yticks([])
    ax.set_xlim(-0.25, len(columns) + 0.35)
    ax.set_ylim(-0.06, 1.06)
    ax.grid(visible=False)
    ax.spines["left"].set_visible(False)
    ax.spines["bottom"].set_visible(False)
    return figure


@styled
def importance(shares: Mapping[str, float]) -> Figure:
    """Return a plot of the share of the objective's variance that each key explains by itself."""
    figure = new_figure(0.7 + 0.3 * len(shares))
    ax = figure.add_subplot()
    ordered = sorted(shares.items(), key=lambda item: item[1])
    ax.barh([name for name, _ in ordered], [share for _, share in ordered], color=OWN, height=0.55)
    ax.tick_params(axis="y", labelcolor=INK)
    ax.set_xlim(0, 1)
    ax.set_xlabel("share of the variance explained by this key alone")
    ax.grid(axis="y", visible=False)
    return figure


@styled
def trade_off(
    points: Sequence[Point], control: tuple[float, float] | None, front: set[str], key: str, labels: tuple[str, str]
) -> Figure:
    """Return a plot of two objectives; a line joins the trials that no other trial beats in both."""
    figure = new_figure(2.7)
    ax = figure.add_subplot()
    for point in points:
        _mark(ax, point.settings[key], point)
    best = sorted((p.settings[key], p.value) for p in points if p.label in front)
    if best:
        ax.plot(*zip(*best, strict=True), color=OWN, linewidth=1, zorder=1)
    if control is not None:
        ax.plot(control[1], control[0], "s", color=CONTROL, markersize=6, label="plain KD")
        ax.axhline(control[0], color=CONTROL, linewidth=1.1, linestyle=(0, (4, 2)), zorder=1)
    ax.set_xlabel(labels[1])
    ax.set_ylabel(labels[0])
    return figure


def axis_places(values: Sequence[Any]) -> tuple[np.ndarray, list[str] | None]:
    """Return the position of each value on an axis, and the labels of the positions if the values are not numbers."""
    if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        return np.array(values, dtype=float), None
    texts = sorted({str(v) for v in values})
    return np.array([texts.index(str(v)) for v in values], dtype=float), texts


def explained_shares(points: Sequence[Point], keys: Sequence[str]) -> dict[str, float]:
    """Return the share of the objective's variance that each key explains by itself (the correlation ratio, eta²).

    Numeric values are first put into at most three groups of about equal size. With few trials the share is only a
    hint: a key with k groups explains (k - 1) / (n - 1) of the variance of n trials by chance. This part is subtracted.
    """
    values = np.array([p.value for p in points])
    total = float(((values - values.mean()) ** 2).sum()) if len(values) else 0.0
    shares = {}
    for key in keys:
        places, ticks = axis_places([p.settings[key] for p in points])
        distinct = np.unique(places)
        if ticks is None and len(distinct) > 3:
            groups = np.searchsorted(np.quantile(places, [1 / 3, 2 / 3]), places, side="left")
        else:
            groups = np.searchsorted(distinct, places)
        num_groups = len(np.unique(groups))
        if total <= 0 or len(values) <= num_groups:
            shares[key] = 0.0
            continue
        within = sum(float(((values[groups == g] - values[groups == g].mean()) ** 2).sum()) for g in np.unique(groups))
        # omega-like correction of eta² for the number of groups
        adjusted = 1 - (within / (len(values) - num_groups)) / (total / (len(values) - 1))
        shares[key] = min(max(adjusted, 0.0), 1.0)
    return shares


def _mark(ax: Axes, place: float, point: Point) -> None:
    colour = OWN if point.is_finished else FADED
    face = OWN if point.is_finished else "none"
    ax.plot(place, point.value, "o", color=colour, markerfacecolor=face, markersize=5, alpha=0.85, zorder=3)
    if point.is_winner:
        ax.plot(place, point.value, "o", markersize=10, markerfacecolor="none", markeredgecolor=INK, zorder=4)


def _control_line(ax: Axes, control: float | None) -> None:
    if control is not None:
        ax.axhline(control, color=CONTROL, linewidth=1.4, linestyle=(0, (4, 2)), zorder=2)


def _legend(figure: Figure, control: float | None) -> None:
    ax = figure.axes[0]
    handles = [
        *ax.plot([], [], "o", color=OWN, markersize=5, label="finished"),
        *ax.plot([], [], "o", color=FADED, markerfacecolor="none", markersize=5, label="stopped"),
        *ax.plot([], [], "o", color=INK, markerfacecolor="none", markersize=9, label="winner"),
        *(ax.plot([], [], color=CONTROL, linestyle=(0, (4, 2)), label="plain KD") if control is not None else []),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=4)


def _unit(places: np.ndarray) -> np.ndarray:
    low, high = places.min(), places.max()
    return (places - low) / (high - low) if high > low else np.full(len(places), 0.5)


def _axis_ticks(ax: Axes, place: int, places: np.ndarray, ticks: list[str] | None) -> None:
    ax.axvline(place, color=LINE, linewidth=1, zorder=0)
    distinct = np.unique(places)
    shown = distinct if len(distinct) <= 5 else distinct[[0, -1]]
    heights = _unit(shown)
    for value, height in zip(shown, heights, strict=True):
        text = ticks[int(value)] if ticks is not None else f"{value:.4g}"
        ax.text(place + 0.03, height, text, color=MUTED, fontsize=7.5, va="center")
