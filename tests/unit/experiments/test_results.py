"""Comparisons from records, their tables, and the page: no training is needed for any of them."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from arms_config import NUM_ROWS, experiment_config

from pocl_ray.config import Config
from pocl_ray.experiments.arms import plan_arms
from pocl_ray.experiments.page import PAGE, TABLE, headline, write_page
from pocl_ray.experiments.results import (
    COMPARISONS,
    CURVES,
    DEV_ROWS,
    TRAININGS,
    Outcome,
    TrainingRecord,
    compare,
    read_record,
    write_tables,
)
from pocl_ray.run_directory.storage import RunDirectory

SEEDS = (1, 2, 3)


def record(arm: str, seed: int, rouge_l: float, **changes: object) -> TrainingRecord:
    figures = {"rouge_l": rouge_l, "sampled_rouge_l": rouge_l - 5, "kl": 1 - rouge_l / 100, "ce_loss": 0.5}
    made = TrainingRecord(
        name=f"{arm}-seed-{seed}",
        phase="confirm",
        arm=arm,
        seed=seed,
        num_steps=24,
        num_tokens=4_000,
        seconds=1.5,
        flops={"scoring": 1e9, "refreshing": 0.0, "training": 5e9},
        figures={"test": figures},
        curve=[{"step": step, "num_tokens": 10 * step, "rouge_l": rouge_l, "ce_loss": 1.0} for step in (0, 24)],
    )
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture
def outcome() -> Outcome:
    arms = plan_arms(experiment_config(), NUM_ROWS)
    records = [record("plain", s, 60 + s) for s in SEEDS]
    records += [record("hot", s, 62 + s + 0.1 * s) for s in SEEDS]
    records += [record("fast", s, 60 + s) for s in SEEDS[:2]] + [record("fast", 3, 0, failure="diverged", figures={})]
    pairs = [("hot", "plain", "steps"), ("fast", "plain", "steps")]
    return Outcome(arms, "plain", (), tuple(arms), tuple(records), tuple(compare(records, pairs, "confirm")), ())  # type: ignore[arg-type]


def test_arms_are_compared_over_the_seeds_that_both_have(outcome: Outcome) -> None:
    found = {(one.arm, one.figure): one for one in outcome.comparisons}
    hot = found["hot", "rouge_l"]
    assert hot.difference.mean == pytest.approx(2.2)
    assert (hot.difference.num_seeds, hot.verdict) == (3, "ahead")
    assert found["hot", "kl"].verdict == "ahead"  # less is better
    assert found["fast", "rouge_l"].difference.num_seeds == 2
    assert ("hot", "exact_match") not in found


def test_one_seed_in_common_is_no_comparison() -> None:
    records = [record("plain", 1, 60), record("hot", 1, 61), record("hot", 2, 61)]
    assert compare(records, [("hot", "plain", "steps")], "confirm") == []


def test_screening_is_never_mixed_with_judging() -> None:
    records = [record("plain", s, 60, phase="screen") for s in SEEDS] + [record("hot", s, 61) for s in SEEDS]
    assert compare(records, [("hot", "plain", "steps")], "confirm") == []


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    run_dir, made = RunDirectory.open(str(tmp_path), "run"), record("plain", 1, 60)
    made.write(run_dir)
    assert read_record(run_dir, "confirm", made.name) == made
    assert read_record(run_dir, "screen", made.name) is None


def test_tables_are_parquet_and_csv(tmp_path: Path, outcome: Outcome) -> None:
    run_dir = RunDirectory.open(str(tmp_path), "run")
    write_tables(run_dir, outcome.records, outcome.comparisons)
    for place, num_rows in ((TRAININGS, 9), (COMPARISONS, 8), (CURVES, 18)):
        table = pq.read_table(run_dir.local(f"{place}.parquet"))
        assert table.num_rows == num_rows
        rows = list(csv.DictReader(io.StringIO(run_dir.read_text(f"{place}.csv"))))
        assert list(rows[0]) == table.column_names
        assert len(rows) == num_rows


def test_losses_of_dev_rows_are_a_table_of_their_own(tmp_path: Path) -> None:
    run_dir, losses = RunDirectory.open(str(tmp_path), "run"), {"ce_loss": {"2": [0.5, 0.25], "24": [0.5, 0.125]}}
    records = [
        record("plain", 1, 60, row_losses={**losses, "kl": losses["ce_loss"]}),
        record("sft", 1, 60, row_losses=losses),
        record("old", 1, 60),
    ]
    write_tables(run_dir, records, [])
    table = pq.read_table(Path(run_dir.uri) / DEV_ROWS)
    assert table["arm"].to_pylist() == ["plain"] * 4 + ["sft"] * 4 and table["row"].to_pylist() == [0, 1] * 4
    assert table["step"].to_pylist()[:4] == [2, 2, 24, 24]
    assert table["kl"].to_pylist() == [0.5, 0.25, 0.5, 0.125, None, None, None, None]


def test_the_page_shows_intervals_and_what_each_arm_costs(tmp_path: Path, outcome: Outcome) -> None:
    run_dir = RunDirectory.open(str(tmp_path), "run")
    write_page(run_dir, experiment_config(), outcome)
    page = run_dir.read_text(PAGE)
    for text in ("+2.20 ± 0.25", "3/3", "failed: diverged", "at equal steps", "<svg"):
        assert text in page
    assert "| hot | 59.20 ± 1.10 |" in run_dir.read_text(TABLE)


def test_the_headline_names_the_best_arm_and_how_many_were_screened(outcome: Outcome) -> None:
    assert headline(outcome).startswith(
        "hot is ahead of plain on test: greedy ROUGE-L +2.20 ± 0.25 over 3 paired seeds"
    )
    assert "arms were screened" not in headline(outcome)
    assert "2 arms were screened" in headline(replace(outcome, screened=("plain", "hot", "fast")))


def test_a_config_of_a_run_is_the_same_run_with_an_experiment_or_without() -> None:
    from pocl_ray.config.neutral import neutral_free

    config = experiment_config()
    assert neutral_free(config) == neutral_free(Config.model_validate({**config.model_dump(), "experiment": None}))
