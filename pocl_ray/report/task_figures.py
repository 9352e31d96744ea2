"""The figures of lm-eval's tasks as a table: a row for each task and metric, a column for each model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pocl_ray.records import STUDENT
from pocl_ray.report.figures import MODELS
from pocl_ray.report.files import as_float


@dataclass(frozen=True)
class Measured:
    """A metric of one model on one task; NaN where there is none."""

    value: float
    stderr: float


NOT_MEASURED = Measured(math.nan, math.nan)


@dataclass(frozen=True)
class TaskRow:
    """A metric of a task.

    Attributes:
        task: Name of the task, or of a group for its mean.
        depth: Number of groups that it is in.
        metric: Name of the metric, with the filter of answers if there is one.
        arrow: Direction in which it gets better; empty if that is not known.
        by_model: Figure of each model of `TaskTable.models`.
        num_rows: Number of rows that have the metric.
        num_fewshot: Number of examples before each question, or NaN for a group whose tasks differ.
    """

    task: str
    depth: int
    metric: str
    arrow: str
    by_model: Mapping[str, Measured]
    num_rows: float
    num_fewshot: float


@dataclass(frozen=True)
class TaskTable:
    """All figures of lm-eval's tasks, and the models that have any."""

    models: tuple[str, ...]
    rows: tuple[TaskRow, ...]


def task_table(tasks: Mapping[str, Any]) -> TaskTable | None:
    """Return the tasks of evaluation.json as a table; None if there are none."""
    found = {model for entry in tasks.values() for models in entry.values() for model in models}
    if not found:
        return None
    models = tuple(model for model in MODELS if model in found)
    return TaskTable(models, tuple(row for entry in tasks.values() for row in _rows(entry, models)))


def _rows(entry: Mapping[str, Any], models: tuple[str, ...]) -> Iterator[TaskRow]:
    depths: dict[str, int] = {}
    for task, by_model in entry.items():
        first = by_model.get(STUDENT) or next(iter(by_model.values()))
        depths[task] = depths.get(first.get("group"), -1) + 1
        for metric, own in first["metrics"].items():
            figures = {name: (by_model.get(name) or {}).get("metrics", {}).get(metric) for name in models}
            yield TaskRow(
                task=task,
                depth=depths[task],
                metric=metric,
                arrow={True: "↑", False: "↓"}.get(own.get("higher_is_better"), ""),
                by_model={name: _measured(figure) for name, figure in figures.items()},
                num_rows=as_float(own.get("num_rows")),
                num_fewshot=as_float(first.get("num_fewshot")),
            )


def _measured(figure: Mapping[str, Any] | None) -> Measured:
    if figure is None:
        return NOT_MEASURED
    return Measured(as_float(figure.get("value")), as_float(figure.get("stderr")))
