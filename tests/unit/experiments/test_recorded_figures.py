"""The figures of docs/experiments.md are those of the recorded trainings; distillation is worth its teacher there."""

from __future__ import annotations

import csv
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pocl_ray.trainings.statistics import FIGURES, paired_difference

DOCS = Path(__file__).resolve().parents[3] / "docs"
TEXT = (DOCS / "experiments.md").read_text(encoding="utf-8")
COLUMNS = {"rouge_l": 2, "sampled_rouge_l": 2, "sampled_exact_match": 2, "kl": 3}
"""Figures of the table's columns, and their decimal places."""
Recorded = dict[str, dict[int, dict[str, float]]]
"""Figures of trainings: arm, seed, figure."""


@dataclass(frozen=True)
class Experiment:
    """An experiment in docs/experiments.md: its file of figures, heading, least seeds, and arms by names in its table.

    `baselines` are the arms whose means the table shows; any other arm is compared with the one that its name begins
    with, or with `plain`.
    """

    file: str
    heading: str
    num_seeds: int
    arms: dict[str, str]
    baselines: dict[str, str] = field(default_factory=lambda: {"plain KD, temperature 1": "plain"})

    def baseline_of(self, arm: str) -> str:
        """The arm that another one is compared with."""
        return next(
            (base for base in self.baselines.values() if arm.startswith(f"{base}-") and base != "plain"), "plain"
        )

    @property
    def section(self) -> str:
        """The text under the heading."""
        return TEXT.split(f"## {self.heading}\n")[1].split("\n## ")[0]

    def table(self) -> dict[str, list[str]]:
        """The cells of the section's table by the name of the arm."""
        lines = [line.strip("| ").split(" | ") for line in self.section.splitlines() if line.startswith("| ")]
        return {name: [cell.replace("*", "") for cell in cells] for name, *cells in lines[1:]}

    def recorded(self) -> Recorded:
        """The figures of its trainings."""
        found: Recorded = {}
        with (DOCS / "figures" / self.file).open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                found.setdefault(row["arm"], {})[int(row["seed"])] = {name: float(row[name]) for name in COLUMNS}
        return found


