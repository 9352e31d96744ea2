"""evaluation.json as read: figures of each model, the gap to the teacher, and a comparison with the control."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pocl_ray.records import STUDENT, STUDENT_BEFORE, STUDENT_KD, TEACHER
from pocl_ray.report.files import as_float
from pocl_ray.report.page import fixed, percent

MODELS = (STUDENT_BEFORE, STUDENT_KD, STUDENT, TEACHER)
METRICS = {"rouge_l": "ROUGE-L", "exact_match": "exact match"}
Verdict = Literal["ahead", "behind", "level"]

# Greedy answers have no spread over seeds. Figures are printed with two decimal places, so a smaller difference is
# none.
_GREEDY_TOLERANCE = 0.005


@dataclass(frozen=True)
class Figure:
    """A metric of one model on one set: sampled over seeds, and greedy. A value that was not measured is NaN."""

    mean: float
    std: float
    greedy: float
    by_seed: Mapping[str, float]


@dataclass(frozen=True)
class ModelResult:
    """The results of one model on one set.

    Attributes:
        model: Model of `records`.
        rouge_l: ROUGE-L, 0 to 100.
        exact_match: Exact match, 0 to 100.
        gap_closed: Position of the sampled ROUGE-L between the undistilled student (0) and the teacher (1), or NaN.
        gap_closed_greedy: Same position for greedy answers.
        unstopped_share: Share of answers that reached the length limit, 0 to 1, or NaN.
    """

    model: str
    rouge_l: Figure
    exact_match: Figure
    gap_closed: float
    gap_closed_greedy: float
    unstopped_share: float


@dataclass(frozen=True)
class SetResult:
    """The results on one evaluation set."""

    name: str
    models: tuple[ModelResult, ...]

    def model(self, name: str) -> ModelResult | None:
        """Return a model's result, or None if it was not evaluated."""
        return next((result for result in self.models if result.model == name), None)


@dataclass(frozen=True)
class Comparison:
    """The difference of the distilled student and the plain-KD control in one metric.

    Attributes:
        metric: Name of the metric in the report.
        decoding: Kind of answers, sampled or greedy.
        student: Figure of the student, 0 to 100.
        control: Figure of the control, 0 to 100.
        difference: Student less control.
        std: Standard deviation of the difference over seeds; NaN for greedy answers and single seeds.
        num_seeds: Number of seeds that both have; 0 for greedy answers.
        num_won: Number of seeds with which the student is ahead.
        verdict: Result of the comparison; `level` if the difference is within one standard deviation.
    """

    metric: str
    decoding: Literal["sampled", "greedy"]
    student: float
    control: float
    difference: float
    std: float
    num_seeds: int
    num_won: int
    verdict: Verdict


def set_results(sets: Mapping[str, Any]) -> list[SetResult]:
    """Return the sets of evaluation.json, in the order of the file."""
    return [SetResult(name, _model_results(models)) for name, models in sets.items()]


def _model_results(models: Mapping[str, Any]) -> tuple[ModelResult, ...]:
    known = [name for name in MODELS if name in models] + [name for name in models if name not in MODELS]
    rouge = {name: figure_of(models[name], "rouge_l") for name in known}
    return tuple(
        ModelResult(
            model=name,
            rouge_l=rouge[name],
            exact_match=figure_of(models[name], "exact_match"),
            gap_closed=_gap_closed({k: v.mean for k, v in rouge.items()}, name),
            gap_closed_greedy=_gap_closed({k: v.greedy for k, v in rouge.items()}, name),
            unstopped_share=as_float(models[name].get("unstopped_share")),
        )
        for name in known
    )


def figure_of(result: Mapping[str, Any], metric: str) -> Figure:
    """Return a metric of one model on one set, as evaluation.json holds it."""
    sampled = result.get(metric) or {}
    by_seed = {str(seed): as_float(value) for seed, value in (sampled.get("by_seed") or {}).items()}
    return Figure(
        mean=as_float(sampled.get("mean")),
        std=as_float(sampled.get("std")) if len(by_seed) > 1 else math.nan,
        greedy=as_float((result.get("greedy") or {}).get(metric)),
        by_seed=by_seed,
    )


def _gap_closed(figures: Mapping[str, float], model: str) -> float:
    before, teacher = figures.get(STUDENT_BEFORE, math.nan), figures.get(TEACHER, math.nan)
    if model in (STUDENT_BEFORE, TEACHER) or not teacher > before:
        return math.nan
    return (figures[model] - before) / (teacher - before)


