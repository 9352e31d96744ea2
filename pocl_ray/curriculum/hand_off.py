"""The end of a stage: when it has converged, and by which dev figure the next one is handed its start. Pure functions.

Dev figures stand in the metric stream. The checkpoint holds that stream, and it is equal on all workers, since dev
figures are reduced over them. So all workers decide the same, and so does a resumed run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pocl_ray.config import PlateauConfig
from pocl_ray.records import Stage


def has_converged(stage: Stage, steps_done: int, metrics: Sequence[Mapping[str, Any]], plateau: PlateauConfig) -> bool:
    """Return whether a stage that may end early has converged at this evaluation.

    Args:
        stage: The stage; one without `min_epochs` does not end early.
        steps_done: Its optimizer steps so far.
        metrics: The metric stream of the run, the evaluation of this step included.
        plateau: The dev figure that is watched, and how long it may go without a better one.
    """
    if stage.min_epochs is None or steps_done < stage.min_epochs * stage.steps_per_epoch:
        return False
    key, sign = f"eval/dev/{plateau.metric}", 1.0 if plateau.metric == "rouge_l" else -1.0
    figures = [
        sign * record[key]
        for record in metrics
        if key in record and record["curriculum/stage"] == stage.index and record["step"] > 0
    ]
    return num_since_best(figures) >= plateau.patience


def hand_off_figure(figures: Mapping[str, Any]) -> float:
    """Return the dev figure by which the best checkpoint of a stage is chosen; higher is better.

    It is dev ROUGE-L. Plain text has no prompts to answer; there it is the distillation loss, and without a teacher the
    cross-entropy, with its sign turned. A loss that is not a number is the worst.
    """
    if "eval/dev/rouge_l" in figures:
        return float(figures["eval/dev/rouge_l"])
    loss = float(figures.get("eval/dev/kd_loss", figures["eval/dev/ce_loss"]))
    return -math.inf if math.isnan(loss) else -loss


def num_since_best(figures: Sequence[float]) -> int:
    """Return how many figures have followed the best one, which is the first of equal ones; higher is better.

    A figure that is not a number is never the best.
    """
    best, place = float("-inf"), -1
    for position, figure in enumerate(figures):
        if figure > best:
            best, place = figure, position
    return len(figures) - 1 - place