QUICKSTART = Experiment(
    "experiment-quickstart.csv",
    "Curricula on the quickstart's rows, eight paired seeds",
    8,
    {
        "frontier and temperature 1 to 2 by step": "frontier-temperature",
        "frontier alone": "frontier",
        "temperature 1 to 2 by step alone": "temperature",
        "SFT on the references": "sft",
        "POCL as published": "pocl",
    },
)
STUDENTS = Experiment(
    "experiment-students.csv",
    "Curricula over six students, new test rows",
    6,
    {
        "frontier and temperature 1 to 2 by step": "frontier-temperature",
        "the same, decay_ratio 0.7": "frontier-temperature-decay",
        "the same, decay_ratio 0.7 and 16 stages": "stages-16-decay",
        "the same, decay_ratio 0.7, 16 stages, saturation 0.3": "bounded-stages-16-decay",
        "temperature 1 to 2 by step alone": "temperature",
        "the same, decay_ratio 0.7 alone": "temperature-decay",
        "plain KD, decay_ratio 0.7": "plain-decay",
        "SFT on the references": "sft",
        "POCL as published": "pocl",
    },
)
LOSSES = {
    "reverse_kl": "reverse",
    "skewed_reverse_kl": "skewed-reverse",
    "generalized_jsd, beta 0.5": "jsd",
    "tv_distance": "tvd",
    "symmetric_kl": "symmetric",
}
BY_LOSS = Experiment(
    "experiment-curricula-by-loss.csv",
    "Curricula with six losses, eight more students",
    7,
    {
        "frontier and temperature 1 to 2 by step": "frontier-temperature",
        "frontier alone": "frontier",
        "temperature 1 to 2 by step alone": "temperature",
        "POCL as published": "pocl",
        "plain KD with as many FLOPs as frontier": "plain-equal-flops",
        **{f"{loss}: frontier and temperature": f"{arm}-frontier-temperature" for loss, arm in LOSSES.items()},
        **{f"{loss}: frontier alone": f"{arm}-frontier" for loss, arm in LOSSES.items()},
    },
    {"plain KD, temperature 1": "plain", **{f"{loss}: plain KD": arm for loss, arm in LOSSES.items()}},
)
REGIMES = {
    "quarter of the steps": "quarter-steps",
    "512 rows": "few-rows",
    "25 % wrong responses": "corrupted-rows",
    "weak teacher": "weak-teacher",
}
IN_REGIMES = Experiment(
    "experiment-regimes.csv",
    "Few steps, few rows, wrong responses, a weak teacher",
    6,
    {
        f"{regime}: {name}": f"{arm}-{suffix}"
        for regime, arm in REGIMES.items()
        for name, suffix in {
            "frontier and temperature": "frontier-temperature",
            "bounded frontier and temperature": "bounded-temperature",
            "temperature alone": "temperature",
            "POCL": "pocl",
        }.items()
    },
    {f"{regime}: plain KD": arm for regime, arm in REGIMES.items()},
)
CONFOUNDS = Experiment(
    "experiment-confounds.csv",
    "One factor at a time",
    6,
    {
        "plain KD, cosine": "plain-cosine",
        "plain KD, learning rate 3e-3": "plain-rate-3e-3",
        "plain KD, 64 rows a step, half the steps": "plain-batch-64",
        "plain KD, kd_ratio 0.7": "plain-kd-0.7",
        "POCL, one cosine over all stages": "pocl-one-schedule",
        "POCL, one wsd over all stages": "pocl-wsd",
        "POCL, temperature 1": "pocl-temperature-1",
        "POCL, kd_ratio 1": "pocl-kd-1",
        "POCL, random order": "pocl-random",
    },
    {"plain KD": "plain", "POCL as published": "pocl"},
)
SMOLLM2 = Experiment(
    "experiment-smollm2.csv",
    "SmolLM2 into 10 layers, three paired seeds",
    3,
    {"frontier and temperature 1 to 2 by step": "frontier-temperature", "POCL as published": "pocl"},
)
TOKENS = Experiment(
    "experiment-tokens.csv",
    "Weights of tokens, averages of weights",
    6,
    {
        "student_entropy, strength 0.5": "entropy",
        "student_entropy, half of the tokens": "entropy-half",
        "divergence, strength 0.5": "divergence",
        "tip, strength 0.5": "tip",
        "tip, half of the tokens": "tip-half",
        "hellinger, 80 % of the tokens": "hellinger-most",
        "ema, decay 0.99": "ema",
        "last_k, 4 checkpoints": "last-4",
        "frontier and temperature, tip, strength 0.5": "frontier-tip",
        "frontier and temperature, hellinger, 80 % of the tokens": "frontier-hellinger",
        "frontier and temperature, ema, decay 0.99": "frontier-ema",
    },
    {"plain KD, temperature 1": "plain", "frontier and temperature": "frontier"},
)
_RAMP = "temperature 1 to 2"
TEMPERATURES = Experiment(
    "experiment-temperatures.csv",
    "Temperatures, shares of cross-entropy and learning rates",
    6,
    {
        "learning rate 6e-3": "rate-6e-3",
        "learning rate 1.4e-2": "rate-14e-3",
        "temperature 1.3": "temperature-1.3",
        _RAMP: "temperature",
        "temperature 2 to 1": "temperature-2-1",
        "temperature 2": "temperature-2",
        "kd_ratio 0.5": "kd-0.5",
        "kd_ratio 0.3": "kd-0.3",
        f"kd_ratio 0.5, {_RAMP}": "kd-0.5-temperature",
        f"kd_ratio 0.3, {_RAMP}": "kd-0.3-temperature",
        "frontier, temperature 1": "frontier",
        "frontier, temperature 1.3": "frontier-temperature-1.3",
        f"frontier, {_RAMP}": "frontier-temperature",
        "frontier, temperature 2 to 1": "frontier-temperature-2-1",
        "frontier, temperature 2": "frontier-temperature-2",
        f"frontier, {_RAMP}, kd_ratio 0.5": "frontier-temperature-kd-0.5",
        f"frontier, {_RAMP}, kd_ratio 0.3": "frontier-temperature-kd-0.3",
        f"frontier, power 1, {_RAMP}": "frontier-power-1-temperature",
        f"frontier, refresh rescore, {_RAMP}": "frontier-rescore-temperature",
    },
)
EXPERIMENTS = (QUICKSTART, STUDENTS, BY_LOSS, IN_REGIMES, CONFOUNDS, TOKENS, TEMPERATURES, SMOLLM2)
CASES = [(experiment, name) for experiment in EXPERIMENTS for name in experiment.arms]


