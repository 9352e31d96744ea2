"""The whole flow: what a run leaves, and what is not done again.

That neither cache nor workers change a loss is shown without Ray, in tests/unit/distill/test_loop.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from tiny import NUM_ROWS, FullRun, cli_here, manifest, metrics, refused, tree_digest

from pocl_ray.pipeline import Pipeline

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = {
    *("tokenizer", "rows", "plan", "teacher", "student", "scores"),
    *("ranking", "distill", "control", "evaluation", "report"),
}


def changed_steps(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {name for name in after if after[name] != before.get(name)}


def test_a_run_leaves_everything_that_the_design_lists(full_run: FullRun) -> None:
    run = full_run.run
    files = (
        *("config.yaml", "environment.json", "manifest.json", "rejects.jsonl", "scores.parquet", "plan.json"),
        *("teacher_cache/train", "teacher_cache/dev", "checkpoints", "metrics.jsonl", "control/metrics.jsonl"),
        *("student/config.json", "student/model.safetensors", "student/tokenizer.json"),
        *("student/generation_config.json", "student/README.md", "evaluation.json", "report.html", "report.md"),
    )
    assert [name for name in files if not (run / name).exists()] == []
    assert list((run / "plots").glob("*.png"))
    steps = manifest(run)
    assert set(steps) == STEPS
    assert {step["status"] for step in steps.values()} == {"done"}
    assert all(len(step["fingerprint"]) == 64 and step["seconds"] >= 0 for step in steps.values())
    assert json.loads((run / "environment.json").read_text())["nodes"]
    assert not list(run.rglob("*.tmp"))
    assert len(list((run / "tensorboard" / "distill").iterdir())) == 2, "from the first worker, and with the report"
    assert list((run / "tensorboard" / "control").iterdir()) and list((run / "tracking").glob("control-*.json"))


def test_evaluation_has_the_four_models(full_run: FullRun) -> None:
    figures = json.loads((full_run.run / "evaluation.json").read_text())["sets"]["held_out"]
    assert set(figures) == {"student", "student_before", "student_kd", "teacher"}
    for model in figures.values():
        assert {"rouge_l", "exact_match", "greedy"} <= set(model)
        assert set(model["rouge_l"]["by_seed"]) == {"10"}


def test_scores_hold_each_row_once_in_order_with_its_rank(full_run: FullRun) -> None:
    table = pq.read_table(full_run.run / "scores.parquet")
    assert table["id"].to_pylist() == list(range(NUM_ROWS))
    assert sorted(table["rank"].to_pylist()) == list(range(1, NUM_ROWS + 1))
    assert {"rouge_l", "ce_loss", "rrf_score", "num_prompt_tokens", "num_response_tokens"} <= set(table.column_names)


def test_training_logs_every_step_of_the_plan(full_run: FullRun) -> None:
    plan = json.loads((full_run.run / "plan.json").read_text())
    records = [record for record in metrics(full_run.run / "metrics.jsonl") if "train/loss" in record]
    assert [record["step"] for record in records] == list(range(1, plan["num_steps"] + 1))
    by_stage = [sum(r["curriculum/stage"] == stage["index"] for r in records) for stage in plan["stages"]]
    assert by_stage == [stage["num_steps"] for stage in plan["stages"]]


def test_the_same_command_again_does_nothing(full_run: FullRun, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree_digest(full_run.run)
    code, shown = cli_here(capsys, "run", str(full_run.config))
    assert code == 0, shown
    assert tree_digest(full_run.run) == before
    assert all(f"{step} is done already" in shown for step in STEPS)


def test_another_config_needs_the_flag_to_go_on(full_run: FullRun, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree_digest(full_run.run)
    line = refused(full_run.config, capsys, "train.learning_rate=1e-3")
    assert "train.learning_rate: 0.005 -> 0.001" in line
    assert "--resume-with-changes" in line
    assert tree_digest(full_run.run) == before


def test_tasks_of_lm_eval_are_added_to_an_evaluation_and_a_changed_one_is_made_without_any_other_step(
    full_run: FullRun, cluster: None, tmp_path: Path
) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}, "test_split": "test"}
    asked = {"doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "answer"}
    content = {"task": "pick", "output_type": "multiple_choice", **data, **asked}
    (folder / "pick.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    rows = [{"question": "Copy apple =>", "choices": ["apple", "river"], "answer": number % 2} for number in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    changes = {"evaluation__tasks": [{"name": "pick", "path": str(folder)}], "scaling__evaluation_actors": 1}
    config, run = full_run.copy(tmp_path / "copied", **changes)
    before = manifest(run)
    assert Pipeline(config, resume_with_changes=True).report
    assert changed_steps(before, manifest(run)) == {"tasks", "report"}
    found = json.loads((run / "evaluation.json").read_text())
    assert set(found["tasks"]["pick"]["pick"]) == {"student", "student_before", "student_kd", "teacher"}
    assert {one["metrics"]["acc"]["value"] for one in found["tasks"]["pick"]["pick"].values()} == {0.5}
    assert 'id="tasks"' in (run / "report.html").read_text()
    written = {path: path.stat().st_mtime_ns for path in run.glob("tasks/*/pick-*.json")}
    assert len(written) == 4
    before = manifest(run)
    seeds = config.evaluation.model_copy(update={"seeds": (10, 20)})
    assert Pipeline(config.model_copy(update={"evaluation": seeds}), resume_with_changes=True).report
    assert changed_steps(before, manifest(run)) == {"evaluation", "tasks", "report"}
    again = json.loads((run / "evaluation.json").read_text())
    assert set(again["sets"]["held_out"]["student"]["rouge_l"]["by_seed"]) == {"10", "20"}
    assert again["tasks"] == found["tasks"], "the evaluation writes its file without them"
    assert written == {path: path.stat().st_mtime_ns for path in run.glob("tasks/*/pick-*.json")}


def test_another_number_of_buckets_needs_no_new_scores(full_run: FullRun, tmp_path: Path) -> None:
    config, run = full_run.copy(tmp_path, curriculum__num_buckets=3)
    before = manifest(run)
    pipeline = Pipeline(config, resume_with_changes=True)
    assert pipeline.ranking and len(pipeline.stages) == 3
    assert changed_steps(before, manifest(run)) == {"plan"}


def test_a_race_rests_on_the_scores_and_hands_one_arm_out(full_run: FullRun, cluster: None, tmp_path: Path) -> None:
    race = {"arms": {"hot": {"curriculum.kd_temperature": 2.0}}, "rungs": [0.5]}
    curriculum = {"pacing": "race", "num_steps": 6, "race": race}
    signals = ["rouge_l", "ce_loss"]  # those of the scoring that is there; a race alone would rank by the gap
    config, run = full_run.copy(tmp_path, curriculum=curriculum, difficulty__signals=signals, scaling__num_workers=1)
    before = manifest(run)
    assert Pipeline(config, resume_with_changes=True).distilled
    assert changed_steps(before, manifest(run)) == {"plan", "race", "distill"}
    decided = json.loads((run / "race.json").read_text())
    assert decided["winner"] in ("plain", "hot") and decided["num_steps"] == 6
    taken = [record for record in metrics(run / "metrics.jsonl") if "train/loss" in record]
    assert [record["step"] for record in taken] == list(range(1, 7))
    (paused,) = run.glob(f"race/{decided['winner']}-*/metrics.jsonl")
    before_pause = [record for record in metrics(paused) if "train/loss" in record]
    assert before_pause == taken[:3], "it went on from the rung: even the seconds of its first steps are the same"
    folders = {path.name.split("-")[0] for path in (run / "checkpoints").glob("race_*")}
    assert folders == {f"race_{decided['winner']}"}
