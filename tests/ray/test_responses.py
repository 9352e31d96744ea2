"""Teacher responses on a Ray cluster: the same answers whatever the number of actors, and a whole SeqKD run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tiny import NUM_ROWS, config_tree, manifest, metrics, tree_digest

from pocl_ray.config import Config, GenerationConfig, ScalingConfig
from pocl_ray.data.row_store import RowStore
from pocl_ray.errors import ModelError
from pocl_ray.models.places import ModelRef
from pocl_ray.pipeline import Pipeline
from pocl_ray.responses import writing
from pocl_ray.responses.writing import WritingTask, write_answers

pytestmark = pytest.mark.ray

CHANGES: dict[str, Any] = {
    "data__responses": "teacher",
    "data__max_reject_share": 0.9,  # a teacher that was never trained
    "teacher__generation": {"sampling_temperature": 1.0, "max_new_tokens": 6, "batch_rows": 8},
    "difficulty__rescore": "each_stage",
    "curriculum": {"pacing": "one_pass", "num_buckets": 2, "interval_epochs": 1, "kd_ratio": 0},
    "control": None,
}


def task_of(run: Any, parts: str, **changes: Any) -> WritingTask:
    generation = GenerationConfig(sampling_temperature=1.0, max_new_tokens=8, batch_rows=8)
    fields = {"teacher": run.teacher, "generation": generation, "max_tokens": 48, "seed": 3, **changes}
    return WritingTask(run.run_dir, run.train.path, run.tokenizer, parts=parts, **fields)


def here(task: WritingTask, missing: dict[int, writing.Batches], scaling: ScalingConfig) -> None:
    """The job without Ray, with one actor."""
    writer = writing.TeacherWriter(task)
    for number, batches in missing.items():
        list(writer(writing._unit(number, batches)))


def test_answers_of_two_actors_are_those_of_one_process(
    cluster: None, tiny_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = write_answers(task_of(tiny_run, "parts/two"), ScalingConfig(teacher_actors=2))
    monkeypatch.setattr(writing, "_write", here)
    one = write_answers(task_of(tiny_run, "parts/one"), ScalingConfig())
    assert one.equals(two)
    assert one["id"].to_pylist() == list(range(tiny_run.train.num_rows))


def test_a_teacher_that_cannot_be_loaded_is_told_as_one_line(cluster: None, tiny_run: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=str(tmp_path)):
        write_answers(task_of(tiny_run, "parts/none", teacher=ModelRef(str(tmp_path))), ScalingConfig())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_seqkd_trains_on_what_the_teacher_wrote_and_ranks_it_anew_and_makes_nothing_else_of_the_teacher(
    cluster: None, ready_made: dict[str, Any], tmp_path: Path
) -> None:
    config = Config.model_validate(config_tree(tmp_path, **{**ready_made, **CHANGES}))
    assert Pipeline(config).distilled
    run = tmp_path / "runs" / "tiny"
    steps = manifest(run)
    made = {"tokenizer", "rows", "plan", "teacher", "responses", "student", "scores", "ranking", "distill"}
    assert set(steps) == made

    rows, counts = RowStore.open(run / "responses" / "train.arrow"), steps["responses"]["counts"]
    assert counts["num_rows"] + counts["num_rejected"] == NUM_ROWS
    assert len(rows) == counts["num_rows"] == json.loads((run / "plan.json").read_text())["num_rows"]
    rejects = [json.loads(line) for line in (run / "rejects.jsonl").read_text().splitlines()]
    assert sum("the teacher's answer" in line["reason"] for line in rejects) == counts["num_rejected"]

    scores = pq.read_table(run / "scores.parquet")
    assert scores.num_rows == counts["num_rows"]
    assert "teacher_ce_loss" not in scores.column_names
    assert not (run / "teacher_cache").exists()
    assert not (run / "responses" / "parts").exists()
    assert not any("eval/dev/kd_loss" in record for record in metrics(run / "metrics.jsonl"))

    again = pq.read_table(run / "scores" / "stages" / "stage-1.parquet")
    assert again["previous_rank"].equals(scores["rank"])
    assert sorted(again["rank"].to_pylist()) == sorted(scores["rank"].to_pylist())

    whole = tree_digest(run)
    assert Pipeline(config).distilled
    assert {k: v for k, v in tree_digest(run).items() if "lease" not in k} == {
        k: v for k, v in whole.items() if "lease" not in k
    }
