"""What evaluation.json says of plain text: the perplexity of each model on each set, where there are no answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pocl_ray.records import STUDENT, STUDENT_BEFORE, STUDENT_KD, TEACHER
from pocl_ray.report.files import as_float
from pocl_ray.report.results import MODELS
from pocl_ray.report.text import fixed, percent


@dataclass(frozen=True)
class Perplexity:
    """One model on one set of texts.

    Attributes:
        set_name: The set.
        model: A model of `records`.
        perplexity: exp of the loss.
        ce_loss: Mean negative log-likelihood of a token, in nats.
        gap_closed: Share of the loss between undistilled student (0) and teacher (1), or NaN.
    """

    set_name: str
    model: str
    perplexity: float
    ce_loss: float
    gap_closed: float


def is_of_text(models: Mapping[str, Any]) -> bool:
    """Whether a set of evaluation.json is one of plain text."""
    return any("perplexity" in figures for figures in models.values())


def perplexities(sets: Mapping[str, Any]) -> list[Perplexity]:
    """Read the sets of plain text of evaluation.json, in their order there."""
    found = []
    for set_name, models in sets.items():
        if not is_of_text(models):
            continue
        losses = {model: as_float(models[model].get("ce_loss")) for model in MODELS if model in models}
        for model, loss in losses.items():
            perplexity = as_float(models[model].get("perplexity"))
            found.append(Perplexity(set_name, model, perplexity, loss, _gap_closed(losses, model)))
    return found


def perplexity_sentences(found: Sequence[Perplexity], names: Mapping[str, str]) -> list[str]:
    """Return a sentence on each set: the student beside its start, the teacher and the control."""
    sentences = []
    for set_name in dict.fromkeys(one.set_name for one in found):
        of_set = {one.model: one for one in found if one.set_name == set_name}
        if STUDENT in of_set:
            sentences.append(_sentence(set_name, of_set, names))
    return sentences


def _sentence(set_name: str, of_set: Mapping[str, Perplexity], names: Mapping[str, str]) -> str:
    student = of_set[STUDENT]
    text = f"On {set_name}, {names[STUDENT]} reaches perplexity {fixed(student.perplexity)}"
    if STUDENT_BEFORE in of_set:
        before = of_set[STUDENT_BEFORE].perplexity
        verb = "lowers" if student.perplexity < before else "raises"
        text = f"On {set_name}, {names[STUDENT]} {verb} perplexity from {fixed(before)} to {fixed(student.perplexity)}"
    notes = []
    if TEACHER in of_set:
        notes.append(f"teacher {fixed(of_set[TEACHER].perplexity)}")
    if math.isfinite(student.gap_closed):
        notes.append(f"{percent(student.gap_closed)} of the gap in loss closed")
    if STUDENT_KD in of_set:
        notes.append(f"{names[STUDENT_KD]} at the same number of steps {fixed(of_set[STUDENT_KD].perplexity)}")
    return f"{text} ({'; '.join(notes)})." if notes else f"{text}."


def _gap_closed(losses: Mapping[str, float], model: str) -> float:
    before, teacher = losses.get(STUDENT_BEFORE, math.nan), losses.get(TEACHER, math.nan)
    if model in (STUDENT_BEFORE, TEACHER) or not teacher < before:
        return math.nan
    return (before - losses[model]) / (before - teacher)
