"""`pocl-ray run --dry-run`: which steps would run and why, and that nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pocl_ray.advice import dry_run as dry
from pocl_ray.advice.cost import duration
from pocl_ray.config import Config
from pocl_ray.inputs import Inputs
from pocl_ray.records import STEPS
from pocl_ray.run_directory.claim import CONFIG, dump_config
from pocl_ray.run_directory.manifest import Manifest, StepResult, Steps
from pocl_ray.run_directory.storage import RunDirectory

TREE: dict[str, Any] = {
    "name": "run",
    "data": {
        "train": {"path": "samples://instructions", "max_rows": 300},
        "dev": {"path": "samples://instructions", "max_rows": 20},
        "prompt_template": "plain",
        "max_prompt_tokens": 96,
        "max_tokens": 128,
    },
    "teacher": {"path": "samples://quickstart-teacher"},
    "student": {"num_layers": 1},
    "train": {"global_batch_rows": 8, "precision": "fp32"},
    "scaling": {"use_gpu": False},
}


def config_of(**changes: Any) -> Config:
    return Config.model_validate({**TREE, **changes})


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dry, "measured_flops", lambda: 1e10)


def test_a_new_run_does_everything_and_the_dry_run_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dry.dry_run(config_of())
    shown = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert shown.count("not done yet") == 10 and "rests on" not in shown
    assert "optimizer steps of 8 rows" in shown
    for word in ("time    about", "memory  about", "disk    about", "nothing was written"):
        assert word in shown


def test_steps_that_a_config_lacks_are_left_out() -> None:
    assert {"responses", "control", "pairs", "tasks"}.isdisjoint(dry.steps_to_run(config_of()))
    assert "control" in dry.steps_to_run(config_of(control={}))
    assert "pairs" not in dry.steps_to_run(config_of(control={}))
    assert "pairs" in dry.steps_to_run(config_of(control={"seeds": [1, 2]}))


def test_every_step_of_a_run_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pocl_ray.preflight.check_tasks", lambda *_: [])  # it would look for the data set
    changes = {"data": {**TREE["data"], "responses": "teacher"}, "evaluation": {"tasks": ["arc_easy"]}}
    everything = config_of(control={"seeds": [1, 2]}, **changes)
    assert list(dry.steps_to_run(everything)) == [name for name in STEPS if name != "race"]
    race = dry.steps_to_run(config_of(curriculum={"pacing": "race"}))
    assert list(race).index("race") + 1 == list(race).index("distill") and race["race"] == "not done yet"


def prepared(config: Config) -> RunDirectory:
    """A run directory in which the rows are prepared."""
    run_dir = RunDirectory.open(config.storage_path, config.name)
    run_dir.write_text(CONFIG, dump_config(config))
    steps = Steps(run_dir, lambda: None)
    _ = Inputs(config, steps).prepared
    return run_dir


def test_what_is_done_stays_done_and_what_has_changed_names_the_keys() -> None:
    run_dir = prepared(config_of())
    before = {path: path.read_bytes() for path in Path(run_dir.uri).rglob("*") if path.is_file()}
    why = dry.steps_to_run(config_of())
    assert why["tokenizer"] == why["rows"] == dry.DONE
    assert why["plan"] == "not done yet" and why["teacher"] == "not done yet"
    assert why["distill"] == "not done yet" and why["evaluation"] == "not done yet"
    changed = dry.steps_to_run(config_of(data={**TREE["data"], "max_tokens": 120}))
    assert changed["tokenizer"] == dry.DONE
    assert changed["rows"] == "what it depends on has changed: data.max_tokens: 128 -> 120"
    (Path(run_dir.uri) / "rejects.jsonl").unlink()
    assert dry.steps_to_run(config_of())["rows"] == "what it wrote is gone: rejects.jsonl"
    left = {path: path.read_bytes() for path in Path(run_dir.uri).rglob("*") if path.is_file()}
    assert left == {path: content for path, content in before.items() if path.name != "rejects.jsonl"}


class _DoneAtOnce(Steps):
    """Steps after the rows do nothing and are done."""

    def run(self, name: str, depends: Any, work: Any, trains: bool = False) -> str:
        is_early = name in ("tokenizer", "rows")
        return self.manifest.run(name, depends, work if is_early else lambda _: StepResult([], {}))[0]


def test_a_change_of_the_curriculum_keeps_scores_and_ranking() -> None:
    config = config_of()
    run_dir = RunDirectory.open(config.storage_path, config.name)
    run_dir.write_text(CONFIG, dump_config(config))
    _ = dry._Unclaimed(config, _DoneAtOnce(run_dir, lambda: None)).report
    assert set(dry.steps_to_run(config).values()) == {dry.DONE}
    why = dry.steps_to_run(config_of(curriculum={"num_steps": 900}))
    runs = [name for name, reason in why.items() if reason != dry.DONE]
    assert runs == ["plan", "distill", "evaluation", "report"]
    assert "curriculum.num_steps: None -> 900" in why["distill"] and why["report"] == "rests on distill"


def test_a_step_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    manifest = Manifest(RunDirectory.open(str(tmp_path), "run"))

    def stop(_: str) -> StepResult:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        manifest.run("distill", ["a"], stop)
    own = manifest.steps["distill"]["fingerprint"]
    assert dry.why_it_runs(manifest, "distill", own, "") == "was begun and not finished: goes on where it can"
    assert dry.why_it_runs(manifest, "distill", "another", "").endswith("such as the rows or a model")


@pytest.mark.parametrize(("seconds", "text"), [(3, "10 s"), (84, "80 s"), (600, "10 min"), (7200, "2.0 h")])
def test_durations_have_no_more_digits_than_an_estimate(seconds: float, text: str) -> None:
    assert duration(seconds) == text
