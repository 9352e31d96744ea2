"""Runs next to each other: what differs, what is refused, and a page that nothing of the runs can break."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compared_run import figures, make_run

from pocl_ray import cli
from pocl_ray.comparison.compared_tasks import ComparedTasks
from pocl_ray.comparison.page import best_of, figures_table, write_comparison
from pocl_ray.comparison.paired import PairTable, pair_table
from pocl_ray.comparison.plots import curves_of_runs
from pocl_ray.comparison.runs import Cell, Row, compared_runs, config_differences, costs, figure_rows
from pocl_ray.errors import StorageError, UserError
from pocl_ray.report.curves import Curve
from pocl_ray.run_directory.opening import open_past_run

EVIL = "<script>alert(1)</script> {instruction}"


def test_runs_on_the_same_rows_are_compared_in_figures_configs_and_costs(tmp_path: Path) -> None:
    places = [
        make_run(tmp_path / "a", 20.0, name="plain"),
        make_run(tmp_path / "b", 30.0, data__prompt_template=EVIL, train__learning_rate=0.002, name="curriculum"),
    ]
    runs = compared_runs([open_past_run(place) for place in places])
    assert [run.label for run in runs] == ["plain", "curriculum"]
    differing = dict(config_differences(runs))
    assert set(differing) == {"data.prompt_template", "train.learning_rate"}
    assert differing["train.learning_rate"][1] == "0.002"
    rows = {(row.model, row.figure): row.cells for row in figure_rows(runs)}
    assert rows["student", "ROUGE-L, sampled"] == (Cell(20.0, 0.5), Cell(30.0, 0.5))
    (cost, _) = costs(runs)
    assert (cost.num_steps, cost.num_tokens, cost.tokens_per_s, cost.total_s) == (5, 1000, 100, 40)
    assert figures_table(runs, PairTable(), ComparedTasks()).row_count == 7
    assert pair_table(runs) == PairTable()
    write_comparison(runs, PairTable(), ComparedTasks(), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert "<b>30.00</b>" in page and page.count('<svg class="plot"') == 2


def test_the_rate_of_a_resumed_run_leaves_out_what_an_earlier_start_did(tmp_path: Path) -> None:
    runs = compared_runs([open_past_run(make_run(tmp_path / name, 20.0)) for name in "ab"])
    runs[0].run.steps["distill"]["counts"] |= {"earlier_steps": 3, "earlier_tokens": 600, "training_s": 8.0}
    (resumed, whole) = costs(runs)
    assert (resumed.num_tokens, resumed.distill_s, resumed.tokens_per_s) == (1000, 10, 50)
    assert whole.tokens_per_s == 100


def test_two_runs_of_one_name_are_told_apart_by_their_places(tmp_path: Path) -> None:
    places = [make_run(tmp_path / "a", 20.0), make_run(tmp_path / "<b>", 20.0)]
    runs = compared_runs([open_past_run(place) for place in places])
    assert [run.label for run in runs] == places and config_differences(runs) == []
    write_comparison(runs, PairTable(), ComparedTasks(), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Nothing that changes a result" in page and "&lt;b&gt;" in page
    with pytest.raises(StorageError, match=r"cannot be written \(it is a directory\); choose another --out"):
        write_comparison(runs, PairTable(), ComparedTasks(), tmp_path)
    assert Path(places[0]).is_dir()


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ({"references": ("a", "c")}, "other rows: their sets dev have 2 and 2 rows with other references"),
        ({"references": ("a", "b", "c")}, "other rows: their sets dev have 2 and 3 rows"),
        ({"evaluation": {"dev": {"student": {"perplexity": 3.0, "ce_loss": 1.1}}}}, "which is another metric"),
        ({"evaluation": {"other": {"student": figures(1)}}}, "no set is common to all runs"),
        ({"evaluation__generation": {"max_new_tokens": 7}}, "other settings: evaluation.generation.max_new_tokens"),
        ({"evaluation__seeds": [1]}, "evaluation.seeds is [10, 20, 30, 40, 50] in one and [1] in two"),
        ({"evaluation": {}}, "evaluation.json is gone or empty; have it made again with `pocl-ray run "),
        ({"without": ("evaluation", "report")}, "done are rows, scores, distill; missing: evaluation; go on with"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_reason(tmp_path: Path, second: dict[str, Any], says: str) -> None:
    places = [make_run(tmp_path / "a", 20.0, name="one"), make_run(tmp_path / "b", 20.0, name="two", **second)]
    with pytest.raises(UserError) as refused:
        compared_runs([open_past_run(place) for place in places])
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_runs_that_share_sets_only_two_by_two_are_refused(tmp_path: Path) -> None:
    sets = {"a": ["dev"], "b": ["dev", "other"], "c": ["other"]}
    places = [
        make_run(tmp_path / name, 20.0, name=name, evaluation={one: {"student": figures(20)} for one in own})
        for name, own in sets.items()
    ]
    with pytest.raises(UserError, match="no set is common to all runs: a has dev; b has dev, other; c has other"):
        compared_runs([open_past_run(place) for place in places])


def test_one_run_alone_or_twice_is_refused(tmp_path: Path) -> None:
    run = open_past_run(make_run(tmp_path / "a", 20.0))
    with pytest.raises(UserError, match="name two or more"):
        compared_runs([run])
    with pytest.raises(UserError, match="named twice"):
        compared_runs([run, run])


def test_a_figure_without_a_spread_is_never_called_ahead() -> None:
    assert best_of(Row("dev", "student", "ROUGE-L, sampled", (Cell(1, 0.1), Cell(2, 0.1)))) == 1
    assert best_of(Row("dev", "student", "ROUGE-L, sampled", (Cell(1, 0.6), Cell(2, 0.6)))) is None
    assert best_of(Row("dev", "student", "ROUGE-L, greedy", (Cell(1), Cell(2)))) is None
    assert best_of(Row("dev", "student", "CE (nats/token)", (Cell(1, 0.1), Cell(2, 0.1), None))) == 0
    assert math.isnan(Cell(1).std)


@pytest.mark.parametrize(("command", "says"), [("compare", "no run stands there"), ("chat", "no run stands there")])
def test_a_place_without_a_run_gives_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, says: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["pocl-ray", command, str(tmp_path / "none")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr().err
    assert ended.value.code == 2 and says in shown and shown.count("\n") == 1
    with pytest.raises(StorageError):
        open_past_run(str(tmp_path))


@pytest.mark.parametrize("length", [5, 25, 60, 300])
def test_no_name_in_a_legend_is_cut_off(length: int) -> None:
    names = ["x" * length + str(place) for place in range(7)]
    figure = curves_of_runs({name: Curve(np.arange(3.0), np.arange(3.0), 0) for name in names}, "dev CE")
    (legend,) = figure.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert all(name.endswith(text.lstrip("…")) for name, text in zip(names, shown, strict=True))
    assert legend.get_window_extent().width <= figure.bbox.width


def test_a_run_that_is_named_without_its_folder_or_misspelt_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "my-student").mkdir(parents=True)
    (tmp_path / "runs" / "my-student" / "manifest.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for place in ("my-student", "my-student.yaml", "runs/my-studnet", "runs/my-student/student"):
        with pytest.raises(StorageError, match=r"did you mean runs/my-student\?$"):
            open_past_run(place)
