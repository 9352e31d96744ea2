from __future__ import annotations

import time

import numpy as np
import pytest

from pocl_ray.difficulty.ranking import SIGNALS, constant_signals, rank_rows, weak_teacher
from pocl_ray.errors import ConfigError, DataError


def chained_sorts(rouge_l: list[float], ce_loss: list[float]) -> list[int]:
    """The rule as REFERENCE.md words it, on plain lists."""
    rows = list(range(len(rouge_l)))
    score = dict.fromkeys(rows, 0.0)
    rows = sorted(rows, key=lambda row: rouge_l[row], reverse=True)
    for place, row in enumerate(rows, start=1):
        score[row] += 1 / (60 + place)
    rows = sorted(rows, key=lambda row: ce_loss[row])
    for place, row in enumerate(rows, start=1):
        score[row] += 1 / (60 + place)
    return sorted(rows, key=lambda row: score[row], reverse=True)


def test_ties_are_broken_by_the_list_that_the_sort_before_left() -> None:
    rng = np.random.default_rng(3)
    rouge_l = rng.integers(0, 4, 300).astype(float)
    ce_loss = rng.integers(0, 5, 300).astype(float)
    _, rank = rank_rows({"rouge_l": rouge_l, "ce_loss": ce_loss})
    assert np.argsort(rank).tolist() == chained_sorts(rouge_l.tolist(), ce_loss.tolist())


def test_each_signal_knows_whether_high_or_low_is_easy() -> None:
    for name, signal in SIGNALS.items():
        _, rank = rank_rows({name: np.array([1.0, 2.0, 3.0])})
        assert rank.tolist() == ([3, 2, 1] if signal.easy == "high" else [1, 2, 3]), name


def test_score_is_the_sum_of_reciprocal_ranks() -> None:
    score, _ = rank_rows({"rouge_l": [10.0, 30.0], "ce_loss": [0.5, 0.7]}, rrf_k=1)
    assert score.tolist() == [1 / 3 + 1 / 2, 1 / 2 + 1 / 3]


def test_equal_rows_keep_file_order_or_are_drawn_by_seed() -> None:
    equal = {"rouge_l": np.zeros(50)}
    assert rank_rows(equal)[1].tolist() == list(range(1, 51))
    drawn = rank_rows(equal, tie_break="seeded", seed=1)[1].tolist()
    assert sorted(drawn) == list(range(1, 51)) != drawn
    assert drawn == rank_rows(equal, tie_break="seeded", seed=1)[1].tolist()
    assert drawn != rank_rows(equal, tie_break="seeded", seed=2)[1].tolist()


def test_a_seeded_tie_break_leaves_rows_that_differ_alone() -> None:
    values = {"ce_loss": np.random.default_rng(0).permutation(100).astype(float)}
    assert rank_rows(values)[1].tolist() == rank_rows(values, tie_break="seeded", seed=9)[1].tolist()


def test_no_rows_give_an_empty_ranking() -> None:
    score, rank = rank_rows({"rouge_l": []})
    assert score.shape == rank.shape == (0,)


def test_an_unknown_signal_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean teacher_ce_loss"):
        rank_rows({"teacher_ce": [1.0]})


def test_a_value_that_is_not_a_number_is_an_error_that_names_the_row() -> None:
    with pytest.raises(DataError, match="ce_loss: not a number for row 2"):
        rank_rows({"ce_loss": [1.0, 2.0, float("nan")]})


def test_signals_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in length"):
        rank_rows({"rouge_l": [1.0], "ce_loss": [1.0, 2.0]})


def test_a_million_rows_take_about_a_second() -> None:
    rng = np.random.default_rng(0)
    signals = {"rouge_l": rng.random(1_000_000), "ce_loss": rng.random(1_000_000)}
    started = time.perf_counter()
    rank_rows(signals)
    assert time.perf_counter() - started < 5, "about 0.5 s on one idle core"


def test_a_weight_multiplies_a_signals_part_of_the_score() -> None:
    signals = {"rouge_l": [10.0, 30.0], "ce_loss": [0.5, 0.7]}
    score, rank = rank_rows(signals, rrf_k=1, weights={"ce_loss": 3.0})
    assert score.tolist() == [1 / 3 + 3 / 2, 1 / 2 + 3 / 3]
    assert rank.tolist() == [1, 2]
    assert rank_rows(signals, rrf_k=1, weights={"ce_loss": 0.5})[1].tolist() == [2, 1]


def test_weights_of_one_change_nothing_to_the_last_bit() -> None:
    rng = np.random.default_rng(0)
    signals = {"rouge_l": rng.random(500), "ce_loss": rng.random(500)}
    plain, weighted = rank_rows(signals), rank_rows(signals, weights={"rouge_l": 1.0, "ce_loss": 1.0})
    assert all(np.array_equal(a, b) for a, b in zip(plain, weighted, strict=True))


def test_a_signal_of_somebody_else_brings_its_direction() -> None:
    values = {"column:mine": [1.0, 2.0, 3.0]}
    assert rank_rows(values, easy={"column:mine": "high"})[1].tolist() == [3, 2, 1]
    assert rank_rows(values, easy={"column:mine": "low"})[1].tolist() == [1, 2, 3]


def test_a_signal_that_is_equal_in_every_row_takes_no_part() -> None:
    losses = [3.0, 1.0, 2.0]
    _, alone = rank_rows({"ce_loss": losses})
    for flat in (0.0, 7.5):
        _, rank = rank_rows({"rouge_l": [flat] * 3, "ce_loss": losses})
        assert rank.tolist() == alone.tolist() == [3, 1, 2]
    assert rank_rows({"rouge_l": [0.0] * 3})[1].tolist() == [1, 2, 3]  # where there is no other, the file's order
    assert constant_signals({"rouge_l": [0.0, 0.0], "ce_loss": [1.0, 2.0]}) == ["rouge_l"]


def test_a_teacher_that_predicts_the_rows_no_better_than_the_student_is_said() -> None:
    weak = weak_teacher({"ce_loss": [1.0, 2.0], "teacher_ce_loss": [2.0, 1.5]})
    assert weak is not None and "1.750 nats/token, the student's 1.500" in weak
    assert weak_teacher({"ce_loss": [1.0, 2.0], "teacher_ce_loss": [1.0, 1.5]}) is None


@pytest.mark.parametrize("signals", [{"ce_loss": [1.0]}, {"ce_loss": [1.0], "teacher_ce_loss": [float("nan")]}])
def test_nothing_is_said_of_a_teacher_that_was_not_measured(signals: dict[str, list[float]]) -> None:
    assert weak_teacher(signals) is None
