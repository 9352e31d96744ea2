"""The signals that a scoring measures, and the passes of the models that this takes: what is read, and no more.

A signal is read if it ranks the rows (of the run itself, of a trial of a search or of an arm), if rows are drawn by it,
or if `difficulty.also_measure` names it. What falls out of a pass that is made anyway is measured too. Only the config
is read here, so that `plan` can say what scoring will compute.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from pocl_ray.config import Config, DifficultyConfig
from pocl_ray.config.loading import with_overrides
from pocl_ray.config.training import FRONTIER
from pocl_ray.difficulty.ranking import SIGNALS, TEACHER_SIGNALS
from pocl_ray.records import COLUMN, GAP

READ_BY_STUDENT = ("ce_loss", "student_confidence")


@dataclass(frozen=True)
class Passes:
    """The passes of the models over the training rows.

    Attributes:
        answers: Whether the student answers each prompt, for `rouge_l`.
        student: Whether the student reads each response.
        teacher: Whether the teacher reads each response, for a signal or for its cache.
        compares: Whether both models' distributions are compared token by token.
        plugins: Names of the signals that plug-ins measure.
        can_compare: Whether the models share a tokenizer, without which there is nothing to compare.
    """

    answers: bool
    student: bool
    teacher: bool
    compares: bool
    plugins: tuple[str, ...] = ()
    can_compare: bool = True

    @property
    def left_out(self) -> tuple[str, ...]:
        """The passes that are not made, in words; the results depend on them."""
        parts = {
            "without the teacher": not self.teacher,
            "without answers": not self.answers,
            "without comparison": self.teacher and self.can_compare and not self.compares,
            "without the student's reading": not self.student,
        }
        return tuple(name for name, is_left_out in parts.items() if is_left_out)


def passes_of(config: Config, fills_cache: bool, arms: Sequence[Config] = ()) -> Passes:
    """Return the passes of a config's scoring.

    Args:
        config: Config of the run.
        fills_cache: Whether the teacher's outputs are cached.
        arms: Configs of the arms of a race, which start from this scoring.
    """
    wanted = wanted_signals(config, arms)
    plugins = tuple(name for name in wanted if name not in SIGNALS and not name.startswith(COLUMN))
    can_compare = config.teacher.cross_tokenizer is None
    compares = can_compare and (GAP in wanted or bool(plugins))
    return Passes(
        answers="rouge_l" in wanted,
        student=compares or any(name in wanted for name in READ_BY_STUDENT),
        teacher=fills_cache or compares or any(name in wanted for name in TEACHER_SIGNALS),
        compares=compares,
        plugins=plugins,
        can_compare=can_compare,
    )


def wanted_signals(config: Config, arms: Sequence[Config] = ()) -> tuple[str, ...]:
    """Return the signals that somebody reads, each once: those that are fused or drawn by, and those asked for."""
    names = [*config.difficulty.signals]
    for other in (config, *arms, *_arms_of_experiment(config)):
        names += [*other.difficulty.signals, *([GAP] if other.curriculum.pacing == FRONTIER else [])]
    names += [*_searched(config), *config.difficulty.also_measure]
    return tuple(dict.fromkeys(names))


def _arms_of_experiment(config: Config) -> Iterator[Config]:
    if config.experiment is not None:
        base = config.model_copy(update={"experiment": None, "tune": None, "control": None})
        yield from (with_overrides(base, overrides) for overrides in config.experiment.arms.values())


def _searched(config: Config) -> Iterator[str]:
    """The signals that trials of a search may read."""
    space = {} if config.tune is None else config.tune.space
    for key, domain in space.items():
        values = (domain.choice if domain.grid is None else domain.grid) or ()
        if key == "difficulty.signals":
            for value in values:
                tree = {**config.difficulty.model_dump(mode="json"), "signals": value}
                yield from DifficultyConfig.model_validate(tree).signals
        if key == "curriculum.pacing" and FRONTIER in values:
            yield GAP


def at_least(left_out: Iterable[str]) -> list[list[str]]:
    """Return what scorings that measure as much or more leave out, from as much as this one to nothing."""
    parts = list(left_out)
    return [list(some) for size in range(len(parts), -1, -1) for some in combinations(parts, size)]
