"""The progress of an experiment in one table: the trainings of each arm that are done, and its figures so far."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich import box
from rich.live import Live
from rich.table import Table

from pocl_ray.console import console
from pocl_ray.experiments.results import Comparison, TrainingRecord
from pocl_ray.trainings.statistics import FIGURES

LINE_EVERY_S = 15.0
WIDTH = 150
SHORT = {"rouge_l": "ROUGE-L", "sampled_rouge_l": "sampled", "exact_match": "exact", "kl": "KL", "ce_loss": "CE"}
"""The figures of the progress table, and the names of its columns."""


class Board:
    """Shows the trainings of one phase: a table that is drawn again on a terminal, a line now and then elsewhere."""

    def __init__(
        self, phase: str, totals: Mapping[str, int], done: Sequence[TrainingRecord], live: Live | None
    ) -> None:
        self.phase, self.totals, self.live = phase, totals, live
        self.records = list(done)
        self.num_before, self.started = len(self.records), time.monotonic()
        self.running: dict[str, tuple[int, int]] = {}
        self._last_line = time.monotonic()

    def add(self, record: TrainingRecord) -> None:
        """Show a training that has ended."""
        self.records.append(record)
        self._show()

    def look(self, running: Mapping[str, tuple[int, int]]) -> None:
        """Show the progress of the running trainings."""
        self.running = dict(running)
        self._show()

    def _show(self) -> None:
        if self.live is not None:
            self.live.update(self.table())
        elif time.monotonic() - self._last_line > LINE_EVERY_S:
            self._last_line = time.monotonic()
            console.print(f"  {self.phase}: {self._progress()}")

    def _progress(self) -> str:
        num_new, total = len(self.records) - self.num_before, sum(self.totals.values())
        text = f"{len(self.records)}/{total} trainings"
        if num_new:
            each = (time.monotonic() - self.started) / num_new
            text += f", {each:.1f} s each, {each * (total - len(self.records)):,.0f} s left"
        return text + "".join(f"; {name} {step}/{steps}" for name, (step, steps) in self.running.items())

    def table(self) -> Table:
        """Return arms with their means so far, over all sets."""
        title = f"{self.phase}: {self._progress()}"
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
        table.add_column("arm")
        for name in ("seeds", *SHORT.values(), "seconds"):
            table.add_column(name, justify="right")
        for arm, total in self.totals.items():
            own = [record for record in self.records if record.arm == arm]
            table.add_row(arm, f"{len(own)}/{total}", *_means(own))
        return table


def _means(records: Sequence[TrainingRecord]) -> list[str]:
    figures = [of_set for record in records for of_set in record.figures.values()]
    cells = []
    for figure in SHORT:
        values = [of_set[figure] for of_set in figures if figure in of_set]
        cells.append(_number(statistics.fmean(values), figure) if values else "")
    return [*cells, f"{statistics.fmean(r.seconds for r in records):.1f}" if records else ""]


def _number(value: float, figure: str, sign: str = "") -> str:
    places = 3 if figure in ("kl", "ce_loss") else 2
    return f"{value:{sign}.{places}f}"


@contextmanager
def board(phase: str, totals: Mapping[str, int], done: Sequence[TrainingRecord]) -> Iterator[Board]:
    """Show the progress of a phase while the block runs, and its table once more at the end.

    Args:
        phase: Its name.
        totals: Arm -> trainings.
        done: Trainings that an earlier start has done.
    """
    if not console.is_terminal:
        shown = Board(phase, totals, done, None)
        yield shown
    else:
        with Live(console=console, transient=True, refresh_per_second=2) as live:
            shown = Board(phase, totals, done, live)
            yield shown
    show(shown.table())


def show(table: Table) -> None:
    """Print a table at its full width, also where there is no terminal."""
    console.print(table, width=None if console.is_terminal else WIDTH)


def comparison_table(comparisons: Sequence[Comparison], budget: str, set_name: str) -> Table:
    """Return arms by figures: mean difference from the baseline, half of its 95 % t interval, and wins."""
    chosen = [one for one in comparisons if one.budget == budget and one.set == set_name]
    figures = [figure for figure in FIGURES if any(one.figure == figure for one in chosen)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"{set_name}, at equal {budget if budget == 'steps' else 'FLOPs'}")
    for figure in figures:
        table.add_column(figure, justify="right")
    for arm, baseline in dict.fromkeys((one.arm, one.baseline) for one in chosen):
        cells = {one.figure: one for one in chosen if one.arm == arm}
        table.add_row(f"{arm} - {baseline}", *(_cell(cells[f]) if f in cells else "" for f in figures))
    return table


def _cell(one: Comparison) -> str:
    difference = one.difference
    mean = _number(difference.mean, one.figure, "+")
    half = _number(difference.half_width, one.figure)
    return f"{mean} ± {half} ({difference.num_wins}/{difference.num_seeds})"
