"""The figures of docs/experiments.md are those of the recorded trainings; distillation is worth its teacher there."""

from __future__ import annotations

import csv
import re
import statistics
from pathlib import Path

import pytest

from pocl_ray.trainings.statistics import FIGURES, paired_difference

DOCS = Path(__file__).resolve().parents[3] / "docs"
TEXT = (DOCS / "experiments.md").read_text(encoding="utf-8")
SECTION = TEXT.split("## Curricula on the quickstart's rows, eight paired seeds")[1].split("\n## ")[0]
COLUMNS = {"rouge_l": 2, "sampled_rouge_l": 2, "sampled_exact_match": 2, "kl": 3}
"""Figures of the table's columns, and their decimal places."""
ARMS = {
    "frontier and temperature 1 to 2 by step": "frontier-temperature",
    "frontier alone": "frontier",
    "temperature 1 to 2 by step alone": "temperature",
    "SFT on the references": "sft",
    "POCL as published": "pocl",
}


@pytest.fixture(scope="module")
def recorded() -> dict[str, dict[int, dict[str, float]]]:
    """The trainings of the experiment's table: arm, seed, figure."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    with (DOCS / "figures/experiment-quickstart.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            figures = {name: float(row[name]) for name in COLUMNS}
            found.setdefault(row["arm"], {})[int(row["seed"])] = figures
    return found


def mean(recorded: dict[str, dict[int, dict[str, float]]], arm: str, figure: str) -> float:
    return statistics.fmean(figures[figure] for figures in recorded[arm].values())


def table() -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in SECTION.splitlines() if line.startswith("| ")]
    return {name: [cell.replace("*", "") for cell in cells] for name, *cells in lines[1:]}


def test_the_table_shows_the_means_of_the_baseline(recorded: dict[str, dict[int, dict[str, float]]]) -> None:
    expected = [f"{mean(recorded, 'plain', figure):.{places}f}" for figure, places in COLUMNS.items()]
    assert table()["plain KD, temperature 1"] == expected


@pytest.mark.parametrize("name", ARMS)
def test_the_table_shows_paired_differences(recorded: dict[str, dict[int, dict[str, float]]], name: str) -> None:
    ours, plain = recorded[ARMS[name]], recorded["plain"]
    assert len(ours) >= 8 and set(ours) == set(plain)
    for cell, (figure, places) in zip(table()[name], COLUMNS.items(), strict=True):
        values = [[of[seed][figure] for seed in ours] for of in (ours, plain)]
        found = paired_difference(values[0], values[1], FIGURES[figure])
        assert cell.startswith(f"{found.mean:+.{places}f} ± {found.half_width:.{places}f}"), figure
        wins = re.search(r"\((\d+)/(\d+)\)", cell)
        assert wins is None or wins.groups() == (str(found.num_wins), str(found.num_seeds))


def test_the_teacher_is_ahead_of_distillation_that_of_fine_tuning_and_that_of_the_student_before(
    recorded: dict[str, dict[int, dict[str, float]]],
) -> None:
    run = re.search(
        r"before [\d.]+/(?P<before>\d+\.\d+), .* teacher [\d.]+/(?P<teacher>\d+\.\d+)", " ".join(SECTION.split())
    )
    assert run is not None, "the section tells the quickstart's own figures, greedy/sampled"
    distilled, tuned = (mean(recorded, arm, "sampled_rouge_l") for arm in ("frontier-temperature", "sft"))
    assert float(run["teacher"]) > distilled > tuned > float(run["before"])
    against_sft = paired_difference(
        [figures["sampled_rouge_l"] for figures in recorded["frontier-temperature"].values()],
        [figures["sampled_rouge_l"] for figures in recorded["sft"].values()],
        FIGURES["sampled_rouge_l"],
    )
    assert against_sft.verdict(FIGURES["sampled_rouge_l"]) == "ahead"
