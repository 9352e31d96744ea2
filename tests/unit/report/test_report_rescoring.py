"""The report on rankings between stages, counted by hand."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_run import make_run

from pocl_ray.records import Stage
from pocl_ray.report.build import build_report
from pocl_ray.report.difficulty import reranked
from pocl_ray.report.files import Plan


def stage(index: int, first: int, end: int) -> Stage:
    return Stage(index, (index,), first, end, 1, 1, 1.0, 1.0, True, 0, 1, rescore=index > 0)


PLAN = Plan(6, (2, 4, 6), 1, (stage(0, 0, 2), stage(1, 2, 4), stage(2, 4, 6)))


def test_moves_between_buckets_and_rows_new_to_a_stage_are_counted() -> None:
    before = np.array([1, 2, 3, 4, 5, 6])
    now = np.array([2, 1, 3, 5, 4, 6])  # a change within bucket 0, and rows 3 and 4 change places between 1 and 2
    (found,) = reranked({1: {"rank": now, "previous_rank": before}}, PLAN)
    assert (found.stage, found.num_rows, found.num_moved) == (1, 6, 2)
    assert (found.num_replaced, found.num_stage_rows) == (1, 2)
    assert found.spearman == pytest.approx(1 - 6 * 4 / (6 * 35))


def test_the_same_ranking_changes_nothing_and_stages_come_in_order() -> None:
    same = {"rank": np.arange(1, 7), "previous_rank": np.arange(1, 7)}
    found = reranked({2: same, 1: same}, PLAN)
    assert [one.stage for one in found] == [1, 2]
    assert all((one.num_moved, one.num_replaced, one.spearman) == (0, 0, pytest.approx(1.0)) for one in found)


def test_the_page_shows_the_rankings_of_the_stages_that_asked_for_one(tmp_path: Path) -> None:
    files = make_run(tmp_path, num_rows=512)
    plan = json.loads(files.read_bytes("plan.json"))
    plan["stages"][1]["rescore"] = True
    files.write_json("plan.json", plan)
    build_report(files)
    assert "Ranked again" not in files.read_bytes("report.html").decode(), "no table of it is there yet"
    rank = np.arange(1, 513)
    for index in (1, 2):
        sink = io.BytesIO()
        pq.write_table(pa.table({"id": rank - 1, "previous_rank": rank, "rank": rank[::-1]}), sink)
        files.write_bytes(f"scores/stages/stage-{index}.parquet", sink.getvalue())
    build_report(files)
    html, markdown = (files.read_bytes(f"report.{end}").decode() for end in ("html", "md"))
    assert html.count("Ranked again between stages") == 1
    (line,) = [line for line in markdown.splitlines() if line.startswith("| 1 | 512 |")]
    assert "100" in line and line.endswith("1.00 |"), "the ranking turned round puts every row elsewhere"
    assert "| 2 | 512 |" not in markdown, "stage 2 did not ask for one"
