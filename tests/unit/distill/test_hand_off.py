"""The decision to end a stage: a function of the metric stream alone."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import runs

from pocl_ray.config import PlateauConfig
from pocl_ray.curriculum.hand_off import constant_figure, hand_off_figure, has_converged, num_since_best
from pocl_ray.distill.checkpoint import Progress

STAGE = runs.stage(1, 16, num_epochs=9, min_epochs=1)  # 2 steps an epoch
Metric = Literal["rouge_l", "kd_loss", "ce_loss"]


def stream(figures: list[float], metric: Metric = "rouge_l", stage: int = 1) -> list[dict[str, Any]]:
    """One evaluation after each epoch of two steps, with training records between them."""
    records: list[dict[str, Any]] = []
    for epoch, figure in enumerate(figures, 1):
        records.append({"step": 100 + 2 * epoch, "train/loss": 1.0, "curriculum/stage": stage})
        records.append({"step": 100 + 2 * epoch, "curriculum/stage": stage, f"eval/dev/{metric}": figure})
    return records


def converged(figures: list[float], patience: int = 2, metric: Metric = "rouge_l", **stage: Any) -> bool:
    plateau = PlateauConfig(metric=metric, patience=patience)
    made = runs.stage(1, 16, **{"num_epochs": 9, "min_epochs": 1, **stage})
    return has_converged(made, 2 * len(figures), stream(figures, metric), plateau)


@pytest.mark.parametrize(
    ("figures", "num"),
    [([], 0), ([3], 0), ([3, 3], 1), ([3, 2, 2.9], 2), ([1, 2, 3], 0), ([2, 1, 3], 0), ([float("nan"), 1, 0], 1)],
)
def test_evaluations_since_the_best_are_counted_from_the_first_of_equal_ones(figures: list[float], num: int) -> None:
    assert num_since_best([(figure, 0.0) for figure in figures]) == num


def test_figures_that_are_no_numbers_are_no_improvement() -> None:
    assert num_since_best([(float("nan"), 0.0)] * 3) == 3


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_a_figure_that_is_not_finite_never_decides(odd: float) -> None:
    assert num_since_best([(1.0, 0.0), (odd, 0.0), (0.5, 0.0)]) == 2
    assert hand_off_figure({"eval/dev/kd_loss": odd}) == (float("-inf"), float("-inf"))
    assert hand_off_figure({"eval/dev/rouge_l": odd, "eval/dev/kd_loss": 1.0}) < (0.0, float("-inf"))
    for losses in ([odd, 2.0, odd], [odd, odd, 2.0]):
        progress = Progress()
        taken = [progress.note_best(evaluation(0.0, loss)) for loss in losses]
        assert taken[losses.index(2.0)] and not taken[2 - losses[::-1].index(odd)]
    assert converged([odd, odd, odd]) and converged([2.0, odd, odd], metric="kd_loss")


def test_a_stage_ends_after_patience_evaluations_without_a_better_figure() -> None:
    figures = [10, 20, 19, 20, 25]
    assert [converged(figures[:n]) for n in range(1, 6)] == [False, False, False, True, False]


@pytest.mark.parametrize("metric", ["kd_loss", "ce_loss"])
def test_losses_are_better_when_they_fall(metric: Metric) -> None:
    assert converged([3.0, 3.1, 3.2], metric=metric)
    assert not converged([3.0, 2.9, 2.8], metric=metric)


def test_it_does_not_end_before_min_epochs() -> None:
    assert not converged([5, 4, 3], min_epochs=4)
    assert converged([5, 4, 3, 2], min_epochs=4)


def test_a_stage_with_a_fixed_interval_never_ends_early() -> None:
    assert not converged([5, 4, 3, 2, 1], min_epochs=None)


def test_evaluations_of_other_stages_do_not_count() -> None:
    metrics = [*stream([99, 98, 97], stage=0), *stream([1, 2, 3])]
    assert not has_converged(STAGE, 6, metrics, PlateauConfig())
    assert has_converged(STAGE, 6, [*stream([1, 2, 3], stage=0), *stream([9, 8, 7])], PlateauConfig())


def test_the_evaluation_before_training_does_not_count() -> None:
    stage = runs.stage(0, 16, num_epochs=9, min_epochs=1)
    before = {"step": 0, "curriculum/stage": 0, "eval/dev/rouge_l": 50.0}
    metrics = [before, {"step": 2, "curriculum/stage": 0, "eval/dev/rouge_l": 10.0}]
    assert not has_converged(stage, 2, metrics, PlateauConfig(patience=1))


def test_the_best_checkpoint_is_chosen_by_rouge_l_and_without_answers_by_the_loss() -> None:
    losses = {"eval/dev/ce_loss": 3.0, "eval/dev/kd_loss": 0.5}
    assert hand_off_figure({**losses, "eval/dev/rouge_l": 40.0}) > hand_off_figure({"eval/dev/rouge_l": 39.0})
    assert hand_off_figure(losses) == (-0.5, -0.5)
    assert hand_off_figure({"eval/dev/ce_loss": 3.0}) == (-3.0, -3.0)
    assert hand_off_figure({"eval/dev/ce_loss": float("nan")}) == (float("-inf"), float("-inf"))


def evaluation(rouge_l: float, loss: float, key: str = "kd_loss") -> dict[str, Any]:
    return {"eval/dev/rouge_l": rouge_l, f"eval/dev/{key}": loss, "curriculum/stage": 0, "step": 1}


@pytest.mark.parametrize("key", ["kd_loss", "ce_loss"])
def test_of_equal_rouge_l_the_lower_loss_is_handed_on_and_of_equal_both_the_first(key: str) -> None:
    progress = Progress()
    losses = [3.0, 2.0, 2.0, 2.5, float("nan"), 1.5]
    assert [progress.note_best(evaluation(0.0, loss, key)) for loss in losses] == [
        True,
        True,
        False,
        False,
        False,
        True,
    ]
    assert progress.note_best(evaluation(0.1, 9.0, key))


def test_a_checkpoint_of_an_older_version_keeps_its_best_unless_rouge_l_is_better() -> None:
    progress = Progress(best_figure=20.0)
    assert not progress.note_best(evaluation(20.0, 0.0))
    assert progress.note_best(evaluation(20.1, 9.0))


def test_a_stage_goes_on_while_the_loss_falls_at_the_same_rouge_l() -> None:
    def found(losses: list[float]) -> bool:
        made = runs.stage(0, 16, num_epochs=9, min_epochs=1)
        records = [{**evaluation(0.0, loss), "step": 2 * place} for place, loss in enumerate(losses, 1)]
        return has_converged(made, 2 * len(losses), records, PlateauConfig(patience=2))

    assert not found([5.0, 4.0, 3.0, 2.0])
    assert found([5.0, 4.0, 4.0, 4.5])


def test_a_dev_figure_that_never_moves_is_told() -> None:
    assert not constant_figure([evaluation(0.0, 1.0)] * 2)
    assert "dev ROUGE-L is 0.0 in each of 3 evaluations" in constant_figure([evaluation(0.0, 1.0)] * 3)
    assert not constant_figure([evaluation(0.0, 1.0), evaluation(0.0, 1.0), evaluation(0.1, 1.0)])
    assert not constant_figure([{"eval/dev/ce_loss": 1.0}] * 5)  # plain text has no ROUGE-L
