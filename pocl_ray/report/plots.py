"""The plots of the report: small figures, each rendered as PNG and as SVG for the page."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pocl_ray.records import STUDENT, STUDENT_BEFORE, STUDENT_KD, TEACHER, Stage
from pocl_ray.report.curves import Curve, best_of_stages, padded, smooth, thin, without_spikes
from pocl_ray.report.difficulty import SignalSpread, TopicTable
from pocl_ray.report.figures import SetResult
from pocl_ray.report.frontier import FrontierGaps


def inline_svg(svg: str, *, prefix: str, label: str, css_colours: Mapping[str, str]) -> str:
    """Return an `<svg>` element to embed in HTML.

    Args:
        svg: Complete SVG document with text stored as text.
        prefix: Prefix of every id, because all drawings of a page share one namespace of ids.
        label: Text that a screen reader says for the drawing.
        css_colours: Mapping of colours as `#rrggbb` to the names of the CSS variables that replace them.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style\b.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    view_box = re.search(r'viewBox="([^"]+)"', body)
    assert view_box is not None, "matplotlib writes a viewBox"
    opening = f'<svg class="plot" role="img" aria-label="{html.escape(label)}" viewBox="{view_box.group(1)}">'
    body = opening + body[body.index(">") + 1 :]
    body = re.sub(r'(?<=\sid=")', prefix, body)
    body = re.sub(r'(?<=href="#)', prefix, body)
    body = re.sub(r"(?<=url\(#)", prefix, body)
    body = re.sub(r"font: ((?:\S+ )*?[\d.]+px) [^;\"]+", r"font: \1 var(--font)", body)
    pattern = re.compile("|".join(map(re.escape, css_colours)), re.IGNORECASE)
    # Only drawing instructions contain colours. A text such as "#ffffff" in a label must not change.
    return re.sub(
        r'style="[^"]*"',
        lambda style: pattern.sub(lambda hit: f"var(--{css_colours[hit.group().lower()]})", style.group()),
        body,
    )


P = ParamSpec("P")

INK, MUTED, LINE, PAPER = "#1c2127", "#5b646e", "#dde1e6", "#fefefe"
# The colours of Okabe and Ito, which colour-blind readers can tell apart. Marks also differ in shape.
COLOURS = {STUDENT: "#0072b2", STUDENT_KD: "#d55e00", STUDENT_BEFORE: "#868e96", TEACHER: "#009e73"}
_CSS = {INK: "ink", MUTED: "muted", LINE: "line", PAPER: "paper"} | {
    colour: name.replace("_", "-") for name, colour in COLOURS.items()
}
_WIDTH_IN = 4.7
_PNG_DPI = 180
_LEGEND_ROW_IN, _LEGEND_CHARS = 0.16, 60
_STYLE: dict[Any, Any] = {
    "font.size": 8.5, "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"],
    "axes.labelsize": 8.5, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8,
    "text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED,
    "axes.edgecolor": LINE, "axes.linewidth": 0.8, "axes.facecolor": "none", "figure.facecolor": PAPER,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": LINE, "grid.linewidth": 0.6, "xtick.major.size": 0, "ytick.major.size": 0,
    "xtick.major.pad": 4, "ytick.major.pad": 4, "legend.frameon": False, "legend.borderpad": 0,
    "legend.handlelength": 1.6, "legend.columnspacing": 1.4, "lines.solid_capstyle": "round",
    "svg.fonttype": "none", "svg.hashsalt": "pocl", "text.parse_math": False, "axes.formatter.useoffset": False,
}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """A rendered figure.

    Attributes:
        name: File name without its ending.
        title: Title in one line.
        svg: SVG element in the page's colours.
        png: PNG file on a white background.
    """

    name: str
    title: str
    svg: str
    png: bytes


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Return the function with this file's matplotlib style, independent of the process's settings."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return drawn


