"""Training on plain text: no dev prompt is answered, and the best checkpoint is the one with the lowest dev kd_loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from runs import STAGES, TRAIN, prepare, train_all
from safetensors.torch import load_file

from pocl_ray.data.row_store import ROWS_SCHEMA
from pocl_ray.records import PROMPT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def take_prompts_away(rows: Path) -> None:
    with pa.OSFile(str(rows)) as file:
        table = pa.ipc.open_file(file).read_all()
    empty = pa.array([""] * table.num_rows)
    place = table.schema.get_field_index(PROMPT)
    with pa.OSFile(str(rows), "wb") as file, pa.ipc.new_file(file, ROWS_SCHEMA) as writer:
        writer.write_table(table.set_column(place, ROWS_SCHEMA.field(PROMPT), empty))


def test_the_best_by_dev_kd_loss_is_handed_on(tmp_path: Path) -> None:
    stage = replace(STAGES[0], kd_ratio=0.0, num_epochs=4)  # the responses lead away from the teacher in the end
    settings = TRAIN.model_copy(update={"learning_rate": 0.05, "lr_schedule": "constant"})
    task = replace(prepare(tmp_path), stages=(stage,), train=settings, hand_off="best")
    take_prompts_away(task.run_dir.local("rows/dev.arrow"))
    (outcome,) = train_all([(task, tmp_path / "out", None)])
    evaluations = [record for record in outcome.metrics if "eval/dev/kd_loss" in record]
    assert len(evaluations) == 5 and not any("eval/dev/rouge_l" in record for record in evaluations)
    best = min(evaluations[1:], key=lambda record: record["eval/dev/kd_loss"])
    (checkpoint,) = (path for path in outcome.checkpoints if int(path.name) == best["step"])
    stored = {}
    for file in checkpoint.glob("state/*.safetensors"):
        stored.update(load_file(file))
    for name, weight in outcome.weights.items():
        assert torch.equal(stored[f"weight/{name}"], weight.float()), name
