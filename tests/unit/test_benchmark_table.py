"""The table of `make benchmark`: its arithmetic, bars, exit status and JSON, and the pages that show its figures."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import measuring
import table as tables
from measuring import Agreement, Bar, Measurement, SideRun, bar_lines, conclude, ratio_of, summarize
from step_flops import StepCounter
from table import PROGRAMS, Program, Table, measure, text_of

ROOT = Path(__file__).resolve().parents[2]
RUNS = [
    SideRun([1.0, 3.0], 200, 2 << 30, [2.0], flops_needed=8.0, padding=0.25),
    SideRun([2.0, 2.0], 200, 1 << 30, [2.0]),
]
ROW = Measurement(
    "work", "TRL", "setting", (Bar("times as fast", 3.0, 2.0),), agreements=(Agreement("losses", 0.0, 1e-3),)
)
OPTIONS = argparse.Namespace(small=False, teacher=None, rows=None)


def pages() -> Any:
    """Return the script that writes the tables of the documentation."""
    spec = importlib.util.spec_from_file_location("make_benchmark_table", ROOT / "docs" / "make_benchmark_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_ratio_is_that_of_the_rounds_with_the_least_and_the_most() -> None:
    other = [SideRun([2.0, 6.0], 200, 1), SideRun([8.0, 8.0], 200, 1)]

    ratio = ratio_of(RUNS, other)

    assert (ratio.median, ratio.least, ratio.most) == (3.0, 2.0, 4.0)


def test_a_side_has_the_tokens_of_all_rounds_and_the_highest_peak() -> None:
    side = summarize("ours", RUNS)

    assert side.seconds is not None and side.seconds.median == 2.0
    assert (side.tokens_per_s, side.peak_gib, side.padding, side.matmul_share) == (50.0, 2.0, 0.25, None)


def test_the_share_of_the_matmul_peak_is_needed_flops_a_second_over_it() -> None:
    # 8 FLOPs that the work needs in 4 seconds are 2 a second, half of a peak of 4: what is called MFU.
    assert summarize("ours", RUNS[:1], peak_rate=4.0).matmul_share == 0.5
    assert summarize("ours", RUNS, peak_rate=4.0).matmul_share is None  # a round without a count


@pytest.mark.parametrize(
    ("measured", "at_least", "is_met"),
    [(2.0, True, True), (1.9, True, False), (2.0, False, True), (2.1, False, False), (float("nan"), True, False)],
)
def test_a_bar_is_met_at_its_limit(measured: float, at_least: bool, is_met: bool) -> None:
    assert Bar("s", measured, 2.0, at_least).is_met is is_met


def test_losses_that_are_not_finite_never_agree() -> None:
    broken = [SideRun([1.0], 1, 1, [2.0]), SideRun([1.0], 1, 1, [float("nan")])]

    apart = measuring.first_losses_apart(broken, [RUNS[0], RUNS[1]])

    assert not Agreement("losses", apart, 1e-3).holds
    assert measuring.first_losses_apart(RUNS, RUNS) == 0.0


def test_every_bar_is_printed_with_the_measured_figure() -> None:
    low = replace(ROW, bars=(Bar("times as fast", 1.5, 2.0),), agreements=(Agreement("losses", 0.1, 1e-3),))

    assert bar_lines(low) == [
        "MISSED  work: times as fast 1.5, bar at least 2",
        "DIFFER  work: losses differ by 1.0e-01, allowed 0.001",
    ]
    assert not low.is_met and ROW.is_met


def test_measurements_come_back_from_their_file(tmp_path: Path) -> None:
    row = replace(ROW, sides=(summarize("ours", RUNS),), ratio=measuring.Spread(3.0, 2.0, 4.0))

    assert conclude([row], tmp_path / "one.json") == 0

    read = json.loads((tmp_path / "one.json").read_text())["measurements"]
    assert [Measurement.from_json(one) for one in read] == [row]


def test_the_exit_status_is_1_below_a_bar_and_where_a_program_failed_but_not_for_what_is_not_measured() -> None:
    below = replace(ROW, bars=(Bar("times as fast", 1.5, 2.0),))

    assert Table([ROW], skipped={"a run": "no GPU"}).exit_status == 0
    assert Table([ROW, below]).exit_status == 1
    assert Table([ROW], {"answers": 1}).exit_status == 1
    assert conclude([below], None) == 1


def test_the_table_tells_rows_failures_and_what_was_not_measured() -> None:
    row = replace(ROW, sides=(summarize("ours", RUNS), summarize("trl", RUNS)), ratio=measuring.Spread(3.0, 2.0, 4.0))

    text = text_of(Table([row], {"answers": 2}, {"a run": "no GPU"}))

    assert "3.00" in text and "2.00 to 4.00" in text and "50 / 50" in text and "25% / 25%" in text
    assert "FAILED  answers: exit status 2" in text and "a run: not measured, no GPU" in text


def test_programs_write_json_that_the_table_reads_and_one_without_a_file_has_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content = json.dumps({"measurements": [asdict(ROW)]})
    (tmp_path / "good.py").write_text(
        "import sys, pathlib\nfile = pathlib.Path(sys.argv[sys.argv.index('--json') + 1])\n"
        f"file.write_text({content!r})\nsys.exit(1)"
    )
    (tmp_path / "bad.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(tables, "HERE", tmp_path)

    found = measure([Program("good", "good.py"), Program("bad", "bad.py")], OPTIONS, has_gpu=False)

    assert found.measurements == [ROW] and found.failed == {"bad": 3}
    whole = json.loads(found.to_json({"date": "2026-11-29"}))
    assert whole["measurements"][0]["is_met"] and whole["failed"] == {"bad": 3} and whole["not_measured"]


def test_without_a_gpu_its_rows_are_skipped_with_a_line() -> None:
    found = measure([one for one in PROGRAMS if one.needs == "cuda"], OPTIONS, has_gpu=False)

    assert found.skipped["step of the shape of gpt2"] == "needs a CUDA device"
    assert not found.measurements and not found.failed


def test_every_program_of_the_table_is_there() -> None:
    assert all((ROOT / "benchmarks" / one.script).exists() for one in PROGRAMS)


def test_flops_are_counted_through_products_that_add_up_in_place_and_through_attention() -> None:
    counter, query = StepCounter(), torch.randn(1, 2, 8, 16)

    counter.begin()
    torch.zeros(4, 6).addmm_(torch.randn(4, 5), torch.randn(5, 6))
    torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    counter.end()

    assert counter.flops == 2 * 4 * 5 * 6 + 2 * 2 * 8 * 8 * (16 + 16)


def test_million_rows_writes_its_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import million_rows

    file = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["million_rows.py", "--rows", "2000", "--rounds", "1", "--json", str(file)])

    assert million_rows.main() == 0
    assert len(json.loads(file.read_text())["measurements"]) == len(million_rows.BARS_S)


def test_a_page_takes_the_table_between_its_marks() -> None:
    script = pages()
    page = f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n"

    assert script.rewritten(page, "new") == f"before\n{script.BEGIN}\nnew\n{script.END}\nafter\n"
    with pytest.raises(ValueError, match="lacks"):
        script.rewritten("before", "new")


def test_the_pages_show_the_recorded_figures() -> None:
    script = pages()
    if not script.FIGURES.exists():
        pytest.skip("no figures are recorded yet: docs/figures/benchmark.json")
    found = json.loads(script.FIGURES.read_text())

    assert not found["small"] and found["date"] and found["versions"]["torch"]
    for page, table in script.PAGES.items():
        assert script.rewritten(page.read_text(), table(found)) == page.read_text(), (
            f"{page.name} differs from docs/figures/benchmark.json; run python docs/make_benchmark_table.py"
        )
