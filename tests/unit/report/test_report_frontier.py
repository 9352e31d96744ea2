"""The report on rows drawn by their gap, from lines of metrics.jsonl as training writes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_run import LocalFiles, make_run

from pocl_ray.config.training import FrontierConfig
from pocl_ray.curriculum.pacing import PACINGS
from pocl_ray.distill.gaps import FrontierRows, RowGaps
from pocl_ray.records import Stage
from pocl_ray.report import plots
from pocl_ray.report.build import build_report
from pocl_ray.report.files import read_run
from pocl_ray.report.frontier import FrontierGaps, frontier_gaps

NUM_ROWS, NUM_STAGES = 512, 4


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> LocalFiles:
    """A run whose stages drew their rows; gaps rise with the rank and fall from stage to stage."""
    made = make_run(tmp_path_factory.mktemp("frontier"), num_rows=NUM_ROWS)
    first = np.linspace(0.0, 2.0, NUM_ROWS)
    gaps = RowGaps(first, np.ones(NUM_ROWS, dtype=np.int64), torch.device("cpu"))
    buckets = np.arange(NUM_ROWS) * 4 // NUM_ROWS
    rows = FrontierRows(FrontierConfig(), gaps, buckets, 32, 7, lambda *_: None)
    lines = [json.loads(line) for line in made.read_bytes("metrics.jsonl").decode().splitlines()]
    for index in range(NUM_STAGES):
        gaps.values_R = first / (1 + index)
        stage = Stage(index, (0, 1, 2, 3), 0, NUM_ROWS, 1, 8, 1.0, 1.0, False, 0, 1, order="frontier")
        rows.begin(stage)
        lines.append({"step": 8 * index, "curriculum/stage": index, **rows.figures()})
    made.write_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return made


def found_in(files: LocalFiles) -> FrontierGaps:
    run = read_run(files)
    assert run.metrics is not None and run.plan is not None
    found = frontier_gaps(run.metrics.frontier, run.plan.bucket_ends)
    assert found is not None
    return found


def test_gaps_and_draws_by_bucket_are_those_of_the_rows(files: LocalFiles) -> None:
    found = found_in(files)
    assert (found.stages, found.steps) == ((0, 1, 2, 3), (0, 8, 16, 24))
    quarters = np.linspace(0.0, 2.0, NUM_ROWS).reshape(4, -1)
    np.testing.assert_allclose(found.gaps[0], quarters.mean(1))
    np.testing.assert_allclose(found.quantiles[0, 3], np.percentile(quarters[3], (5, 25, 50, 75, 95)))
    np.testing.assert_allclose(found.gaps[3], found.gaps[0] / 4)
    np.testing.assert_allclose(found.draws.sum(1), 1.0)
    assert (np.diff(found.draws[0]) > 0).all()
    assert found.rows.tolist() == [0.25] * 4
    assert sum(count for _, count in found.times) == NUM_ROWS
    assert [times for times, _ in found.times] == ["0", "1", "2", "3 to 4", "5 to 8", "9 to 16", "17 or more"]


def test_the_page_shows_them(files: LocalFiles) -> None:
    build_report(files)
    html, markdown = (files.read_bytes(f"report.{end}").decode() for end in ("html", "md"))
    assert html.count("<h2>Rows drawn by their gap</h2>") == 1
    assert "The mean gap was 1.000 nats a token before stage 0 and 0.250 before stage 3" in html
    assert "| 0 | 0 | 0.249 |" in markdown
    assert files.exists("plots/frontier_gaps.png") and files.exists("plots/frontier_draws.png")


def test_other_rules_have_no_such_section(tmp_path: Path) -> None:
    made = make_run(tmp_path, num_rows=NUM_ROWS)
    assert "frontier" in PACINGS
    run = read_run(made)
    assert run.metrics is not None and run.plan is not None
    assert frontier_gaps(run.metrics.frontier, run.plan.bucket_ends) is None


def test_labels_of_buckets_do_not_cover_one_another() -> None:
    placed = plots._apart(np.array([4.3, 4.2, 5.7, 5.2]), 0.8)
    assert np.diff(placed[[1, 0, 3, 2]]).min() > 0.79
    apart = np.array([1.0, 9.0, np.nan])
    assert np.array_equal(plots._apart(apart, 0.8), apart, equal_nan=True)
