from __future__ import annotations

import csv
from typing import Any

import pyarrow.parquet as pq
import pytest
from searches import NUM_ROWS, search_config

from pocl_ray.config import Config, ObjectiveConfig
from pocl_ray.run_directory.storage import RunDirectory
from pocl_ray.tuning.candidates import Candidate, Planner, TrialOrigins
from pocl_ray.tuning.page import headline, write_page
from pocl_ray.tuning.results import (
    TrialRecord,
    best_first,
    constant_objective,
    decide,
    decisive,
    figures_of,
    pareto_front,
    read_record,
    table_rows,
    write_tables,
)
from pocl_ray.tuning.watching import short_key, trials_table

ORIGINS = TrialOrigins("signals", "student")


def record(candidate: Candidate, rouge_l: float, status: Any = "finished", num_tokens: int = 100) -> TrialRecord:
    planned = Planner(search_config(), NUM_ROWS).plan(candidate)
    reports = [
        {
            "rouge_l": rouge_l - 5 * (1 - part),
            "ce_loss": 2.0 - part,
            "stage": part,
            "num_steps": (part + 1) * 8,
            "num_samples": (part + 1) * 256,
            "num_tokens": (part + 1) * num_tokens,
            "is_finished": part == 1 and status == "finished",
        }
        for part in range(2 if status == "finished" else 1)
    ]
    return TrialRecord(
        planned.name(ORIGINS), candidate, planned.fingerprint(ORIGINS), 16, 512, status, "", reports, 12.5, 3.0
    )


def trial(number: int, rouge_l: float, status: Any = "finished", num_tokens: int = 100) -> TrialRecord:
    settings = {
        "curriculum.num_buckets": 2 + 2 * (number % 2),
        "curriculum.interval_epochs": 1 + number % 3,
        "curriculum.kd_temperature.end": 1.0 + number / 4,
    }
    return record(Candidate("trial", number, settings), rouge_l, status, num_tokens)


def again(of: TrialRecord, seed: int, rouge_l: float, status: Any = "finished") -> TrialRecord:
    return record(of.candidate.again(seed), rouge_l, status)


def some_records() -> list[TrialRecord]:
    control = record(Candidate("control", -1, {}), 50.0)
    lucky, steady, stopped = trial(0, 60.0), trial(1, 58.0), trial(2, 70.0, "stopped")
    return [
        control,
        lucky,
        steady,
        stopped,
        trial(3, 40.0),
        again(lucky, 101, 50.0),
        again(steady, 101, 57.0),
        again(control, 101, 52.0),
    ]


def config_of(**tune: Any) -> Config:
    return search_config(confirm={"top_k": 2, "seeds": [101]}, **tune)


def test_luck_is_not_called_tuning() -> None:
    tune = config_of().tune
    assert tune is not None
    outcome = decide(some_records(), tune)
    assert outcome.winner is not None and outcome.control is not None
    assert outcome.winner.record.candidate.number == 1
    assert outcome.winner.values == (58.0, 57.0)
    assert outcome.control.values == (50.0, 52.0)
    assert "better than plain distillation" in headline(outcome, config_of())


def test_a_contender_that_failed_on_another_seed_does_not_win_by_that() -> None:
    tune = config_of().tune
    assert tune is not None
    lucky, steady = trial(0, 60.0), trial(1, 58.0)
    outcome = decide([lucky, steady, again(lucky, 101, 0.0, "failed"), again(steady, 101, 50.0)], tune)
    assert outcome.winner is not None and outcome.winner.record.candidate.number == 1


def test_without_a_finished_trial_there_is_no_winner() -> None:
    tune = config_of().tune
    assert tune is not None
    assert decide([trial(0, 60.0, "stopped"), trial(1, 50.0, "failed")], tune).winner is None


def test_a_trial_that_is_beaten_in_everything_is_not_on_the_front() -> None:
    records = [trial(0, 60.0, num_tokens=300), trial(1, 50.0, num_tokens=100), trial(3, 49.0, num_tokens=200)]
    objectives = (ObjectiveConfig(metric="rouge_l"), ObjectiveConfig(metric="num_tokens"))
    assert pareto_front(records, objectives) == {records[0].name, records[1].name}