def compare_with_control(result: SetResult) -> list[Comparison]:
    """Return the comparison of student and plain-KD control in each metric that both have, sampled answers first."""
    student, control = result.model(STUDENT), result.model(STUDENT_KD)
    if student is None or control is None:
        return []
    pairs = [(label, getattr(student, metric), getattr(control, metric)) for metric, label in METRICS.items()]
    found = [_compare_sampled(*pair) for pair in pairs] + [_compare_greedy(*pair) for pair in pairs]
    return [comparison for comparison in found if math.isfinite(comparison.difference)]


def _compare_sampled(metric: str, student: Figure, control: Figure) -> Comparison:
    seeds = [seed for seed in student.by_seed if seed in control.by_seed]
    paired = np.array([student.by_seed[seed] - control.by_seed[seed] for seed in seeds])
    difference = student.mean - control.mean
    std = float(paired.std(ddof=1)) if len(seeds) > 1 else math.nan
    verdict = _verdict(difference, std if math.isfinite(std) else _GREEDY_TOLERANCE)
    num_won = int((paired > 0).sum())
    return Comparison(metric, "sampled", student.mean, control.mean, difference, std, len(seeds), num_won, verdict)


def _compare_greedy(metric: str, student: Figure, control: Figure) -> Comparison:
    difference = student.greedy - control.greedy
    verdict = _verdict(difference, _GREEDY_TOLERANCE)
    return Comparison(metric, "greedy", student.greedy, control.greedy, difference, math.nan, 0, 0, verdict)


def _verdict(difference: float, tolerance: float) -> Verdict:
    if abs(difference) <= tolerance:
        return "level"
    return "ahead" if difference > 0 else "behind"


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of one model on one set of texts.

    Attributes:
        set_name: Name of the set.
        model: Model of `records`.
        perplexity: Exponential of the loss.
        ce_loss: Mean negative log-likelihood of a token, in nats.
        gap_closed: Position of the loss between the undistilled student (0) and the teacher (1), or NaN.
    """

    set_name: str
    model: str
    perplexity: float
    ce_loss: float
    gap_closed: float


def is_of_text(models: Mapping[str, Any]) -> bool:
    """Return whether a set of evaluation.json is plain text."""
    return any("perplexity" in figures for figures in models.values())


def perplexities(sets: Mapping[str, Any]) -> list[Perplexity]:
    """Return the sets of plain text in evaluation.json, in the order of the file."""
    found = []
    for set_name, models in sets.items():
        if not is_of_text(models):
            continue
        losses = {model: as_float(models[model].get("ce_loss")) for model in MODELS if model in models}
        for model, loss in losses.items():
            perplexity = as_float(models[model].get("perplexity"))
            found.append(Perplexity(set_name, model, perplexity, loss, _perplexities_gap_closed(losses, model)))
    return found


def perplexity_sentences(found: Sequence[Perplexity], names: Mapping[str, str]) -> list[str]:
    """Return a sentence on each set that compares the student with its start, the teacher and the control."""
    sentences = []
    for set_name in dict.fromkeys(one.set_name for one in found):
        of_set = {one.model: one for one in found if one.set_name == set_name}
        if STUDENT in of_set:
            sentences.append(_sentence(set_name, of_set, names))
    return sentences


def in_a_sentence(name: str) -> str:
    """Return the name of a model as a sentence has it: a student takes an article, a method such as POCL none."""
    return f"the {name}" if name.endswith("student") else name


def _sentence(set_name: str, of_set: Mapping[str, Perplexity], names: Mapping[str, str]) -> str:
    student = of_set[STUDENT]
    subject = in_a_sentence(names[STUDENT])
    text = f"On {set_name}, {subject} reaches perplexity {fixed(student.perplexity)}"
    if STUDENT_BEFORE in of_set:
        before = of_set[STUDENT_BEFORE].perplexity
        verb = "lowers" if student.perplexity < before else "raises"
        text = f"On {set_name}, {subject} {verb} perplexity from {fixed(before)} to {fixed(student.perplexity)}"
    notes = []
    if TEACHER in of_set:
        notes.append(f"teacher {fixed(of_set[TEACHER].perplexity)}")
    if math.isfinite(student.gap_closed):
        notes.append(f"{percent(student.gap_closed)} of the gap in loss closed")
    if STUDENT_KD in of_set:
        notes.append(f"{names[STUDENT_KD]} at the same number of steps {fixed(of_set[STUDENT_KD].perplexity)}")
    return f"{text} ({'; '.join(notes)})." if notes else f"{text}."


def _perplexities_gap_closed(losses: Mapping[str, float], model: str) -> float:
    before, teacher = losses.get(STUDENT_BEFORE, math.nan), losses.get(TEACHER, math.nan)
    if model in (STUDENT_BEFORE, TEACHER) or not teacher < before:
        return math.nan
    return (before - losses[model]) / (before - teacher)
