"""The plots of a comparison."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from pocl_ray.experiments.plots import line_styles
from pocl_ray.report.curves import Curve
from pocl_ray.report.plots import legend_above, new_figure, styled


@styled
def curves_of_runs(curves: Mapping[str, Curve], label: str) -> Figure:
    """Return a plot of a dev figure of several runs over optimizer steps.

    Args:
        curves: Mapping of each run's label to its curve.
        label: Label of the y axis, with the unit.
    """
    drawing = new_figure(3.0)
    ax = drawing.add_subplot()
    for (name, curve), (colour, style) in zip(curves.items(), line_styles(), strict=False):
        marker = "o" if len(curve.steps) < 60 else ""
        ax.plot(
            curve.steps,
            curve.values,
            color=colour,
            linestyle=style,
            linewidth=1.6,
            marker=marker,
            markersize=3,
            label=name.lstrip("_") or name,  # matplotlib's legend leaves out labels that begin with _
        )
    ax.set_xlabel("optimizer step")
    ax.set_ylabel(label)
    legend_above(drawing)
    return drawing
