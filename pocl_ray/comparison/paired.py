"""Runs over seeds of training, from their `pairs.json`: spread, differences with intervals, and what does not compare.

A run with `control.seeds` has its curriculum and its plain distillation trained again on each seed. That gives two
differences with an interval: the curriculum less plain distillation within a run, and one run's curriculum less the
first run's, paired by the seeds that both have (`trainings.statistics`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from pocl_ray.comparison.runs import Cell, ComparedRun, common_sets
from pocl_ray.errors import StorageError
from pocl_ray.experiments.plots import LABELS
from pocl_ray.records import STUDENT, STUDENT_KD
from pocl_ray.trainings.statistics import FIGURES, PairedDifference, paired_difference

PAIRS = "pairs.json"
LOSSES = ("kl", "ce_loss")
"""Figures in nats per token, which other tokens or another teacher make something else."""

Values = dict[str, dict[int, float]]
"""Figure -> seed of training -> its value."""


@dataclass(frozen=True)
class Difference:
    """A paired difference, and whether its interval is on one side of zero: `ahead`, `behind` or `level`."""

    paired: PairedDifference
    verdict: str


@dataclass(frozen=True)
class PairRow:
    """One figure on one set over seeds of training, with a cell for each run; None where a run has none.

    Attributes:
        set: Evaluation set.
        figure: Key of `FIGURES`.
        students: Mean and standard deviation of the curriculum's student over the seeds.
        over_control: Curriculum less plain distillation of the same run.
        over_first: Curriculum less the curriculum of the first run, on the seeds that both have.
    """

    set: str
    figure: str
    students: tuple[Cell | None, ...]
    over_control: tuple[Difference | None, ...]
    over_first: tuple[Difference | None, ...]

    @property
    def label(self) -> str:
        """The figure in words."""
        return LABELS[self.figure]

    @property
    def places(self) -> int:
        """Decimal places that the figure is shown with."""
        return 3 if self.figure in LOSSES else 2


@dataclass(frozen=True)
class PairTable:
    """The figures over seeds of training, and sentences on what of them does not compare."""

    rows: tuple[PairRow, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Seeded:
    """The values of one run: set -> side (`records.STUDENT` or `STUDENT_KD`) -> figure -> seed -> value."""

    seeds: tuple[int, ...]
    sets: dict[str, dict[str, Values]]

    def values(self, name: str, side: str, figure: str) -> dict[int, float]:
        return self.sets.get(name, {}).get(side, {}).get(figure, {})


def pair_table(runs: Sequence[ComparedRun]) -> PairTable:
    """Return the figures over seeds of training; no rows and no notes if no run has pairs.

    Raises:
        StorageError: A run's pairs.json cannot be read.
    """
    found = [_read(run) for run in runs]
    if not any(found):
        return PairTable()
    rows = []
    for name in common_sets(runs):
        for figure, is_higher_better in FIGURES.items():
            students = [one.values(name, STUDENT, figure) if one else {} for one in found]
            controls = [one.values(name, STUDENT_KD, figure) if one else {} for one in found]
            if not any(students):
                continue
            is_alike = [figure not in LOSSES or _reason_of_losses(runs[0], run, figure) is None for run in runs]
            rows.append(
                PairRow(
                    set=name,
                    figure=figure,
                    students=tuple(_cell(own) for own in students),
                    over_control=tuple(
                        _difference(own, theirs, is_higher_better)
                        for own, theirs in zip(students, controls, strict=True)
                    ),
                    over_first=tuple(
                        _difference(own, students[0], is_higher_better) if at and is_alike[at] else None
                        for at, own in enumerate(students)
                    ),
                )
            )
    return PairTable(tuple(rows), tuple(_notes(runs, found)))


def _read(run: ComparedRun) -> _Seeded | None:
    if not run.run.is_done("pairs") or not run.data.pairs:
        return None
    content = run.data.pairs
    try:
        seeds = tuple(int(seed) for seed in content["seeds"])
        sets: dict[str, dict[str, Values]] = {name: {STUDENT: {}, STUDENT_KD: {}} for name in content["sets"]}
        for name, figures in content["sets"].items():
            for figure, values in figures.items():
                for side, of_figures in sets[name].items():
                    numbers = [float(value) for value in values[side]]
                    of_figures[figure] = dict(zip(seeds, numbers, strict=True))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        place = run.run.run_dir.uri_of(PAIRS)
        raise StorageError(
            f"{place}: cannot be read ({type(error).__name__}: {error}); delete it, and `pocl-ray run` writes it again"
        ) from None
    return _Seeded(seeds, sets)


def _cell(values: dict[int, float]) -> Cell | None:
    if not values:
        return None
    own = list(values.values())
    return Cell(statistics.fmean(own), statistics.stdev(own) if len(own) > 1 else math.nan)


def _difference(own: dict[int, float], theirs: dict[int, float], is_higher_better: bool) -> Difference | None:
    """The difference over the seeds that both have; None if they are fewer than two, which give no interval."""
    shared = [seed for seed in own if seed in theirs]
    if len(shared) < 2:
        return None
    paired = paired_difference([own[seed] for seed in shared], [theirs[seed] for seed in shared], is_higher_better)
    return Difference(paired, paired.verdict(is_higher_better))


def _reason_of_losses(one: ComparedRun, other: ComparedRun, figure: str) -> str | None:
    """The reason why a loss of two runs does not compare; None if it does."""
    if _fingerprint(one, "tokenizer") != _fingerprint(other, "tokenizer"):
        return "has another tokenizer"
    if figure == "kl" and _fingerprint(one, "teacher") != _fingerprint(other, "teacher"):
        return "has another teacher"
    return None


def _fingerprint(run: ComparedRun, step: str) -> str | None:
    return run.run.steps.get(step, {}).get("fingerprint")


def _notes(runs: Sequence[ComparedRun], found: Sequence[_Seeded | None]) -> list[str]:
    """One sentence for everything that a reader would otherwise take for comparable."""
    notes = [_missing(run) for run, own in zip(runs, found, strict=True) if own is None]
    first, seeded = runs[0], found[0]
    for run, own in list(zip(runs, found, strict=True))[1:]:
        if own is None or seeded is None:
            continue
        if len(set(own.seeds) & set(seeded.seeds)) < 2:
            notes.append(
                f"{run.label} and {first.label} share fewer than two seeds ({_listed(own.seeds)} and "
                f"{_listed(seeded.seeds)}): no difference between the two."
            )
            continue
        for figure in LOSSES:
            reason = _reason_of_losses(first, run, figure)
            if reason is not None:
                notes.append(f"{run.label} {reason} than {first.label}: {LABELS[figure]} does not compare.")
        if _fingerprint(run, "student") != _fingerprint(first, "student"):
            notes.append(f"{run.label} starts from another student than {first.label}: pairs share the seed alone.")
        counts = [int(each.run.steps["distill"].get("counts", {}).get("num_steps") or 0) for each in (run, first)]
        if counts[0] != counts[1]:
            notes.append(f"{run.label} trains {counts[0]:,} optimizer steps, and {first.label} {counts[1]:,}.")
    return notes + _other_controls(runs, found)


def _missing(run: ComparedRun) -> str:
    seeds = run.run.config.control.seeds if run.run.config.control is not None else ()
    if not seeds:
        return f"{run.label} was not trained on further seeds (control.seeds)."
    return f"{run.label} has not finished its pairs (control.seeds); go on with `pocl-ray run`."


def _other_controls(runs: Sequence[ComparedRun], found: Sequence[_Seeded | None]) -> list[str]:
    """Name runs whose plain distillations gave other figures on the same seeds: they are other trainings."""
    for (one, ours), (other, theirs) in combinations(zip(runs, found, strict=True), 2):
        if ours is None or theirs is None:
            continue
        for name in common_sets(runs):
            pairs = [(ours.values(name, STUDENT_KD, key), theirs.values(name, STUDENT_KD, key)) for key in FIGURES]
            if any(not math.isclose(a[seed], b[seed], rel_tol=1e-6) for a, b in pairs for seed in a if seed in b):
                return [
                    f"The plain distillations of {one.label} and {other.label} are not the same trainings: what is "
                    "ahead of its own may be behind the other's."
                ]
    return []


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