def mean(recorded: Recorded, arm: str, figure: str) -> float:
    return statistics.fmean(figures[figure] for figures in recorded[arm].values())


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.file)
def test_the_table_shows_the_means_of_the_baselines_and_every_arm(experiment: Experiment) -> None:
    recorded = experiment.recorded()
    for name, arm in experiment.baselines.items():
        expected = [f"{mean(recorded, arm, figure):.{places}f}" for figure, places in COLUMNS.items()]
        assert experiment.table()[name] == expected
    assert set(experiment.table()) == {*experiment.baselines, *experiment.arms}


@pytest.mark.parametrize(("experiment", "name"), CASES)
def test_the_table_shows_paired_differences(experiment: Experiment, name: str) -> None:
    recorded = experiment.recorded()
    arm = experiment.arms[name]
    ours, plain = recorded[arm], recorded[experiment.baseline_of(arm)]
    assert len(ours) >= experiment.num_seeds and set(ours) == set(plain)
    for cell, (figure, places) in zip(experiment.table()[name], COLUMNS.items(), strict=True):
        values = [[of[seed][figure] for seed in ours] for of in (ours, plain)]
        found = paired_difference(values[0], values[1], FIGURES[figure])
        assert cell.startswith(f"{found.mean:+.{places}f} ± {found.half_width:.{places}f}"), figure
        wins = re.search(r"\((\d+)/(\d+)\)", cell)
        assert wins is None or wins.groups() == (str(found.num_wins), str(found.num_seeds))


def test_the_curriculum_is_ahead_of_plain_distillation_at_equal_flops() -> None:
    recorded = BY_LOSS.recorded()
    ours, plain = recorded["frontier-temperature"], recorded["plain-equal-flops"]
    said = []
    for figure in ("rouge_l", "sampled_rouge_l"):
        values = [[of[seed][figure] for seed in ours] for of in (ours, plain)]
        found = paired_difference(values[0], values[1], FIGURES[figure])
        assert found.verdict(FIGURES[figure]) == "ahead"
        said.append(f"{found.mean:+.2f} ± {found.half_width:.2f}")
    text = " ".join(BY_LOSS.section.split())
    assert f"{said[0]} greedy and {said[1]} sampled ROUGE-L, ahead on all eight seeds in both" in text


@pytest.mark.parametrize(
    ("arm", "baseline", "figure"),
    [
        *(("pocl-wsd", "plain", figure) for figure in ("rouge_l", "sampled_rouge_l")),
        *(("pocl", "plain", figure) for figure in ("rouge_l", "sampled_rouge_l")),
        *(("pocl", "plain-rate-3e-3", figure) for figure in ("rouge_l", "sampled_rouge_l")),
    ],
)
def test_what_is_said_of_one_factor_at_a_time_is_what_was_recorded(arm: str, baseline: str, figure: str) -> None:
    recorded = CONFOUNDS.recorded()
    values = [[of[seed][figure] for seed in recorded["plain"]] for of in (recorded[arm], recorded[baseline])]
    found = paired_difference(values[0], values[1], FIGURES[figure])
    assert f"{found.mean:+.2f} ± {found.half_width:.2f}" in CONFOUNDS.section


def test_what_is_said_of_the_curriculum_beside_weights_of_tokens_is_what_was_recorded() -> None:
    recorded = TOKENS.recorded()
    for figure in ("rouge_l", "sampled_rouge_l"):
        values = [[of[seed][figure] for seed in recorded["plain"]] for of in (recorded["frontier"], recorded["plain"])]
        found = paired_difference(values[0], values[1], FIGURES[figure])
        assert f"{found.mean:+.2f} ± {found.half_width:.2f}" in TOKENS.section


