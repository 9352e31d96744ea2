"""Runs over seeds of training: spread, differences with intervals, and what of them does not compare."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from compared_run import make_run
from rich.console import Console

from pocl_ray import cli
from pocl_ray.comparison.compared_tasks import ComparedTasks
from pocl_ray.comparison.page import figures_table, write_comparison
from pocl_ray.comparison.paired import PairTable, pair_table
from pocl_ray.comparison.runs import ComparedRun, compared_runs
from pocl_ray.errors import StorageError
from pocl_ray.run_directory.opening import open_past_run
from pocl_ray.trainings.statistics import paired_difference

PLAIN = (60.0, 61.0, 59.0)


def paired_run(
    folder: Path,
    own: tuple[float, ...],
    seeds: tuple[int, ...] = (1, 2, 3),
    control: tuple[float, ...] = PLAIN,
    **made: Any,
) -> str:
    """A run with pairs; what of `made` names a step of the manifest is that step's fingerprint."""
    fingerprints = {step: made.pop(step) for step in ("tokenizer", "teacher", "student") if step in made}
    num_steps = made.pop("num_steps", 5)
    place = make_run(folder, 20.0, control__seeds=list(seeds), **made)
    values = {"student": list(own), "student_kd": list(control)}
    losses = {side: [value / 100 for value in own] for side, own in values.items()}
    content = {"seeds": list(seeds), "sets": {"dev": {"rouge_l": values, "kl": losses, "ce_loss": losses}}}
    (folder / "pairs.json").write_text(json.dumps(content))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["steps"]["pairs"] = manifest["steps"]["distill"]
    manifest["steps"]["distill"] = {**manifest["steps"]["distill"], "counts": {"num_steps": num_steps}}
    for step, fingerprint in fingerprints.items():
        manifest["steps"][step] = {**manifest["steps"]["rows"], "fingerprint": fingerprint}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return place


def runs_of(*places: str) -> list[ComparedRun]:
    return compared_runs([open_past_run(place) for place in places])


def test_pairs_are_shown_with_spread_interval_and_the_difference_of_two_runs(tmp_path: Path) -> None:
    first = paired_run(tmp_path / "a", (61.0, 62.5, 60.0), name="first")
    second = paired_run(tmp_path / "b", (66.0, 67.0, 65.5), name="second")
    runs = runs_of(first, second)
    table = pair_table(runs)
    assert table.notes == () and [row.figure for row in table.rows] == ["rouge_l", "kl", "ce_loss"]
    rouge, kl, _ = table.rows
    assert rouge.students[0] is not None and rouge.students[0].mean == pytest.approx(61.1667, abs=1e-4)
    assert rouge.students[0].std == pytest.approx(1.2583, abs=1e-4)
    assert [one.paired.mean if one else math.nan for one in rouge.over_control] == pytest.approx([7 / 6, 37 / 6])
    assert rouge.over_first[0] is None and rouge.over_first[1] is not None
    expected = paired_difference((66.0, 67.0, 65.5), (61.0, 62.5, 60.0), higher_is_better=True)
    assert rouge.over_first[1].paired == expected and rouge.over_first[1].verdict == "ahead"
    assert kl.over_first[1] is not None and kl.over_first[1].verdict == "behind" and kl.places == 3

    shown = figures_table(runs, table, ComparedTasks())
    assert shown.row_count == 7 + 4  # of ROUGE-L and KL, over plain distillation and over the first run
    write_comparison(runs, table, ComparedTasks(), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Over seeds of training" in page and "less first" in page
    low, high = f"+{expected.t_low:.2f}", f"+{expected.t_high:.2f}"
    assert re.search(rf"<b>\+5.00</b><br><span class=\"small\">{re.escape(low)} to {re.escape(high)}; 3/3", page)


@pytest.mark.parametrize(
    ("second", "says", "compared"),
    [
        ({"tokenizer": "t2"}, "two has another tokenizer than one: CE, nats/token does not compare", ["rouge_l"]),
        ({"teacher": "t2"}, "two has another teacher than one: KL, nats/token does not", ["rouge_l", "ce_loss"]),
        ({"student": "s2"}, "two starts from another student than one", ["rouge_l", "kl", "ce_loss"]),
        ({"num_steps": 7}, "two trains 7 optimizer steps, and one 5", ["rouge_l", "kl", "ce_loss"]),
        ({"control": (60.0, 60.0, 59.0)}, "of one and two are not the same", ["rouge_l", "kl", "ce_loss"]),
        ({"seeds": (3, 4, 5)}, "share fewer than two seeds (3, 4, 5 and 1, 2, 3)", []),
    ],
)
def test_what_of_the_pairs_does_not_compare_is_named_and_left_empty(
    tmp_path: Path, second: dict[str, Any], says: str, compared: list[str]
) -> None:
    alike = {"tokenizer": "t1", "teacher": "t1", "student": "s1"}
    one = paired_run(tmp_path / "a", (61.0, 62.0, 60.5), name="one", **alike)
    two = paired_run(tmp_path / "b", (62.0, 63.0, 61.0), name="two", **{**alike, **second})
    table = pair_table(runs_of(one, two))
    assert says in " ".join(table.notes)
    assert [row.figure for row in table.rows if row.over_first[1] is not None] == compared
    assert all(one is not None for row in table.rows for one in row.over_control)


def test_a_run_without_pairs_or_amid_them_has_empty_cells_and_is_named(tmp_path: Path) -> None:
    places = [
        paired_run(tmp_path / "a", (61.0, 62.0, 60.5), name="one"),
        make_run(tmp_path / "b", 20.0, name="two"),
        make_run(tmp_path / "c", 20.0, name="three", control__seeds=[1, 2]),
    ]
    # Left from an earlier config: the step that wrote it is not done for this one.
    (tmp_path / "c" / "pairs.json").write_text((tmp_path / "a" / "pairs.json").read_text())
    table = pair_table(runs_of(*places))
    assert table.notes == (
        "two was not trained on further seeds (control.seeds).",
        "three has not finished its pairs (control.seeds); go on with `pocl-ray run`.",
    )
    assert all(row.students[1:] == (None, None) and row.over_first == (None,) * 3 for row in table.rows)
    assert pair_table(runs_of(*places[1:])) == PairTable()


@pytest.mark.parametrize(
    "content", [{"seeds": [1]}, {"seeds": [1, 2], "sets": {"dev": {"rouge_l": {"student": [1.0]}}}}, {"seeds": 3}]
)
def test_pairs_that_are_damaged_are_one_line(tmp_path: Path, content: dict[str, Any]) -> None:
    places = [paired_run(tmp_path / name, (61.0, 62.0, 60.5), name=name) for name in ("a", "b")]
    (tmp_path / "b" / "pairs.json").write_text(json.dumps(content))
    with pytest.raises(StorageError, match=r"pairs\.json: cannot be read") as refused:
        pair_table(runs_of(*places))
    assert "\n" not in str(refused.value)


def test_the_command_prints_intervals_and_notes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = paired_run(tmp_path / "a", (61.0, 62.0, 60.5), name="one")
    two = make_run(tmp_path / "b", 20.0, name="two")
    monkeypatch.setattr(cli, "console", Console(stderr=True, width=200))  # wide, whatever the terminal: no cell wraps
    monkeypatch.setattr(sys, "argv", ["pocl-ray", "compare", one, two, "--out", str(tmp_path / "page.html")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr()
    assert ended.value.code == 0
    text = " ".join((shown.out + shown.err).split())
    assert "less plain distillation" in text and "two was not trained on further seeds" in text
