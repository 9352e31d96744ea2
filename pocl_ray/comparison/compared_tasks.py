"""Runs on the tasks of lm-eval, from their `evaluation.json`: figures with standard errors, and what does not compare.

The first run that has an entry of `evaluation.tasks` sets how it is asked. Figures of a run that asks it in another way
(other rows, other examples, another task of that name) are left out, and a sentence says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import hypot, isfinite
from typing import Any

from pocl_ray.comparison.runs import Cell, ComparedRun
from pocl_ray.records import STUDENT
from pocl_ray.report.figures import MODELS
from pocl_ray.report.task_figures import TaskRow, task_table

Z_95 = 1.96
"""Standard errors of a difference in the normal approximation; rows count as drawn for each run, which is cautious."""


@dataclass(frozen=True)
class TaskLine:
    """A metric of one model on one task, with a figure for each run.

    Attributes:
        row: Task and metric, as the report of the first run that has them shows them.
        model: Model of `records`.
        cells: Figure of each run with its standard error; None where a run has none that compares.
        best: Place of the run that is ahead of all others by more than chance, or None.
    """

    row: TaskRow
    model: str
    cells: tuple[Cell | None, ...]
    best: int | None


@dataclass(frozen=True)
class ComparedTasks:
    """The figures of lm-eval's tasks, and sentences on what of them does not compare."""

    lines: tuple[TaskLine, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def students(self) -> tuple[TaskLine, ...]:
        """The lines of the students."""
        return tuple(line for line in self.lines if line.model == STUDENT)

    @property
    def others(self) -> tuple[TaskLine, ...]:
        """The lines of all other models."""
        return tuple(line for line in self.lines if line.model != STUDENT)


def compared_tasks(runs: Sequence[ComparedRun]) -> ComparedTasks:
    """Return the figures of the tasks of all runs; no lines and no notes if no run has any."""
    # Figures in the file that the step has not confirmed may be those of an earlier list of tasks.
    found = [run.data.tasks if run.run.is_done("tasks") else {} for run in runs]
    lines: list[TaskLine] = []
    notes = [_missing(run) for run, own in zip(runs, found, strict=True) if not own] if any(found) else []
    for entry in dict.fromkeys(name for own in found for name in own):
        first = next(place for place, own in enumerate(found) if entry in own)
        kept: list[Mapping[str, Any]] = [{} for _ in runs]
        for place, own in enumerate(found):
            if entry not in own:
                if own:
                    notes.append(f"{runs[place].label} does not have {entry} among its evaluation.tasks.")
                continue
            other = _other(own[entry], found[first][entry], runs[place].label, runs[first].label)
            if other is None:
                kept[place] = own[entry]
            else:
                notes.append(f"{other}: the figures of {runs[place].label} on {entry} are left out.")
        notes += _other_seeds(entry, kept, runs, first)
        lines += _lines(entry, kept, first)
    return ComparedTasks(tuple(lines), tuple(notes))


def _missing(run: ComparedRun) -> str:
    if not run.run.config.evaluation.tasks:
        return f"{run.label} was not evaluated on tasks of lm-eval (evaluation.tasks)."
    return f"{run.label} has not finished its tasks of lm-eval; go on with `pocl-ray run`."


def _other(own: Mapping[str, Any], theirs: Mapping[str, Any], label: str, first: str) -> str | None:
    """The first difference between how two runs ask a task, in words; None if there is none."""
    for task in own:
        if task not in theirs:
            continue
        mine, other = (next(iter(entry[task].values())) for entry in (own, theirs))
        shots = mine.get("num_fewshot"), other.get("num_fewshot")
        if shots[0] != shots[1]:
            return f"{label} asks {task} with {_shots(shots[0])}, and {first} with {_shots(shots[1])}"
        rows = mine.get("num_rows"), other.get("num_rows")
        if rows[0] != rows[1]:
            return f"{label} answers {_rows(rows[0])} of {task}, and {first} {_rows(rows[1])}"
        for key, what in (("folder", "from a folder with other files than"), ("lm_eval", "in another lm-eval than")):
            # Runs of an earlier version do not say it.
            if key in mine and key in other and mine[key] != other[key]:
                told = f" ({mine[key]} and {other[key]})" if key == "lm_eval" else ""
                return f"{label} takes {task} {what} {first}{told}"
    return None


def _shots(number: Any) -> str:
    return "an unknown number of shots" if number is None else f"{number} shot{'' if number == 1 else 's'}"


def _rows(number: Any) -> str:
    return "an unknown number of rows" if number is None else f"{number:,} row{'' if number == 1 else 's'}"


def _other_seeds(
    entry: str, kept: Sequence[Mapping[str, Any]], runs: Sequence[ComparedRun], first: int
) -> Iterator[str]:
    """A sentence for each run whose examples before the questions were drawn by another seed than the first run's."""
    for place, own in enumerate(kept):
        shots = [of_model.get("num_fewshot") for task in own.values() for of_model in task.values()]
        seeds = runs[place].run.config.seed, runs[first].run.config.seed
        if seeds[0] != seeds[1] and any(shots):
            yield (
                f"The examples before the questions of {entry} were drawn by seed {seeds[0]} in {runs[place].label}, "
                f"and by {seeds[1]} in {runs[first].label}: part of a difference may be theirs."
            )


def _lines(entry: str, kept: Sequence[Mapping[str, Any]], first: int) -> Iterator[TaskLine]:
    tables = [task_table({entry: own}) for own in kept]
    rows = [{(row.task, row.metric): row for row in table.rows} if table else {} for table in tables]
    for key, row in rows[first].items():
        for model in (STUDENT, *(name for name in MODELS if name != STUDENT)):
            cells = tuple(_cell(of_run.get(key), model) for of_run in rows)
            if any(cells):
                yield TaskLine(row, model, cells, task_ahead(cells, row.arrow))


def _cell(row: TaskRow | None, model: str) -> Cell | None:
    found = None if row is None else row.by_model.get(model)
    return None if found is None or not isfinite(found.value) else Cell(found.value, found.stderr)


def task_ahead(cells: Sequence[Cell | None], arrow: str) -> int | None:
    """Return the run that is ahead of all others by more than `Z_95` standard errors of the difference.

    Args:
        cells: Figure of each run with its standard error.
        arrow: Direction in which the metric gets better; empty: not known, and none is ahead.

    Returns:
        Place of the run; None without one, or where a standard error is not known.
    """
    sign = {"↑": 1, "↓": -1}.get(arrow)
    known = [(place, cell) for place, cell in enumerate(cells) if cell is not None]
    if sign is None or len(known) < 2:
        return None
    best, ahead = max(known, key=lambda one: sign * one[1].mean)
    others = [cell for place, cell in known if place != best]
    # A comparison with NaN, which an unknown standard error gives, is false.
    is_ahead = all(sign * (ahead.mean - one.mean) > Z_95 * hypot(ahead.std, one.std) for one in others)
    return best if is_ahead else None
