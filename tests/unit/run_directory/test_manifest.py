"""The manifest: what is finished is not done again, what changed is, and nothing half-done counts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pocl_ray.errors import StorageError
from pocl_ray.run_directory.manifest import Manifest, StepResult
from pocl_ray.run_directory.storage import RunDirectory


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDirectory:
    return RunDirectory.open(str(tmp_path), "run")


class Work:
    """A step that writes its outputs and counts how often it ran."""

    def __init__(self, run_dir: RunDirectory, *outputs: str) -> None:
        self.run_dir, self.outputs, self.fingerprints = run_dir, outputs, list[str]()

    def __call__(self, fingerprint: str) -> StepResult:
        self.fingerprints.append(fingerprint)
        for rel in self.outputs:
            self.run_dir.write_text(rel, "made")
        return StepResult(self.outputs, {"num_rows": 3})

    @property
    def num_runs(self) -> int:
        return len(self.fingerprints)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def pass_by(seconds: float) -> None:
        now[0] += seconds

    return pass_by


def entry(run_dir: RunDirectory, step: str = "rows") -> dict[str, Any]:
    return run_dir.read_json("manifest.json")["steps"][step]


def test_a_done_step_is_skipped_also_by_a_later_process(run_dir: RunDirectory) -> None:
    work = Work(run_dir, "rows/a")
    first, seconds = Manifest(run_dir).run("rows", {"a": 1}, work)
    again, nothing = Manifest(run_dir).run("rows", {"a": 1}, work)
    assert work.num_runs == 1
    assert first == again == work.fingerprints[0]
    assert seconds is not None and nothing is None


def test_a_changed_dependency_runs_the_step_again_under_another_fingerprint(run_dir: RunDirectory) -> None:
    work, manifest = Work(run_dir, "rows/a"), Manifest(run_dir)
    first, _ = manifest.run("rows", {"a": 1}, work)
    second, seconds = manifest.run("rows", {"a": 2}, work)
    assert first != second and seconds is not None and work.num_runs == 2


def test_a_step_and_all_that_follow_it_run_again_and_no_others(run_dir: RunDirectory) -> None:
    works = {name: Work(run_dir, name) for name in ("rows", "teacher", "scores", "report")}

    def flow(rows: int, teacher: int) -> dict[str, int]:
        manifest = Manifest(run_dir)
        rows_print, _ = manifest.run("rows", rows, works["rows"])
        teacher_print, _ = manifest.run("teacher", teacher, works["teacher"])
        scores_print, _ = manifest.run("scores", [rows_print, teacher_print], works["scores"])
        manifest.run("report", scores_print, works["report"])
        return {name: work.num_runs for name, work in works.items()}

    assert flow(1, 1) == {"rows": 1, "teacher": 1, "scores": 1, "report": 1}
    assert flow(1, 2) == {"rows": 1, "teacher": 2, "scores": 2, "report": 2}
    assert flow(2, 2) == {"rows": 2, "teacher": 2, "scores": 3, "report": 3}
    assert flow(2, 2) == {"rows": 2, "teacher": 2, "scores": 3, "report": 3}


def test_two_steps_on_the_same_ground_have_different_fingerprints(run_dir: RunDirectory) -> None:
    manifest, work = Manifest(run_dir), Work(run_dir)
    assert manifest.run("a", 1, work)[0] != manifest.run("b", 1, work)[0]


def test_of_several_grounds_the_first_that_is_done_counts(run_dir: RunDirectory) -> None:
    manifest = Manifest(run_dir)
    assert manifest.chosen("rows", [["less"], ["more"]]) == ["less"], "nothing is done yet"
    manifest.run("rows", ["more"], Work(run_dir))
    assert manifest.chosen("rows", [["less"], ["more"]]) == ["more"]
    assert manifest.chosen("rows", [["other"], ["less"]]) == ["other"]


def test_a_missing_output_is_made_again(run_dir: RunDirectory) -> None:
    work = Work(run_dir, "rows/a", "rows/b")
    Manifest(run_dir).run("rows", 1, work)
    run_dir.delete("rows/b")
    Manifest(run_dir).run("rows", 1, work)
    assert work.num_runs == 2 and run_dir.exists("rows/b")


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_a_failed_step_stays_started_and_its_time_adds_up(
    run_dir: RunDirectory, clock: Callable[[float], None], error: BaseException
) -> None:
    def fails(_: str) -> StepResult:
        assert entry(run_dir)["status"] == "started"
        clock(5)
        raise error

    def works(_: str) -> StepResult:
        clock(2)
        return StepResult([], {"num_rows": 1})

    for times in (1, 2):
        with pytest.raises(type(error)):
            Manifest(run_dir).run("rows", 1, fails)
        assert entry(run_dir)["status"] == "started"
        assert entry(run_dir)["seconds"] == 5 * times
    assert Manifest(run_dir).run("rows", 1, works)[1] == 12
    assert entry(run_dir)["status"] == "done"
    assert entry(run_dir)["counts"] == {"num_rows": 1}


def test_the_time_of_other_settings_is_not_added(run_dir: RunDirectory, clock: Callable[[float], None]) -> None:
    def takes(seconds: float) -> Callable[[str], StepResult]:
        def work(_: str) -> StepResult:
            clock(seconds)
            return StepResult([], {})

        return work

    Manifest(run_dir).run("rows", 1, takes(7))
    assert Manifest(run_dir).run("rows", 2, takes(3))[1] == 3


def test_a_killed_process_leaves_no_step_that_counts_as_done(run_dir: RunDirectory) -> None:
    work = Work(run_dir, "rows/a")
    Manifest(run_dir).run("rows", 1, work)

    def killed(_: str) -> StepResult:
        raise SystemExit

    with pytest.raises(SystemExit):
        Manifest(run_dir).run("rows", 2, killed)
    assert not Manifest(run_dir).is_done("rows", work.fingerprints[0]), "its files may be half replaced"


def test_what_a_step_wrote_stands_in_the_manifest(run_dir: RunDirectory) -> None:
    Manifest(run_dir).run("rows", 1, Work(run_dir, "rows/a", "rejects.jsonl"))
    content = run_dir.read_json("manifest.json")
    assert content["version"] == 1
    assert content["steps"]["rows"]["outputs"] == ["rows/a", "rejects.jsonl"]


@pytest.mark.parametrize("text", ['{"version": 1, "st', "[]", "{}", json.dumps({"version": 99, "steps": {}})])
def test_a_damaged_manifest_or_one_of_another_version_is_refused_in_one_line(run_dir: RunDirectory, text: str) -> None:
    run_dir.write_text("manifest.json", text)
    with pytest.raises(StorageError) as error:
        Manifest(run_dir)
    assert "manifest.json" in str(error.value) and "\n" not in str(error.value)
