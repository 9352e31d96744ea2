"""A race in the report: what was handed out and why, every comparison, and the stages of the arm that went on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_run import CONFIG, LocalFiles, make_run

from pocl_ray.report.build import build_report
from pocl_ray.report.files import read_run
from pocl_ray.trainings.heats import _to_json
from pocl_ray.trainings.race import PLAIN, decide, plan_rungs

PLAN = plan_rungs(3, 100, 1.6)


def race(gain: float) -> dict[str, Any]:
    """The content of race.json after two rungs, with an arm that is ahead by `gain` and one that diverges."""
    plain = np.linspace(0.2, 1.0, 50)
    arm = plain - gain * np.linspace(0.5, 1.5, 50)
    first = decide({PLAIN: plain, "frontier": arm, "broken": np.array([np.nan])}, PLAN.rungs[0], PLAN)
    last = decide({PLAIN: plain, "frontier": arm}, PLAN.rungs[1], PLAN)
    decisions = [_to_json(first), _to_json(last)]
    return {"figure": "kl", "plan": PLAN.to_json(), "decisions": decisions, "winner": last.left[0], "num_steps": 100}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalFiles:
    """A run with a race's config, whose figures are not rendered: the tests look at the text alone."""
    from pocl_ray.report import plots

    monkeypatch.setattr(plots, "render", lambda name, title, figure: plots.Plot(name, title, "<svg></svg>", b""))
    made = make_run(tmp_path, num_rows=512)
    config = CONFIG.replace("curriculum: {", "curriculum: {pacing: race, ")
    made.write_bytes("config.yaml", config.encode())
    return made


def pages(files: LocalFiles, content: dict[str, Any]) -> tuple[str, str]:
    stages = read_run(files).plan
    assert stages is not None
    own = [replace(stage, kd_temperature=1.7).to_json() for stage in stages.stages[:2]]
    files.write_bytes("race.json", json.dumps({**content, "stages": own}).encode())
    build_report(files)
    plan = read_run(files).plan
    assert plan is not None and [stage.kd_temperature for stage in plan.stages] == [1.7, 1.7]
    return files.read_bytes("report.html").decode(), files.read_bytes("report.md").decode()


def test_plain_distillation_is_handed_out_where_none_is_ahead(files: LocalFiles) -> None:
    for page in pages(files, race(0.0)):
        assert "plain distillation, as none was ahead by more than chance" in page
        assert "its dev losses are not finite" in page and "not ahead by more than chance" in page
        assert "1.60 times the optimizer steps of one run" in page
        assert "– to –" not in page  # plain distillation has no interval


def test_the_arm_that_won_is_named_with_its_interval(files: LocalFiles) -> None:
    html, text = pages(files, race(0.1))
    for page in (html, text):
        assert "handed out frontier, ahead of plain by more than chance (dev rows at step 40 of 100)" in page
    assert '<section id="race">' in html and 'href="#race"' in html
    assert "| 40 | frontier | 0.5000 |" in text


def test_a_race_of_an_earlier_config_is_not_shown(files: LocalFiles) -> None:
    pages(files, race(0.1))
    files.write_bytes("config.yaml", CONFIG.encode())
    build_report(files)
    assert "Race" not in files.read_bytes("report.md").decode()