def test_the_teacher_is_ahead_of_distillation_that_of_fine_tuning_and_that_of_the_student_before() -> None:
    recorded = QUICKSTART.recorded()
    run = re.search(
        r"before [\d.]+/(?P<before>\d+\.\d+), .* teacher [\d.]+/(?P<teacher>\d+\.\d+)",
        " ".join(QUICKSTART.section.split()),
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


@pytest.mark.parametrize(
    ("arm", "baseline", "figure"),
    [
        (arm, baseline, figure)
        for arm, baseline in (
            ("frontier-temperature", "temperature-2"),
            ("frontier-temperature", "temperature-1.3"),
            ("frontier-rescore-temperature", "frontier-temperature"),
        )
        for figure in ("rouge_l", "sampled_rouge_l")
    ]
    + [("frontier-temperature", "temperature-2", "kl")],
)
def test_what_is_said_of_temperatures_is_what_was_recorded(arm: str, baseline: str, figure: str) -> None:
    recorded = TEMPERATURES.recorded()
    values = [[of[seed][figure] for seed in recorded["plain"]] for of in (recorded[arm], recorded[baseline])]
    found = paired_difference(values[0], values[1], FIGURES[figure])
    places = COLUMNS[figure]
    said = f"{found.mean:+.{places}f} ± {found.half_width:.{places}f}"
    assert said in TEMPERATURES.section
    if baseline == "temperature-2" and figure != "kl":
        assert said in (DOCS.parent / "README.md").read_text(encoding="utf-8")


def test_the_frontier_is_one_to_two_points_above_plain_distillation_at_the_same_temperature() -> None:
    recorded, ahead = TEMPERATURES.recorded(), []
    for arm, baseline in (
        ("frontier", "plain"),
        ("frontier-temperature-1.3", "temperature-1.3"),
        ("frontier-temperature-2", "temperature-2"),
        ("frontier-temperature", "temperature"),
    ):
        values = [[of[seed]["rouge_l"] for seed in recorded["plain"]] for of in (recorded[arm], recorded[baseline])]
        found = paired_difference(values[0], values[1], FIGURES["rouge_l"])
        assert 1 <= found.mean <= 2
        if found.verdict(FIGURES["rouge_l"]) == "ahead":
            ahead.append(baseline)
    assert ahead == ["temperature-1.3", "temperature-2"]
    assert "1 to 2 points above plain KD at the same temperature, at 1.3 and 2 by more" in TEMPERATURES.section


FRONTIER_ARM = "frontier-temperature"
TOGETHER = {
    "frontier and temperature": (
        [(STUDENTS, FRONTIER_ARM), (BY_LOSS, FRONTIER_ARM), (TOKENS, "frontier"), (TEMPERATURES, FRONTIER_ARM)],
        26,
    ),
    "the first fourteen": ([(STUDENTS, FRONTIER_ARM), (BY_LOSS, FRONTIER_ARM)], 14),
    "temperature": ([(STUDENTS, "temperature"), (BY_LOSS, "temperature"), (TEMPERATURES, "temperature")], 20),
    "pocl": ([(STUDENTS, "pocl"), (BY_LOSS, "pocl"), (CONFOUNDS, "pocl")], 20),
    "temperature 2": ([(TEMPERATURES, "temperature-2")], 6),
}
"""Arms of the first page: the experiments that trained them beside plain KD, each with a student for each seed."""


@pytest.mark.parametrize(("arms", "num_seeds"), TOGETHER.values(), ids=TOGETHER)
def test_the_first_figures_are_those_of_all_students_together(
    arms: list[tuple[Experiment, str]], num_seeds: int
) -> None:
    cells, means = [], []
    for figure in ("rouge_l", "sampled_rouge_l"):
        ours: list[float] = []
        plain: list[float] = []
        for experiment, arm in arms:
            recorded = experiment.recorded()
            ours += [recorded[arm][seed][figure] for seed in recorded[arm]]
            plain += [recorded["plain"][seed][figure] for seed in recorded[arm]]
        assert len(ours) == num_seeds
        found = paired_difference(ours, plain, FIGURES[figure])
        cell = f"{found.mean:+.2f} ± {found.half_width:.2f}"
        cells.append(f"**{cell}**" if abs(found.mean) > found.half_width else cell)
        means.append(f"{statistics.fmean(plain):.2f}")
    by_loss = " ".join(BY_LOSS.section.split())
    if num_seeds == 14:
        assert f"{cells[0]} greedy and {cells[1]} sampled" in by_loss
        return
    pages = {name: (DOCS.parent / name).read_text(encoding="utf-8") for name in ("README.md", "docs/concepts.md")}
    assert f"| {' | '.join(cells)} |" in pages["README.md"]
    if num_seeds > 6:
        assert f"| {' | '.join(cells)} |" in pages["docs/concepts.md"]
        together = " ".join(TEMPERATURES.section.split("All students together")[1].split())
        assert all(cell.strip("*") in together for cell in cells)
    if num_seeds == 26:
        assert " and ".join(cell.strip("*") for cell in cells) in by_loss
        assert f"| plain KD, temperature 1 | {' | '.join(means)} |" in pages["README.md"]