def test_the_tables_hold_every_trial_with_its_metrics_by_stage(tmp_path: Any) -> None:
    tune = config_of().tune
    assert tune is not None
    rows = table_rows(decide(some_records(), tune), tune)
    rows[1]["curriculum.interval_epochs"] = "2"  # a key of mixed kinds
    run_dir = RunDirectory.open(str(tmp_path), "run")
    write_tables(run_dir, rows)
    table = pq.read_table(tmp_path / "run/tune/results.parquet").to_pylist()
    with (tmp_path / "run/tune/results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(table) == len(lines) == 8
    assert table[2]["is_winner"] and not table[1]["is_winner"]
    assert (table[2]["stage_0/rouge_l"], table[2]["stage_1/rouge_l"]) == (53.0, 58.0)
    assert table[3]["status"] == "stopped" and table[3]["stage_1/rouge_l"] is None
    assert lines[2]["curriculum.num_buckets"] == "4"


def test_a_record_comes_back_from_its_file(tmp_path: Any) -> None:
    run_dir = RunDirectory.open(str(tmp_path), "run")
    written = trial(1, 50.0)
    written.write(run_dir)
    assert read_record(run_dir, written.name) == written
    assert read_record(run_dir, "nothing") is None


@pytest.mark.parametrize(("hand_off", "expected"), [("best", 7.0), ("last", 6.0)])
def test_figures_are_those_of_the_student_that_is_handed_on(hand_off: Any, expected: float) -> None:
    evaluations = [
        {"step": 0, "curriculum/stage": 0, "eval/dev/rouge_l": 99.0},
        {"step": 2, "curriculum/stage": 0, "eval/dev/rouge_l": 9.0},
        {"step": 4, "curriculum/stage": 1, "eval/dev/rouge_l": 7.0},
        {"step": 6, "curriculum/stage": 1, "eval/dev/rouge_l": 6.0},
    ]
    assert figures_of(evaluations, hand_off) == {"rouge_l": expected}
    assert figures_of(evaluations[:2], hand_off) == {"rouge_l": 9.0}


@pytest.mark.parametrize("objectives", [["rouge_l"], ["rouge_l", "num_tokens"]])
def test_the_page_shows_the_winner_beside_the_control_in_every_plot(tmp_path: Any, objectives: list[str]) -> None:
    config = config_of(objectives=objectives)
    assert config.tune is not None
    run_dir = RunDirectory.open(str(tmp_path), "run")
    records = some_records()
    records[3].reason = "<script>alert(1)</script>"
    write_page(run_dir, config, decide(records, config.tune), Planner(config, NUM_ROWS), 3)
    page = (tmp_path / "run/tune/report.html").read_text()
    assert "trial-001 won with rouge_l 57.50" in page
    assert "<script>" not in page and "https://" not in page
    names = {path.stem for path in (tmp_path / "run/tune/plots").glob("*.png")}
    by = {"by_curriculum_num_buckets", "by_curriculum_interval_epochs", "by_curriculum_kd_temperature_end"}
    assert {"history", "curves", "parallel", "importance", *by} <= names
    assert ("against_num_tokens" in names) == (len(objectives) == 2)


def test_a_search_without_any_result_still_has_a_page(tmp_path: Any) -> None:
    config = config_of(control=False)
    assert config.tune is not None
    run_dir = RunDirectory.open(str(tmp_path), "run")
    failed = trial(0, 1.0, "failed")
    failed.reports.clear()
    write_page(run_dir, config, decide([failed], config.tune), Planner(config, NUM_ROWS), 0)
    assert "No trial reached its end" in (tmp_path / "run/tune/report.html").read_text()


def test_keys_are_as_short_as_they_can_be_told_apart() -> None:
    keys = dict.fromkeys(["curriculum.num_buckets", "curriculum.kd_temperature.end", "curriculum.kd_ratio.end"])
    assert [short_key(key, keys) for key in keys] == ["num_buckets", "kd_temperature.end", "kd_ratio.end"]


def test_the_live_table_has_a_line_for_each_trial() -> None:
    tune = config_of().tune
    assert tune is not None
    records = {r.name: r for r in some_records()}
    table = trials_table(records, tune, "search", {})
    assert table.row_count == len(records)


def with_loss(number: int, rouge_l: float, loss: float) -> TrialRecord:
    made = trial(number, rouge_l)
    made.reports[-1]["ce_loss"] = loss
    return made


def test_of_equal_figures_the_lower_dev_loss_wins() -> None:
    config = search_config()
    assert config.tune is not None
    objective = config.tune.objectives[0]
    records = [with_loss(0, 0.0, 3.0), with_loss(1, 0.0, 1.0), with_loss(2, 0.0, 2.0), with_loss(3, -1.0, 0.5)]
    assert [r.candidate.number for r in best_first(records, objective)] == [1, 2, 0, 3]
    winner = decide(records, config.tune).winner
    assert winner is not None
    assert winner.record.candidate.number == 1


@pytest.mark.parametrize("metric", ["rouge_l", "kd_loss"])
def test_what_schedulers_compare_is_moved_by_the_loss_among_equals_alone(metric: Any) -> None:
    objective = ObjectiveConfig(metric=metric)

    def better(one: dict[str, float], other: dict[str, float]) -> bool:
        return objective.sign * (decisive(one, objective) - decisive(other, objective)) > 0

    if metric != "kd_loss":  # which is the dev loss itself
        assert better({metric: 5.0, "ce_loss": 1.0}, {metric: 5.0, "ce_loss": 1.1})
    assert better({metric: 5.0 + objective.sign * 1e-4, "ce_loss": 99.0}, {metric: 5.0, "ce_loss": 0.1})
    assert decisive({metric: 5.0}, objective) == pytest.approx(5.0, abs=2e-6)


def test_an_objective_that_is_equal_in_all_trials_is_told() -> None:
    objective = ObjectiveConfig(metric="rouge_l")
    assert "rouge_l is 0 in all of 2 trials" in constant_objective([trial(0, 0.0), trial(1, 0.0)], objective)
    assert not constant_objective([trial(0, 0.0), trial(1, 0.1)], objective)
    assert not constant_objective([trial(0, 0.0)], objective)
