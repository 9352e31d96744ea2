"""Ranking of rows from easy to hard: reciprocal rank fusion of difficulty signals (POCL, section 3.2).

Each signal ranks the rows; rank 1 is the easiest. A row's score is the sum over signals of `w / (k + rank)`, with the
weight w = 1 in the paper. The ranking goes from the highest score to the lowest. Ties are resolved as in the authors'
code: all sorts are stable, and each sort takes the list that the previous one returned. This file needs numpy alone, so
that the ranking can be recomputed anywhere.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pocl_ray.errors import ConfigError, DataError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Easy = Literal["high", "low"]


@dataclass(frozen=True)
class Signal:
    """One measurement of a row's difficulty.

    Attributes:
        name: Column in scores.parquet.
        easy: Whether a high or a low value means an easy row.
    """

    name: str
    easy: Easy


SIGNALS: dict[str, Signal] = {
    signal.name: signal
    for signal in (
        Signal("rouge_l", "high"),  # ROUGE-L of the student's answer against the references, 0 to 100
        Signal("ce_loss", "low"),  # the student's mean negative log-likelihood of the reference's tokens, in nats
        Signal("student_confidence", "high"),  # the student's mean highest next-token probability over the reference
        Signal("teacher_ce_loss", "low"),  # the teacher's mean negative log-likelihood of the reference, in nats
        Signal("teacher_student_kl", "low"),  # mean KL(teacher || student) over the reference's tokens, in nats
        Signal("teacher_entropy", "low"),  # mean entropy of the teacher's distribution over the reference, in nats
        Signal("num_prompt_tokens", "low"),  # length of the prompt
        Signal("num_response_tokens", "low"),  # length of the reference
    )
}


STUDENT_SIGNALS = ("rouge_l", "ce_loss", "student_confidence", "teacher_student_kl")
"""The signals of `SIGNALS` that change as the student learns."""

TEACHER_SIGNALS = ("teacher_ce_loss", "teacher_student_kl", "teacher_entropy")
"""The signals of `SIGNALS` that need the teacher."""


def unknown_signal(name: str, known: Iterable[str]) -> ConfigError:
    """Return the error for an unknown signal; it names the nearest known one."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}, or column:NAME"
    return ConfigError(f"difficulty.signals: unknown signal {name!r}; {hint}")


def rank_rows(
    signals: Mapping[str, npt.ArrayLike],
    rrf_k: float = 60.0,
    tie_break: Literal["file_order", "seeded"] = "file_order",
    seed: int = 0,
    weights: Mapping[str, float] | None = None,
    easy: Mapping[str, Easy] | None = None,
) -> tuple[FloatArray, IntArray]:
    """Return one ranking from all signals, the easiest row first (POCL, section 3.2), without `constant_signals`.

    Args:
        signals: Mapping of signal names to values in row order, shape (num_rows,). The order of the mapping is the
            order of fusion, which matters for ties alone.
        rrf_k: Constant k of `1 / (k + rank)`.
        tie_break: Order of rows with equal values: their order in the file (the authors' code), or an order drawn by
            `seed`.
        seed: Seed of that order.
        weights: Mapping of signal names to the weight w in `w / (k + rank)`; a signal left out has weight 1.
        easy: Mapping of signal names to `high` or `low`, the values of an easy row, for signals that are not in
            `SIGNALS`.

    Returns:
        `rrf_score` and `rank`, each of shape (num_rows,) in row order. Rank 1 is the easiest row.

    Raises:
        ConfigError: A signal is unknown.
        DataError: A signal is NaN for some row.
    """
    weights, directions = weights or {}, {**{name: signal.easy for name, signal in SIGNALS.items()}, **(easy or {})}
    for name in signals:
        if name not in directions:
            raise unknown_signal(name, directions)
    if not signals:
        raise ValueError("rank_rows needs at least one signal")
    keys = {name: _sort_key(name, directions[name], values) for name, values in signals.items()}
    num_rows = next(iter(keys.values())).size
    if any(key.size != num_rows for key in keys.values()):
        raise ValueError(f"signals differ in length: { {name: np.size(v) for name, v in signals.items()} }")
    for name in constant_signals(signals):
        del keys[name]
    order = _initial_order(num_rows, tie_break, seed)
    rrf_score = np.zeros(num_rows)
    places = np.arange(1, num_rows + 1)
    for name, key in keys.items():
        order = order[np.argsort(key[order], kind="stable")]
        rrf_score[order] += weights.get(name, 1.0) / (rrf_k + places)
    order = order[np.argsort(-rrf_score[order], kind="stable")]
    rank = np.empty(num_rows, dtype=np.int64)
    rank[order] = places
    return rrf_score, rank


def constant_signals(signals: Mapping[str, npt.ArrayLike]) -> list[str]:
    """Return the signals that have one value in all rows, if other signals do not.

    Such a signal ranks rows by their order in the file. That says nothing about the rows, and would count as much as
    any other signal.
    """
    values = {name: np.asarray(column) for name, column in signals.items()}
    flat = [name for name, column in values.items() if np.all(column == column[:1])]
    return flat if len(flat) < len(values) else []


def weak_teacher(signals: Mapping[str, npt.ArrayLike]) -> str | None:
    """Return a warning where the teacher predicts the training rows no better than the student does, else None.

    Args:
        signals: Mapping of signal names to one value a row; without `ce_loss` and `teacher_ce_loss` there is no
            warning.
    """
    if not {"ce_loss", "teacher_ce_loss"} <= set(signals):
        return None
    student, teacher = (float(np.mean(np.asarray(signals[name]))) for name in ("ce_loss", "teacher_ce_loss"))
    if not teacher >= student:
        return None
    return (
        f"the teacher's cross-entropy on the training rows is {teacher:.3f} nats/token, the student's {student:.3f}: "
        "it has little to teach; use a stronger one, or train on the references alone (configs/methods/sft.yaml)"
    )


def _sort_key(name: str, easy: Easy, values: npt.ArrayLike) -> FloatArray:
    """The values with their sign set so that the smallest belongs to the easiest row."""
    key = np.asarray(values, dtype=np.float64)
    if key.ndim != 1:
        raise ValueError(f"signal {name} has shape {key.shape}; one number a row is needed")
    missing = np.flatnonzero(np.isnan(key))
    if missing.size:
        raise DataError(
            f"signal {name}: not a number for row {missing[0]} ({missing.size} of {key.size} rows); "
            "leave this signal out of difficulty.signals, or the row out of the data"
        )
    return -key if easy == "high" else key


def _initial_order(num_rows: int, tie_break: str, seed: int) -> IntArray:
    if tie_break == "file_order":
        return np.arange(num_rows)
    if tie_break == "seeded":
        return np.random.default_rng(seed).permutation(num_rows)
    raise ValueError(f"tie_break is file_order or seeded, not {tie_break!r}")
