"""Figures of lm-eval's tasks next to each other: what is shown, what is ahead, and what is left out with its reason."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
from compared_run import make_run
from rich.console import Console

from pocl_ray import cli
from pocl_ray.comparison.compared_tasks import ComparedTasks, compared_tasks, task_ahead
from pocl_ray.comparison.page import figures_table, write_comparison
from pocl_ray.comparison.paired import PairTable
from pocl_ray.comparison.runs import Cell, ComparedRun, compared_runs
from pocl_ray.run_directory.opening import open_past_run

SAME = {"num_rows": 400, "num_fewshot": 0, "group": None, "folder": "f00", "lm_eval": "0.4.13"}


def asked(student: float, stderr: float | None = 0.02, **other: Any) -> dict[str, Any]:
    """The figures of student and teacher on a task."""

    def figures(value: float) -> dict[str, Any]:
        measured = {"value": value, "stderr": stderr, "higher_is_better": True, "num_rows": 400}
        return {"metrics": {"acc": measured}, **SAME, **other}

    return {"student": figures(student), "teacher": figures(0.9)}


def a_run(folder: Path, name: str, tasks: dict[str, Any] | None, **changes: Any) -> str:
    entries = tasks and {entry: {entry: found} for entry, found in tasks.items()}
    return make_run(folder / name, 20.0, name=name, tasks=entries, **changes)


def runs_of(*places: str) -> list[ComparedRun]:
    return compared_runs([open_past_run(place) for place in places])


def test_figures_stand_next_to_each_other_with_their_errors(tmp_path: Path) -> None:
    found = {"one": {"pick": asked(0.5), "<b>": asked(0.5)}, "two": {"pick": asked(0.6), "<b>": asked(0.54)}}
    runs = runs_of(*(a_run(tmp_path, name, tasks) for name, tasks in found.items()))
    tasks = compared_tasks(runs)
    assert tasks.notes == ()
    assert [(line.row.task, line.cells, line.best) for line in tasks.students] == [
        ("pick", (Cell(0.5, 0.02), Cell(0.6, 0.02)), 1),
        ("<b>", (Cell(0.5, 0.02), Cell(0.54, 0.02)), None),  # 0.04 is less than 1.96 x 0.028
    ]
    assert [(line.model, line.cells[0]) for line in tasks.others] == [("teacher", Cell(0.9, 0.02))] * 2
    plain = figures_table(runs, PairTable(), ComparedTasks()).row_count
    assert figures_table(runs, PairTable(), tasks).row_count == plain + 2
    write_comparison(runs, PairTable(), tasks, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert '<b>0.6000</b> <span class="sd">± 0.0200</span>' in page and ">&lt;b&gt;<" in page
    assert page.count("<h2>Tasks</h2>") == 1 and page.count("acc ↑") == 4


@pytest.mark.parametrize(
    ("second", "says"),
    [
        (
            {"num_fewshot": 5},
            "two asks pick with 5 shots, and one with 0 shots: the figures of two on pick are left out.",
        ),
        ({"num_fewshot": 1}, "two asks pick with 1 shot, and one with 0 shots"),
        ({"num_rows": 50}, "two answers 50 rows of pick, and one 400 rows"),
        ({"folder": "abc"}, "two takes pick from a folder with other files than one"),
        ({"lm_eval": "0.5.0"}, "two takes pick in another lm-eval than one (0.5.0 and 0.4.13)"),
    ],
)
def test_what_is_asked_otherwise_is_left_out_with_the_reason(tmp_path: Path, second: dict[str, Any], says: str) -> None:
    places = [
        a_run(tmp_path, "one", {"pick": asked(0.5)}),
        a_run(tmp_path, "two", {"pick": asked(0.6, **second)}),
        a_run(tmp_path, "three", {"pick": asked(0.7)}),
    ]
    tasks = compared_tasks(runs_of(*places))
    (note,) = tasks.notes
    assert note.startswith(says)
    (line,) = tasks.students
    assert (line.cells, line.best) == ((Cell(0.5, 0.02), None, Cell(0.7, 0.02)), 2)


def test_runs_without_tasks_or_amid_them_are_named(tmp_path: Path) -> None:
    places = [
        a_run(tmp_path, "one", None),
        a_run(tmp_path, "two", {"pick": asked(0.5)}),
        a_run(tmp_path, "three", {"pick": asked(0.5)}, without=("tasks",)),  # those of an earlier list
        a_run(tmp_path, "four", {"other": asked(0.5)}),
    ]
    tasks = compared_tasks(runs_of(*places))
    assert tasks.notes == (
        "one was not evaluated on tasks of lm-eval (evaluation.tasks).",
        "three has not finished its tasks of lm-eval; go on with `pocl-ray run`.",
        "four does not have pick among its evaluation.tasks.",
        "two does not have other among its evaluation.tasks.",
    )
    assert [line.cells for line in tasks.students] == [
        (None, Cell(0.5, 0.02), None, None),
        (None, None, None, Cell(0.5, 0.02)),
    ]
    assert compared_tasks(runs_of(places[0], make_run(tmp_path / "five", 20.0))) == ComparedTasks()


def test_examples_of_other_seeds_and_runs_of_an_earlier_version_still_compare(tmp_path: Path) -> None:
    old = {name: {**found} for name, found in asked(0.6, num_fewshot=2).items()}
    for found in old.values():
        del found["folder"], found["lm_eval"]
    places = [
        a_run(tmp_path, "one", {"pick": asked(0.5, num_fewshot=2)}, seed=1),
        a_run(tmp_path, "two", {"pick": old}, seed=2),
    ]
    tasks = compared_tasks(runs_of(*places))
    assert tasks.students[0].best == 1
    assert tasks.notes == (
        "The examples before the questions of pick were drawn by seed 2 in two, and by 1 in one: part of a difference "
        "may be theirs.",
    )


def test_no_figure_is_ahead_without_an_error_or_a_direction() -> None:
    far = (Cell(0.5, 0.01), Cell(0.9, 0.01))
    assert task_ahead(far, "↑") == 1 and task_ahead(far, "↓") == 0 and task_ahead(far, "") is None
    assert task_ahead((Cell(0.5, 0.01), Cell(0.9, math.nan)), "↑") is None
    assert task_ahead((None, Cell(0.9, 0.01)), "↑") is None


def test_the_command_prints_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [a_run(tmp_path, "one", {"pick": asked(0.5)}), a_run(tmp_path, "two", {"pick": asked(0.6, num_rows=5)})]
    monkeypatch.setattr(cli, "console", Console(stderr=True, width=200))
    monkeypatch.setattr(sys, "argv", ["pocl-ray", "compare", *places, "--out", str(tmp_path / "page.html")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 0
    assert "0.5000 ± 0.0200" in shown and "two answers 5 rows of pick, and one 400 rows" in shown
