"""The signals that a config chooses: signals of `SIGNALS`, columns of the rows, and plug-ins of other packages.

A plug-in is registered in the entry-point group `pocl_ray.signals`. It is a function of the two models' logits at the
response tokens and of these tokens, and returns one value for each token. A row's signal is their mean. The plug-in is
called once on random logits before anything is scored, so that a mistake shows early and names the plug-in.

Torch and Arrow are imported only where they are used, because `plan` reads this file and needs neither.

Legend: N response tokens in one flat axis, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pocl_ray import plugins
from pocl_ray.config import DifficultyConfig
from pocl_ray.difficulty.ranking import SIGNALS, TEACHER_SIGNALS, Easy, rank_rows, unknown_signal
from pocl_ray.errors import UserError
from pocl_ray.records import COLUMN, ID, RANK, RRF_SCORE

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from pocl_ray.data.row_store import RowStore

GROUP = "pocl_ray.signals"
_TAKEN = (ID, RANK, RRF_SCORE, "answer_stopped")

TokenFunction = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]
"""`f(student_logits_NV, teacher_logits_NV, targets_N)` -> one float a token, shape (N,). Logits are float32 and cut to
the vocabulary that both models share."""


@dataclass(frozen=True)
class TokenSignal:
    """A signal of a plug-in; a plain function counts as a signal whose low values mean an easy row.

    Attributes:
        function: Function that measures the signal at each token.
        easy: Whether a high or a low mean over the tokens means an easy row.
    """

    function: TokenFunction
    easy: Easy = "low"


@dataclass(frozen=True)
class Choice:
    """The signals of a ranking.

    Attributes:
        easy: Values that mean an easy row, `high` or `low`, for each chosen signal that is not in `SIGNALS`.
        plugins: Names of the signals that plug-ins measure.
        origins: Origin and version of each plug-in; scores depend on them.
        reads_teacher: Whether a chosen signal needs the teacher.
        compares: Whether a chosen signal needs both models at once.
    """

    easy: dict[str, Easy]
    plugins: tuple[str, ...]
    origins: tuple[str, ...]
    reads_teacher: bool = True
    compares: bool = True


def choose_signals(difficulty: DifficultyConfig) -> Choice:
    """Return the signals of a config, after a trial call of the plug-ins among them.

    Raises:
        ConfigError: A name is unknown; the message names the nearest one.
        UserError: A plug-in cannot be loaded, or does not return what a signal must return.
    """
    easy: dict[str, Easy] = {f"{COLUMN}{name}": direction for name, direction in difficulty.columns.items()}
    names = tuple(name for name in difficulty.signals if name not in SIGNALS and name not in easy)
    easy.update({name: signal.easy for name, signal in load_signals(names).items()})
    return Choice(
        easy,
        names,
        origins_of(names),
        reads_teacher=bool(names) or not set(TEACHER_SIGNALS).isdisjoint(difficulty.signals),
        compares=bool(names) or "teacher_student_kl" in difficulty.signals,
    )


def origins_of(names: Iterable[str]) -> tuple[str, ...]:
    """Return origin and version of each plug-in of these names."""
    found = [plugins.installed(GROUP)[name] for name in names]
    return tuple(f"{one.value} {one.dist.version if one.dist is not None else ''}" for one in found)


def rank_table(table: pa.Table, rows: RowStore, difficulty: DifficultyConfig, seed: int) -> pa.Table:
    """Return the table of measured signals with the ranking appended.

    Args:
        table: Measured signals, one row for each training row, in the order of the rows.
        rows: Training rows, for signals that are columns of the user's data.
        difficulty: Signals, their weights, and the rule for ties.
        seed: Seed of a random order of ties.

    Returns:
        The table with the user's columns, `rrf_score` and `rank` appended.
    """
    import pyarrow as pa

    for name in difficulty.columns:
        table = table.append_column(f"{COLUMN}{name}", pa.array(rows.numbers(name)))
    rrf_score, rank = rank_rows(
        {name: table[name].to_numpy() for name in difficulty.signals},
        difficulty.rrf_k,
        difficulty.tie_break,
        seed,
        weights=difficulty.signals,
        easy=choose_signals(difficulty).easy,
    )
    return table.append_column(RRF_SCORE, pa.array(rrf_score)).append_column(RANK, pa.array(rank))


def load_signals(names: Iterable[str]) -> dict[str, TokenSignal]:
    """Return the plug-ins of these names.

    Raises:
        ConfigError: No plug-in has that name.
        UserError: A plug-in cannot be loaded, or does not return what a signal must return.
    """
    installed = plugins.installed(GROUP)
    signals = {}
    for name in names:
        if name not in installed or name in _TAKEN:
            raise unknown_signal(name, [*SIGNALS, *installed])
        found = plugins.load("signal", installed[name])
        if not isinstance(found, TokenSignal) and not callable(found):
            raise UserError(
                f"signal plug-in '{name}' is {type(found).__name__}; it must be a function or a TokenSignal"
            )
        signals[name] = found if isinstance(found, TokenSignal) else TokenSignal(found)
        _probe(name, signals[name].function)
    return signals


def measure(name: str, function: TokenFunction, student_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Return the values of a plug-in, after a check of their type, shape and range.

    Returns:
        One finite value for each token, shape (N,).

    Raises:
        UserError: The plug-in raises an error, or returns anything else.
    """
    try:
        value_N = function(student_NV, teacher_NV, targets_N)
    except Exception as error:  # foreign code: report every failure under the plug-in's name
        raise UserError(f"signal plug-in '{name}' fails when called: {plugins.reason(error)}") from error
    wrong = _problem_of(value_N, len(targets_N))
    if wrong:
        raise UserError(f"signal plug-in '{name}' {wrong}; a signal returns one finite float a token, shape (N,)")
    return value_N


def _problem_of(value_N: object, num_tokens: int) -> str:
    import torch

    if not isinstance(value_N, torch.Tensor):
        return f"returns {type(value_N).__name__}, not a tensor"
    if value_N.shape != (num_tokens,):
        return f"returns shape {tuple(value_N.shape)} for {num_tokens} tokens"
    if not value_N.is_floating_point() or not bool(torch.isfinite(value_N).all()):
        return "returns values that are not finite floats"
    return ""


def _probe(name: str, function: TokenFunction) -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    student_NV, teacher_NV = torch.randn(2, 3, 7, generator=generator)
    measure(name, function, student_NV, teacher_NV, torch.tensor([0, 3, 6]))
