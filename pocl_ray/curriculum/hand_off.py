"""The end of a stage: whether it has converged, and the dev figure that chooses its best checkpoint. Pure functions.

Dev figures are part of the metric stream, which is in the checkpoint. They are reduced over the workers, so all workers
hold the same stream. All workers therefore decide the same, and so does a resumed run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pocl_ray.config import PlateauConfig
from pocl_ray.records import Stage

DevFigure = tuple[float, float]
"""The dev figure that is compared, then the tie-breaker; the greater tuple is the better."""
NUM_ALIKE = 3  # evaluations; the first is of the student before training, and two may well agree by chance


def has_converged(stage: Stage, steps_done: int, metrics: Sequence[Mapping[str, Any]], plateau: PlateauConfig) -> bool:
    """Return whether a stage that may end early has converged at this evaluation.

    Args:
        stage: The stage; one without `min_epochs` does not end early.
        steps_done: Its optimizer steps so far.
        metrics: The metric stream of the run, including the evaluation of this step.
        plateau: The dev figure that is watched, and the number of evaluations without a better one that end the stage.
    """
    if stage.min_epochs is None or steps_done < stage.min_epochs * stage.steps_per_epoch:
        return False
    key, sign = f"eval/dev/{plateau.metric}", 1.0 if plateau.metric == "rouge_l" else -1.0
    figures = [
        (sign * record[key], -dev_loss(record))
        for record in metrics
        if key in record and record["curriculum/stage"] == stage.index and record["step"] > 0
    ]
    return num_since_best(figures) >= plateau.patience


def hand_off_figure(figures: Mapping[str, Any]) -> DevFigure:
    """Return the dev figures by which the best checkpoint of a stage is chosen; the greatest is the best.

    The first is dev ROUGE-L. Plain text has no prompts to answer. There it is the negative dev loss. The dev loss
    decides between equal figures, so that a ROUGE-L that never changes decides nothing. One that is not finite is the
    worst.
    """
    loss = -dev_loss(figures)
    if "eval/dev/rouge_l" not in figures:
        return loss, loss
    rouge_l = float(figures["eval/dev/rouge_l"])
    return (rouge_l if math.isfinite(rouge_l) else -math.inf), loss


def dev_loss(figures: Mapping[str, Any]) -> float:
    """Return the distillation loss of the dev rows, and without a teacher the cross-entropy.

    One that is not finite is the worst, of whichever sign, and so is one that was not measured.
    """
    loss = float(figures.get("eval/dev/kd_loss", figures.get("eval/dev/ce_loss", math.inf)))
    return loss if math.isfinite(loss) else math.inf


def num_since_best(figures: Sequence[DevFigure]) -> int:
    """Return the number of figures after the best one; higher is better, and the first of equal figures counts.

    A figure that is not finite is never the best.
    """
    best, place = (-math.inf, -math.inf), -1
    for position, figure in enumerate(figures):
        if math.isfinite(figure[0]) and (place < 0 or figure > best):
            best, place = figure, position
    return len(figures) - 1 - place


def constant_figure(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Return a warning where dev ROUGE-L has never moved in several evaluations; empty where it has."""
    found = [record["eval/dev/rouge_l"] for record in evaluations if "eval/dev/rouge_l" in record]
    if len(found) < NUM_ALIKE or len(set(found)) > 1:
        return ""
    return (
        f"dev ROUGE-L is {found[0]:.1f} in each of {len(found)} evaluations, so it tells no checkpoint from another "
        "and the dev loss decides; look at the references in data.dev, or let answers be longer "
        "(evaluation.dev_generation.max_new_tokens)"
    )
