"""The arithmetic behind the report."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from pocl_ray.report import page
from pocl_ray.report.curves import Curve, best_of_stages, smooth, thin
from pocl_ray.report.difficulty import (
    OTHER_TOPICS,
    buckets_of,
    example_rows,
    signal_names,
    spearman,
    spread_by_bucket,
    topic_table,
    topics_of_rows,
)
from pocl_ray.report.figures import compare_with_control, set_results
from pocl_ray.report.files import Metrics, _columns, step_times
from pocl_ray.report.headline import weak_teacher_sentences


def test_rows_left_over_by_equal_buckets_fall_into_the_hardest() -> None:
    assert buckets_of(np.array([1, 2, 3, 4, 5]), (2, 4)).tolist() == [0, 0, 1, 1, 1]


def test_spread_leaves_out_what_is_not_finite_and_survives_an_empty_bucket() -> None:
    values, buckets = np.array([1.0, 3.0, np.nan, np.inf]), np.array([0, 0, 1, 1])
    spread = spread_by_bucket("x", values, buckets, 2, fused=True)
    assert spread.num_not_finite == 2
    assert spread.boxes[0].mean == 2.0 and spread.boxes[0].quantiles[2] == 2.0
    assert spread.boxes[1].num_rows == 0 and math.isnan(spread.boxes[1].mean)


def test_spearman_is_that_of_the_textbook_with_ties() -> None:
    left, right = np.array([1.0, 2.0, 2.0, 4.0]), np.array([10.0, 30.0, 20.0, 40.0])
    # Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: covariance 4.5, variances 4.5 and 5.
    assert spearman([left, right])[0, 1] == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman([left, -left])[0, 1] == pytest.approx(-1)


def test_spearman_of_constant_or_missing_columns_is_unknown() -> None:
    matrix = spearman([np.ones(5), np.arange(5.0), np.full(5, np.nan)])
    assert np.isnan(matrix[0, 1]) and np.isnan(matrix[1, 2])


def test_fused_signals_come_first() -> None:
    scores = dict.fromkeys(["id", "a", "b", "rank", "rrf_score", "num_prompt_tokens"], np.zeros(1))
    assert signal_names(scores, ("b", "not_there")) == ["b", "a"]


def test_topics_are_sorted_by_mean_rank_and_the_small_ones_joined() -> None:
    topics = np.array(["hard", "hard", "easy", "easy", "rare", "odd"], dtype=object)
    table = topic_table(topics, np.array([6, 5, 1, 2, 3, 4]), np.array([1, 1, 0, 0, 0, 1]), 2, limit=3)
    assert table.names == ("easy", "hard", OTHER_TOPICS)
    assert table.num_rows == (2, 2, 2)
    assert table.shares.tolist() == [[1, 0], [0, 1], [0.5, 0.5]]


def _rows(topics: list[str | None]) -> pa.Table:
    n = len(topics)
    prompts = [f"Preamble\n\nask {i}\n\nResponse:\n" for i in range(n)]
    return pa.table(
        {
            "id": range(n),
            "topic": pa.array(topics, pa.string()),
            "prompt": prompts,
            "references": [[f"answer {i}", "other"] for i in range(n)],
        }
    )


def test_topics_follow_the_ids_of_the_scores_and_one_topic_is_none() -> None:
    topics = topics_of_rows(_rows(["a", None, "b"]), np.array([2, 1, 0]))
    assert topics is not None and topics.tolist() == ["b", "(no topic)", "a"]
    assert topics_of_rows(_rows(["a", None, "a"]), np.array([0, 1, 2])) is None


def test_examples_show_each_row_once_without_the_templates_lines() -> None:
    scores = {"id": np.arange(3), "rank": np.array([3, 1, 2]), "ce": np.array([0.3, 0.1, 0.2])}
    easiest, hardest = example_rows(_rows(["t", "t", "t"]), scores, ["ce"], num_examples=5)
    assert [row.prompt for row in easiest] == ["ask 1", "ask 2"]
    assert [row.prompt for row in hardest] == ["ask 0"]
    assert hardest[0].reference == "answer 0" and hardest[0].num_more_references == 1
    assert hardest[0].signals == (("ce", 0.3),)


def test_smoothing_does_not_reach_over_a_stage_border() -> None:
    values = np.array([1.0] * 50 + [5.0] * 50)
    smoothed = smooth(Curve(np.arange(1, 101.0), values, 0), (50, 100))
    assert np.array_equal(smoothed, values)


def test_thinned_curve_keeps_its_extremes_and_ends() -> None:
    steps, values = np.arange(10_000.0), np.sin(np.arange(10_000))
    values[1234], values[4321] = 9, -9
    few_steps, few_values = thin(steps, values, max_points=200)
    assert len(few_steps) <= 200 and {9.0, -9.0} <= set(few_values.tolist())
    assert few_steps[0] == 0 and few_steps[-1] == 9999


def test_best_of_a_stage_is_its_first_highest_evaluation_its_end_included() -> None:
    curve = Curve(np.array([5.0, 10, 15, 20]), np.array([3.0, 3, 9, 1]), 0)
    assert best_of_stages(curve, (10, 20)) == [0, 2]


def test_step_that_a_resumed_run_logs_again_counts_once() -> None:
    lines = [{"step": 1, "train/loss": 5.0}, {"step": 2, "train/loss": 9.0}, {"step": 2, "train/loss": 4.0}]
    metrics = Metrics(_columns([*lines, {"step": 2, "eval/dev/rouge_l": 1.0}], "train/"), {})
    assert metrics.train["train/loss"].tolist() == [5.0, 4.0]


def test_steps_of_an_earlier_start_are_not_counted_in_the_seconds_of_the_last_one() -> None:
    counts = {"num_steps": 240, "num_tokens": 48_000, "earlier_steps": 96, "earlier_tokens": 19_200}
    (whole,) = step_times({"distill": {"seconds": 10.0, "counts": {"num_steps": 240, "num_tokens": 48_000}}})
    (rest,) = step_times({"distill": {"seconds": 10.0, "counts": counts}})
    assert (whole.num_steps, whole.tokens_per_s) == (240, 4_800)
    assert (rest.num_steps, rest.tokens_per_s) == (144, 2_880)


def test_rate_of_a_training_is_over_its_own_seconds_and_not_over_those_of_its_step() -> None:
    counts = {"num_steps": 240, "num_tokens": 48_000, "training_s": 30.0}
    (waited_for,) = step_times({"control": {"seconds": 0.5, "counts": counts}})  # it had trained beside the curriculum
    assert (waited_for.tokens_per_s, waited_for.is_beside) == (1_600, True)
    (resumed,) = step_times({"distill": {"seconds": 90.0, "counts": counts}})  # 60 of them were those of another start
    assert (resumed.tokens_per_s, resumed.is_beside) == (1_600, False)


def _result(**figures: tuple[float, float]) -> dict[str, object]:
    return {
        "dev": {
            model: {
                "rouge_l": {"mean": sampled, "std": 0.5, "by_seed": {"1": sampled - 0.5, "2": sampled + 0.5}},
                "greedy": {"rouge_l": greedy},
            }
            for model, (sampled, greedy) in figures.items()
        }
    }


def test_gap_closed_is_the_share_between_undistilled_student_and_teacher() -> None:
    sets = _result(student_before=(20, 10), student=(50, 20), teacher=(60, 50))
    student = set_results(sets)[0].model("student")
    assert student is not None
    assert (student.gap_closed, student.gap_closed_greedy) == (0.75, 0.25)


def test_gap_is_unknown_where_the_teacher_is_no_better() -> None:
    student = set_results(_result(student_before=(60, 60), student=(50, 50), teacher=(60, 60)))[0].model("student")
    assert student is not None and math.isnan(student.gap_closed)


def test_comparison_is_paired_by_seed_and_small_differences_are_level() -> None:
    sets = _result(student=(50, 40), student_kd=(48, 44))
    sampled, greedy = compare_with_control(set_results(sets)[0])
    assert (sampled.verdict, sampled.difference, sampled.num_won) == ("ahead", 2, 2)
    assert (greedy.verdict, greedy.difference) == ("behind", -4)
    noisy = _result(student=(50, 40), student_kd=(49.9, 40))
    noisy["dev"]["student_kd"]["rouge_l"]["by_seed"] = {"1": 52.0, "2": 47.8}  # type: ignore[index]
    assert [c.verdict for c in compare_with_control(set_results(noisy)[0])] == ["level", "level"]


def test_numbers_are_printed_for_people() -> None:
    minus, nothing = "\N{MINUS SIGN}", page.NOTHING
    assert [page.fixed(x, 1) for x in (1234.56, -0.04, -3, math.nan)] == ["1,234.6", "0.0", f"{minus}3.0", nothing]
    assert [page.signed(x, 1) for x in (2, -2, 0.01, math.inf)] == ["+2.0", f"{minus}2.0", "0.0", nothing]
    assert [page.correlation(x) for x in (0.5, -0.25, 1.0, math.nan)] == [".50", f"{minus}.25", "1.00", nothing]
    assert [page.duration(x) for x in (0.02, 59.97, 3599.6)] == ["0.0 s", "1 min 00 s", "1 h 00 min"]


def test_markdown_escapes_what_would_be_markup() -> None:
    assert page.markdown("a|b <i>\n*x*") == r"a\|b &lt;i&gt; \*x\*"


def test_a_teacher_that_is_behind_its_student_is_named_with_both_figures() -> None:
    def scores(mean: float, greedy: float) -> dict[str, object]:
        rouge_l = {"mean": mean, "std": 1.0, "by_seed": {"10": mean}}
        return {"rouge_l": rouge_l, "exact_match": rouge_l, "greedy": {"rouge_l": greedy, "exact_match": greedy}}

    sets = {
        "weak": {"student": scores(61.0, 70.0), "teacher": scores(57.0, 75.0)},
        "strong": {"student": scores(61.0, 70.0), "teacher": scores(88.0, 91.0)},
        "alone": {"student": scores(61.0, 70.0)},
    }
    (sentence,) = weak_teacher_sentences(set_results(sets))
    assert "on weak the teacher is no better" in sentence and "sampled 57.00 against 61.00" in sentence
    assert "greedy" not in sentence
