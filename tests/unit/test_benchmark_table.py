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


GOOD = """import json, pathlib, sys
rows = json.loads((pathlib.Path(__file__).parent / "rows.json").read_text())[pathlib.Path(__file__).stem]
pathlib.Path(sys.argv[sys.argv.index("--json") + 1]).write_text(json.dumps({"measurements": rows}))
"""


class Bench:
    """A table of two programs, each of which writes one row."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch, self.file = folder, monkeypatch, folder / "table.json"
        monkeypatch.setattr(tables, "HERE", folder)
        monkeypatch.setattr(tables, "PROGRAMS", (Program("first", "first.py"), Program("second", "second.py")))
        for name in ("first", "second"):
            (folder / f"{name}.py").write_text(GOOD)
        self.set(first=2.0, second=3.0)

    def set(self, **figures: float) -> None:
        """Set what each program will measure."""
        rows = {
            name: [asdict(replace(ROW, work=f"work of {name}", bars=(Bar("times as fast", figure, 1.0),)))]
            for name, figure in figures.items()
        }
        (self.folder / "rows.json").write_text(json.dumps(rows))

    def run(self, *arguments: str) -> int:
        """Run the table."""
        self.monkeypatch.setattr(sys, "argv", ["table.py", "--json", str(self.file), *arguments])
        return tables.main()

    def read(self) -> dict[str, Any]:
        """Return what its file holds."""
        return json.loads(self.file.read_text())

    def figures(self) -> dict[str, float]:
        """Return the figure of each work in the file."""
        return {row["work"]: row["bars"][0]["measured"] for row in self.read()["measurements"]}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_a_table_is_completed_by_programs_of_their_own(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.run("--only", "first") == 0
    assert bench.figures() == {"work of first": 2.0}
    assert bench.read()["not_measured"] == {"program second": "not run yet; --only second adds it"}

    bench.set(first=4.0, second=3.0)
    assert bench.run("--only", "second") == 0
    assert bench.figures() == {"work of first": 2.0, "work of second": 3.0} and not bench.read()["not_measured"]
    assert "1 rows are there; those of second are replaced or added" in capsys.readouterr().out

    assert bench.run("--only", "first") == 0
    assert bench.figures() == {"work of second": 3.0, "work of first": 4.0}
    assert sorted(bench.read()["program_seconds"]) == ["first", "second"]


def test_without_only_a_table_is_made_from_its_beginning(bench: Bench) -> None:
    assert bench.run() == 0
    bench.set(first=5.0, second=6.0)

    assert bench.run() == 0

    assert bench.figures() == {"work of first": 5.0, "work of second": 6.0}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"device": "abacus"}, "device abacus and not "),
        ({"versions": {"torch": "0.1"}}, "versions {'torch': '0.1'} and not "),
        ({"inputs": {"teacher": "other", "rows": None}}, "inputs "),
        ({"small": True}, "small True and not False"),
    ],
)
def test_a_file_of_other_conditions_is_not_completed(
    bench: Bench, capsys: pytest.CaptureFixture[str], change: dict[str, Any], said: str
) -> None:
    bench.run("--only", "first")
    bench.file.write_text(json.dumps(bench.read() | change))
    before = bench.file.read_text()

    assert bench.run("--only", "second") == 2

    error = capsys.readouterr().err
    assert said in error and "name another file with --json, or leave out --only" in error and str(bench.file) in error
    assert len(error.splitlines()) == 1 and bench.file.read_text() == before


def test_a_file_that_is_no_table_is_not_completed(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    for content in ("[]", "{", "{}"):
        bench.file.write_text(content)
        assert bench.run("--only", "first") == 2
        assert "no file that this program wrote" in capsys.readouterr().err and bench.file.read_text() == content


def test_an_interrupted_table_holds_the_programs_before(bench: Bench) -> None:
    run = tables.subprocess.run

    def interrupted(command: list[str], **options: Any) -> Any:
        if command[1].endswith("second.py"):
            raise KeyboardInterrupt
        return run(command, **options)

    bench.monkeypatch.setattr(tables.subprocess, "run", interrupted)

    with pytest.raises(KeyboardInterrupt):
        bench.run()

    assert bench.figures() == {"work of first": 2.0} and "program second" in bench.read()["not_measured"]


def test_rows_of_a_file_without_programs_are_replaced_by_their_work(bench: Bench) -> None:
    bench.run()
    old = bench.read()
    old["measurements"] = [
        {k: v for k, v in row.items() if k not in ("program", "date")} for row in old["measurements"]
    ]
    old = {name: value for name, value in old.items() if name not in ("inputs", "program_seconds")}
    bench.file.write_text(json.dumps(old | {"not_measured": {"a work of former times": "nobody knows why"}}))
    bench.set(first=7.0, second=8.0)

    bench.run("--only", "second")

    assert bench.figures() == {"work of first": 2.0, "work of second": 8.0}
    assert bench.read()["not_measured"] == {}  # and not what was unknown then, nor programs that may have run


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
