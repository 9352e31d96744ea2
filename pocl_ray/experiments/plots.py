"""The plots of an experiment: differences with their intervals, and learning curves."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import cycle

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pocl_ray.experiments.results import Comparison, TrainingRecord
from pocl_ray.records import STUDENT, STUDENT_BEFORE, STUDENT_KD, TEACHER
from pocl_ray.report.plots import COLOURS, INK, MUTED, legend_above, new_figure, styled

LABELS = {
    "rouge_l": "greedy ROUGE-L",
    "sampled_rouge_l": "sampled ROUGE-L",
    "exact_match": "greedy exact match",
    "sampled_exact_match": "sampled exact match",
    "kl": "KL, nats/token",
    "ce_loss": "CE, nats/token",
}
VERDICTS = {"ahead": COLOURS[TEACHER], "level": COLOURS[STUDENT_BEFORE], "behind": COLOURS[STUDENT_KD]}
LINES = (COLOURS[STUDENT], COLOURS[STUDENT_KD], COLOURS[TEACHER], "#cc79a7", "#e69f00", "#56b4e9")


@styled
def forest(comparisons: Sequence[Comparison], figures: Sequence[str]) -> Figure:
    """Forest plot: one line an arm, one panel a figure; the dot is the mean difference, the bar its 95 % t interval.

    Args:
        comparisons: Comparisons on one set and at one budget.
        figures: Panels, from left to right.
    """
    arms = list(dict.fromkeys(one.arm for one in comparisons))
    drawing = new_figure(0.7 + 0.26 * len(arms), 2.0 + 1.7 * len(figures))
    axes = drawing.subplots(1, len(figures), sharey=True, squeeze=False)[0]
    for ax, figure in zip(axes, figures, strict=True):
        ax.axvline(0, color=MUTED, linewidth=0.9, zorder=1)
        for one in (each for each in comparisons if each.figure == figure):
            colour, place = VERDICTS[one.verdict], arms.index(one.arm)
            difference = one.difference
            ax.plot([difference.t_low, difference.t_high], [place, place], color=colour, linewidth=1.8, zorder=2)
            ax.plot(difference.mean, place, "o", color=colour, markersize=5, zorder=3)
        ax.set_xlabel(LABELS[figure])
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].tick_params(axis="y", labelcolor=INK)
    axes[0].set_ylim(len(arms) - 0.5, -0.5)
    return drawing


@styled
def learning_curves(records: Mapping[str, Sequence[TrainingRecord]], figure: str, label: str) -> Figure:
    """Dev figure over optimizer steps, the mean over seeds of each arm.

    Args:
        records: Arm -> its trainings.
        figure: Key of the dev figures.
        label: Label of the y axis.
    """
    drawing = new_figure(3.0)
    ax = drawing.add_subplot()
    for (arm, own), (colour, style) in zip(records.items(), line_styles(), strict=False):
        values: dict[int, list[float]] = {}
        for record in own:
            for point in record.curve:
                if figure in point:
                    values.setdefault(point["step"], []).append(point[figure])
        if values:
            steps = sorted(values)
            means = [statistics.fmean(values[step]) for step in steps]
            ax.plot(steps, means, color=colour, linestyle=style, linewidth=1.6, label=arm)
    ax.set_xlabel("optimizer step")
    ax.set_ylabel(label)
    legend_above(drawing)
    return drawing


def line_styles() -> cycle[tuple[str, str]]:
    """Colours first, then the same ones dashed and dotted."""
    return cycle([(colour, style) for style in ("-", "--", ":") for colour in LINES])
