"""Pacing: the rule that decides which rows each stage trains on.

A rule is a function of the buckets' ends and of its parameters. The ends are cumulative row counts in an order of the
rows; the last one is the number of all rows. The rule returns for each stage the slice `(first, end)` of that order to
train on. A new rule is one function and one line in `PACINGS`; other packages bring theirs through the entry-point
group `pocl_ray.pacings`.
"""

from __future__ import annotations

import difflib
import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pocl_ray import plugins
from pocl_ray.errors import ConfigError, UserError
from pocl_ray.records import Order

GROUP = "pocl_ray.pacings"

Slice = tuple[int, int]
Rule = Callable[..., Sequence[Slice]]


@dataclass(frozen=True)
class Pacing:
    """A pacing rule, and the order of rows that its slices refer to.

    Attributes:
        rule: Function from the buckets' ends and the parameters to one slice for each stage.
        order: Order that the slices refer to: the ranking from easy to hard, or an order drawn by the seed. For
            `frontier` the slices have no order: rows are drawn from them.
        steps_of: Another rule, for a rule of one stage and for `frontier`: the stages take as many optimizer steps
            together as all stages of that rule. None: each stage takes `interval_epochs`.
    """

    rule: Rule
    order: Order = "rank"
    steps_of: Rule | None = None


def baby_step(ends: Sequence[int]) -> list[Slice]:
    """Admit one more bucket in each stage and keep the earlier ones (Bengio et al. 2009; POCL, algorithm 1)."""
    return [(0, end) for end in ends]


def one_pass(ends: Sequence[int]) -> list[Slice]:
    """Train on one bucket in each stage, the easiest first (Bengio et al. 2009)."""
    return list(zip([0, *ends[:-1]], ends, strict=True))


def anti(ends: Sequence[int]) -> list[Slice]:
    """Start with the hardest rows: Baby Step in reverse. Each stage has as many rows and steps as in Baby Step."""
    return [(ends[-1] - end, ends[-1]) for end in ends]


MAX_STAGES = 10_000


def competence(ends: Sequence[int], root: float = 2.0, start: float = 0.1, num_stages: int = 8) -> list[Slice]:
    """Admit the share c(t) of the easiest rows (Platanios et al. 2019, arXiv 1903.09848), independent of buckets.

    c(t) = min(1, (t/T (1 - c0^p) + c0^p)^(1/p)), evaluated at the start of each stage. T is the start of the last
    stage. A stage has ceil(c N) rows.

    Args:
        ends: Ends of the buckets; the last one is N.
        root: Exponent p; 1 grows linearly, larger values grow fast at first.
        start: Share c0 of the first stage.
        num_stages: Number of stages, for each of which c is evaluated.

    Raises:
        ConfigError: A parameter is out of range.
    """
    for name, value, fits, needed in (
        ("root", root, root > 0, "above 0"),
        ("start", start, 0 < start <= 1, "above 0 and at most 1"),
        (
            "num_stages",
            num_stages,
            1 <= num_stages <= MAX_STAGES and num_stages == int(num_stages),
            f"a whole number from 1 to {MAX_STAGES}",
        ),
    ):
        if not fits:
            raise ConfigError(f"curriculum.pacing_args.{name} must be {needed}, not {value!r}")
    admitted = []
    for stage in range(int(num_stages)):
        share = stage / (num_stages - 1) if num_stages > 1 else 1.0
        at_start = start**root
        competent = min(1.0, (share * (1 - at_start) + at_start) ** (1 / root))
        # The root of a power may be off by one ulp. Without rounding, `ceil` would turn that into a whole row.
        admitted.append((0, math.ceil(round(competent * ends[-1], 6))))
    return admitted


def none(ends: Sequence[int]) -> list[Slice]:
    """Train on all rows in one stage: no curriculum."""
    return [(0, ends[-1])]


def frontier(ends: Sequence[int], num_stages: int = 8) -> list[Slice]:
    """Draw the rows of each stage from all rows by their gaps, when the stage begins (`curriculum.frontier`)."""
    return [(0, ends[-1])] * num_stages


PACINGS: dict[str, Pacing] = {
    "baby_step": Pacing(baby_step),
    "one_pass": Pacing(one_pass),
    "competence": Pacing(competence),
    "anti": Pacing(anti),
    "random": Pacing(baby_step, order="random"),
    "frontier": Pacing(frontier, order="frontier", steps_of=baby_step),
    "none": Pacing(none, steps_of=baby_step),
    "race": Pacing(none, steps_of=baby_step),  # of plain distillation, which the other arms keep to
}


def find_pacing(name: str) -> Pacing:
    """Return the rule of a name, from this file or from an installed plug-in.

    Raises:
        ConfigError: No rule has that name. The message names the nearest one.
        UserError: A plug-in cannot be imported, or is neither a function nor a `Pacing`.
    """
    if name in PACINGS:
        return PACINGS[name]
    others = plugins.installed(GROUP)
    if name not in others:
        near = difflib.get_close_matches(name, [*PACINGS, *others], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join([*PACINGS, *others])}"
        raise ConfigError(f"curriculum.pacing: unknown rule {name!r}; {hint}")
    found = plugins.load("pacing", others[name])
    if not isinstance(found, Pacing) and not callable(found):
        raise UserError(f"pacing plug-in '{name}' is {type(found).__name__}; it must be a function or a Pacing")
    return found if isinstance(found, Pacing) else Pacing(found)


def admitted_rows(name: str, pacing: Pacing, args: Mapping[str, Any], ends: Sequence[int]) -> list[Slice]:
    """Return the slices of a rule, after a check of them.

    Args:
        name: Name of the rule, for messages.
        pacing: The rule.
        args: Parameters of the rule.
        ends: End of each bucket, as cumulative row counts.

    Returns:
        The slice `(first, end)` of each stage.

    Raises:
        ConfigError: A parameter is unknown or out of range.
        UserError: A plug-in raises an error, or returns something other than slices of the rows.
    """
    _check_args(name, pacing.rule, args)
    try:
        slices = pacing.rule(tuple(ends), **args)
    except ConfigError:
        raise
    except Exception as error:  # foreign code: report every failure under the plug-in's name
        raise UserError(f"pacing plug-in '{name}' fails when called: {plugins.reason(error)}") from error
    try:
        checked = [(operator.index(first), operator.index(end)) for first, end in slices]
    except (TypeError, ValueError):
        raise UserError(
            f"pacing plug-in '{name}' returns {_short(slices)}; a rule returns a list of (first, end), one a stage"
        ) from None
    wrong = [(first, end) for first, end in checked if not 0 <= first < end <= ends[-1]]
    if wrong or not checked:
        found = f"the slice {wrong[0]}" if wrong else "no stage"
        raise UserError(
            f"pacing plug-in '{name}' returns {found} for {ends[-1]} rows; it must be 0 <= first < end <= {ends[-1]}"
        )
    if pacing.steps_of is not None and len(checked) > 1 and pacing.order != "frontier":
        raise UserError(f"pacing plug-in '{name}' has steps_of and {len(checked)} stages; steps_of is for one stage")
    return checked


def _check_args(name: str, rule: Rule, args: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(rule)
    except ValueError:  # a built-in written in C has no signature; the call itself checks its arguments
        return
    try:
        signature.bind((), **args)
    except TypeError as error:
        known = ", ".join(list(signature.parameters)[1:]) or "none"
        raise ConfigError(f"curriculum.pacing_args: {error}; pacing '{name}' takes: {known}") from None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