def render(name: str, title: str, figure: Figure) -> Plot:
    """Return a figure as a plot, rendered as SVG and PNG."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", name)
    svg, png = io.StringIO(), io.BytesIO()
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # matplotlib's font may lack the script of a topic; the page's font has it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(png, format="png", dpi=_PNG_DPI, metadata={"Software": None})
        figure.set_layout_engine("none")  # keep the layout; computing it again takes as long as drawing
        figure.savefig(svg, format="svg", facecolor="none", metadata={"Date": None})
    page_svg = inline_svg(svg.getvalue(), prefix=f"{name}-", label=title, css_colours=_CSS)
    return Plot(name, title, page_svg, png.getvalue())


def new_figure(height_in: float, width_in: float = _WIDTH_IN) -> Figure:
    """Return an empty figure with automatic layout."""
    return Figure(figsize=(width_in, height_in), layout="constrained")


def legend_above(figure: Figure) -> None:
    """Put the legend of all labelled lines above the axes, in as many columns, three at most, as fit the width.

    The figure grows with each row of the legend after the first. A label longer than a row loses its beginning.
    """
    names = [line.get_label() for ax in figure.axes for line in ax.get_legend_handles_labels()[0]]
    for num_columns in (3, 2, 1):
        legend = figure.legend(loc="outside upper left", ncols=num_columns)
        if num_columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
    for text in legend.get_texts():
        label = text.get_text()
        text.set_text(label if len(label) <= _LEGEND_CHARS else f"…{label[1 - _LEGEND_CHARS :]}")
    num_rows = -(-len(names) // num_columns)
    figure.set_figheight(figure.get_figheight() + _LEGEND_ROW_IN * max(0, num_rows - 1))


@styled
def signal_by_bucket(spread: SignalSpread, label: str) -> Figure:
    """Return a box plot of one signal: quartiles, whiskers from the 5th to the 95th percentile, a dot for the mean."""
    figure = new_figure(2.5, 3.5)
    ax = figure.add_subplot()
    ax.use_sticky_edges = False
    filled = [(place, box) for place, box in enumerate(spread.boxes) if box.num_rows]
    for place, box in filled:
        low, q25, median, q75, high = box.quantiles
        ax.vlines(place, low, high, color=COLOURS[STUDENT], linewidth=1)
        ax.bar(place, q75 - q25, bottom=q25, width=0.56, color=PAPER, linewidth=0)
        ax.bar(place, q75 - q25, bottom=q25, width=0.56, color=COLOURS[STUDENT], alpha=0.28, linewidth=0)
        ax.hlines(median, place - 0.28, place + 0.28, color=COLOURS[STUDENT], linewidth=2)
        ax.plot(place, box.mean, "o", color=INK, markersize=3.2)
    one = len(spread.boxes) == 1
    ax.set_xlim(-0.6, len(spread.boxes) - 0.4)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    ax.set_xticks([0], ["all rows"]) if one else ax.set_xlabel("bucket (0 is the easiest)")
    ax.set_ylabel(label)
    ax.grid(axis="x", visible=False)
    return figure


@styled
def topics_by_bucket(table: TopicTable) -> Figure:
    """Return a heat map of the share of each topic's rows in each bucket."""
    num_topics, num_buckets = table.shares.shape
    figure = new_figure(0.5 + 0.24 * num_topics)
    ax = figure.add_subplot()
    wide = num_buckets <= 8
    cells = [(bucket - 0.48, line - 0.45) for line in range(num_topics) for bucket in range(num_buckets)]
    faces = [to_rgba(COLOURS[STUDENT], 0.04 + 0.72 * share) for share in table.shares.ravel()]
    ax.add_collection(PatchCollection([Rectangle(cell, 0.96, 0.9) for cell in cells], facecolors=faces, linewidths=0))
    for line, bucket in np.argwhere(table.shares >= 0.005) if wide else ():
        share = table.shares[line, bucket]
        ax.text(bucket, line, f"{100 * share:.0f} %", ha="center", va="center", fontsize=7.5)
    names = [f"{_clip(name, 30)}  ({count:,})" for name, count in zip(table.names, table.num_rows, strict=True)]
    ax.set_yticks(range(num_topics), names)
    ax.tick_params(axis="y", labelcolor=INK)
    ax.set_ylim(num_topics - 0.5, -0.5)
    ax.set_xlim(-0.5, num_buckets - 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    ax.set_xlabel("bucket (0 is the easiest)")
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    return figure


@styled
def stage_settings(stages: Sequence[Stage]) -> Figure:
    """Return a plot of temperature, kd_ratio and the loss's parameters that move over optimizer steps."""
    moving = stages[0].moving
    figure, axes = _stacked(len(moving))
    for ax, (key, label) in zip(axes, moving.items(), strict=True):
        if all(stage.setting_at(key, 0) == stage.setting_at(key, stage.num_steps - 1) for stage in stages):
            _stairs(ax, stages, [stage.setting_at(key, 0) for stage in stages], label)
            continue
        values = np.array([stage.setting_at(key, step) for stage in stages for step in range(stage.num_steps)])
        ax.plot(*thin(np.arange(1, len(values) + 1), values), color=COLOURS[STUDENT], linewidth=1.8)
        ax.set_ylim(*padded(values, zero=False))
        ax.set_ylabel(label)
    _finish_stacked(figure, axes, stages)
    return figure


@styled
def stage_rows(stages: Sequence[Stage], lr: Curve | None) -> Figure:
    """Return a plot of admitted rows, and of the learning rate if it was logged, over optimizer steps."""
    figure, axes = _stacked(1 + (lr is not None))
    _stairs(axes[0], stages, [stage.num_rows for stage in stages], "rows admitted", fill=True)
    if lr is not None:
        axes[1].plot(*thin(lr.steps, lr.values), color=COLOURS[STUDENT], linewidth=1.6)
        axes[1].set_ylim(*padded(lr.values, zero=True))
        axes[1].set_ylabel("learning rate")
    _finish_stacked(figure, axes, stages)
    return figure


@styled
def gaps_by_stage(found: FrontierGaps) -> Figure:
    """Return a plot of the gap of each bucket over the stages: the mean, and the middle half of the rows."""
    figure = new_figure(2.9)
    ax = figure.add_subplot()
    for bucket in range(found.num_buckets):
        shade = 0.35 + 0.65 * (bucket + 1) / found.num_buckets
        ax.fill_between(
            found.stages, found.quantiles[:, bucket, 1], found.quantiles[:, bucket, 3],
            color=COLOURS[STUDENT], alpha=0.12, linewidth=0,
        )  # fmt: skip
        colour = to_rgba(COLOURS[STUDENT], shade)
        ax.plot(found.stages, found.gaps[:, bucket], color=colour, marker="o", markersize=3, linewidth=1.6)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("stage (the numbers at the right are buckets, 0 the easiest)")
    ax.set_ylabel("gap (nats/token)")
    for bucket, height in enumerate(_apart(found.gaps[-1], 0.055 * (ax.get_ylim()[1] - ax.get_ylim()[0]))):
        place = (found.stages[-1], height)
        ax.annotate(f"{bucket}", place, (6, 0), textcoords="offset points", fontsize=7.5, color=MUTED, va="center")
    return figure


def _apart(heights: np.ndarray, least: float) -> np.ndarray:
    """The heights of labels next to some points, moved up or down until each is at least `least` from the next."""
    order = np.argsort(heights, kind="stable")
    placed = heights[order].astype(np.float64)
    for above in range(1, len(placed)):
        placed[above] = max(placed[above], placed[above - 1] + least)
    placed -= np.nanmean(placed - heights[order])
    return placed[np.argsort(order, kind="stable")]


@styled
def draws_by_stage(found: FrontierGaps) -> Figure:
    """Return a plot of each bucket's share of the draws over the stages, stacked from the easiest up."""
    figure = new_figure(2.9)
    ax = figure.add_subplot()
    bottom = np.zeros(len(found.stages))
    for bucket in range(found.num_buckets):
        colour = to_rgba(COLOURS[STUDENT], 0.15 + 0.7 * bucket / max(1, found.num_buckets - 1))
        ax.bar(found.stages, found.draws[:, bucket], bottom=bottom, color=colour, width=0.8, linewidth=0)
        bottom = bottom + found.draws[:, bucket]
    for end in np.cumsum(found.rows)[:-1]:
        ax.axhline(end, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
    ax.set_ylim(0, 1)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("stage")
    ax.set_ylabel("share of draws")
    ax.grid(visible=False)
    return figure


def _stacked(num_panels: int) -> tuple[Figure, list[Axes]]:
    figure = new_figure(2.9)
    return figure, list(figure.subplots(num_panels, sharex=True, squeeze=False)[:, 0])


def _stairs(ax: Axes, stages: Sequence[Stage], values: Sequence[float], label: str, *, fill: bool = False) -> None:
    edges = np.cumsum([0, *(stage.num_steps for stage in stages)])
    ax.stairs(values, edges, baseline=None, color=COLOURS[STUDENT], linewidth=1.8)
    if fill:
        ax.stairs(values, edges, fill=True, color=COLOURS[STUDENT], alpha=0.15, linewidth=0)
    ax.set_ylim(*padded(values, zero=fill))
    ax.set_ylabel(label)


def _finish_stacked(figure: Figure, axes: Sequence[Axes], stages: Sequence[Stage]) -> None:
    for place, ax in enumerate(axes):
        ax.yaxis.set_major_formatter(FuncFormatter(_short_number))
        ax.yaxis.set_major_locator(MaxNLocator(4))
        _stage_borders(ax, np.cumsum([stage.num_steps for stage in stages]), labels=place == 0)
    axes[-1].set_xlabel("optimizer step")
    figure.align_ylabels(list(axes))


@styled
def curves_over_steps(
    curves: Mapping[str, Curve], names: Mapping[str, str], label: str, stage_ends: Sequence[int], *, raw: bool
) -> Figure:
    """Return a plot of several models' curves over optimizer steps, with the borders of the stages.

    Args:
        curves: Mapping of models to their curves.
        names: Mapping of models to their names in the report.
        label: Label of the y axis, with the unit.
        stage_ends: Steps at which the student's stages end; empty if there is no plan.
        raw: Whether the curve is noisy. If so, it is drawn faintly with its moving mean on top; if not, each point is
            marked.
    """
    figure = new_figure(2.9)
    ax = figure.add_subplot()
    for model, curve in curves.items():
        style: dict[str, Any] = {"color": COLOURS[model], "linewidth": 1.7, "label": names[model]}
        style["zorder"] = 4 if model == STUDENT else 3
        if raw:
            ax.plot(*thin(curve.steps, curve.values), color=COLOURS[model], alpha=0.22, linewidth=0.6)
            ax.plot(*thin(curve.steps, smooth(curve, stage_ends if model == STUDENT else ())), **style)
        else:
            marker = {STUDENT: "o", STUDENT_KD: "s"}.get(model, "o")
            ax.plot(curve.steps, curve.values, marker=marker, markersize=3 if len(curve.steps) < 60 else 0, **style)
    if raw:
        ax.set_ylim(*without_spikes(list(curves.values())))
    _stage_borders(ax, np.asarray(stage_ends), labels=True)
    ax.set_xlabel("optimizer step")
    ax.set_ylabel(label)
    if len(curves) > 1:
        figure.legend(loc="outside upper left", ncols=len(curves))
    return figure


@styled
def dev_score(
    curves: Mapping[str, Curve],
    names: Mapping[str, str],
    stage_ends: Sequence[int],
    *,
    mark_best: bool,
    losses: Curve | None = None,
) -> Figure:
    """Return a plot of dev ROUGE-L over optimizer steps; `mark_best` circles the best checkpoint of each stage."""
    figure = curves_over_steps(curves, names, "dev ROUGE-L (0 to 100)", stage_ends, raw=False)
    if mark_best and stage_ends and STUDENT in curves:
        curve = curves[STUDENT]
        best = best_of_stages(curve, stage_ends, losses)
        figure.axes[0].plot(
            curve.steps[best], curve.values[best], "o", markersize=8, markerfacecolor="none",
            markeredgecolor=INK, markeredgewidth=1.1, zorder=6,
        )  # fmt: skip
    return figure


@styled
def final_figures(results: Sequence[SetResult], names: Mapping[str, str]) -> Figure:
    """Return a plot of the ROUGE-L of each model: sampled answers with their spread over seeds, and greedy answers."""
    heights = [len(result.models) for result in results]
    figure = new_figure(0.75 + 0.27 * sum(heights) + 0.28 * len(results))
    axes = figure.subplots(len(results), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for ax, result in zip(axes, results, strict=True):
        for line, found in enumerate(result.models):
            colour, score = COLOURS.get(found.model, INK), found.rouge_l
            ax.errorbar(score.mean, line - 0.13, xerr=score.std, fmt="o", color=colour, markersize=5.5, capsize=2.5)
            ax.plot(score.greedy, line + 0.16, "D", color=colour, markerfacecolor="none", markersize=4.6)
        ax.set_yticks(range(len(result.models)), [names.get(m.model, m.model) for m in result.models])
        ax.tick_params(axis="y", labelcolor=INK)
        ax.set_ylim(len(result.models) - 0.5, -0.5)
        if len(results) > 1:
            ax.set_title(result.name, loc="left", fontsize=8.5, color=MUTED)
    axes[-1].set_xlabel("ROUGE-L (0 to 100)" if len(results) > 1 else f"ROUGE-L on {results[0].name} (0 to 100)")
    axes[-1].margins(x=0.08)
    sampled = axes[0].plot([], [], "o", color=MUTED, markersize=5.5, label="sampled, mean ± sd over seeds")
    greedy = axes[0].plot([], [], "D", color=MUTED, markerfacecolor="none", markersize=4.6, label="greedy")
    figure.legend(handles=[*sampled, *greedy], loc="outside upper left", ncols=2)
    return figure


def _stage_borders(ax: Axes, stage_ends: np.ndarray, *, labels: bool) -> None:
    if not len(stage_ends) or not stage_ends[-1]:
        return
    starts = np.concatenate([[0], stage_ends[:-1]])
    ax.set_xlim(0, stage_ends[-1] * 1.01)
    for end in stage_ends[:-1]:
        ax.axvline(end, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
    ax.grid(axis="x", visible=False)
    if not labels:
        return
    style: dict[str, Any] = {"va": "bottom", "fontsize": 7.5, "color": MUTED}
    ax.text(-0.015, 1.03, "stage", transform=ax.transAxes, ha="right", **style)
    for stage, (start, end) in enumerate(zip(starts, stage_ends, strict=True)):
        if (end - start) / stage_ends[-1] > 0.03:
            ax.text((start + end) / 2, 1.03, f"{stage}", transform=ax.get_xaxis_transform(), ha="center", **style)


def _short_number(value: float, _: int | None = None) -> str:
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def _clip(text: str, length: int) -> str:
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
