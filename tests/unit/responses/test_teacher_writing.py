"""The teacher's answers: every row once, whatever parts an actor does, and no part twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pocl_ray.answers.decode import GenerationSettings, generate
from pocl_ray.config import DataConfig, GenerationConfig, ScalingConfig, SourceConfig
from pocl_ray.data.row_store import RowStore
from pocl_ray.data.rows import prepare_rows
from pocl_ray.data.tokenization import train_tokenizer
from pocl_ray.models.building import build_model
from pocl_ray.models.loading import load_model, load_tokenizer
from pocl_ray.models.places import ModelRef
from pocl_ray.models.saving import save_model
from pocl_ray.responses import writing
from pocl_ray.responses.writing import TeacherWriter, WritingTask, each_row_once, plan_parts, write_answers
from pocl_ray.run_directory.storage import RunDirectory

NUM_ROWS = 20
LLAMA = {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
SIZES = {"hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 40}


@pytest.fixture
def task(tmp_path: Path) -> WritingTask:
    run_dir = RunDirectory.open(str(tmp_path), "run")
    lines = [json.dumps({"instruction": "go " * (1 + n % 7), "output": "one"}) for n in range(NUM_ROWS)]
    source = SourceConfig(path=str(tmp_path / "rows.jsonl"))
    Path(source.path).write_text("\n".join(lines), encoding="utf-8")
    train_tokenizer(lines, 300, run_dir.local("tokenizer"))
    tokenizer = load_tokenizer(str(run_dir.local("tokenizer")))
    config = DataConfig(train=source, holdout_rows=1, prompt_template="plain", max_prompt_tokens=20, max_tokens=32)
    prepare_rows("train", source, config, tokenizer, run_dir.local("rows/train.arrow"))
    model = build_model({**LLAMA, **SIZES}, len(tokenizer), tokenizer.eos_token_id, None, 0)
    return WritingTask(
        run_dir=run_dir,
        rows="rows/train.arrow",
        tokenizer="tokenizer",
        teacher=ModelRef(str(save_model(model, tokenizer, run_dir.local("teacher")))),
        generation=GenerationConfig(sampling_temperature=1.0, batch_rows=4, max_new_tokens=8),
        max_tokens=32,
        seed=3,
        parts="responses/parts/abc",
    )


def do_here(task: WritingTask, missing: dict[int, writing.Batches], scaling: ScalingConfig) -> None:
    """The job without Ray: one actor, the last part first."""
    writer = TeacherWriter(task)
    for number, batches in reversed(missing.items()):
        list(writer(writing._unit(number, batches)))


@pytest.mark.parametrize(("num_rows", "batch_rows"), [(1, 4), (7, 4), (400, 4), (5000, 64)])
def test_every_row_is_in_one_batch_of_one_part_and_the_longest_come_first(num_rows: int, batch_rows: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 90, num_rows)
    parts = plan_parts(lengths, batch_rows)
    batches = [batch for part in parts for batch in part]
    order = np.concatenate(batches)
    assert sorted(order.tolist()) == list(range(num_rows))
    assert (np.diff(lengths[order]) <= 0).all()
    assert max(map(len, batches)) <= batch_rows
    assert len(parts) >= min(len(batches), 12), "enough for several actors"


def test_each_answer_is_what_the_teacher_writes_to_its_prompt_alone(
    task: WritingTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_write", do_here)
    table = write_answers(task, ScalingConfig())
    assert table.schema.equals(writing.PART_SCHEMA)
    model, tokenizer = load_model(task.teacher), load_tokenizer(str(task.run_dir.local("tokenizer")))
    prompts, _ = RowStore.open(task.run_dir.local(task.rows)).tokens(np.arange(NUM_ROWS))
    for row, answer in enumerate(table["response_ids"].to_pylist()):
        settings = GenerationSettings.of(task.generation, 32, [prompts[row]])
        assert generate(model, tokenizer, [prompts[row]], settings, [3], [row]) == [[answer]]
        assert table["stopped"][row].as_py() == (len(answer) < 8)


def test_a_run_that_goes_on_does_the_missing_parts_and_ends_with_the_same_answers(
    task: WritingTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_write", do_here)
    whole = write_answers(replace(task, parts="responses/parts/whole"), ScalingConfig())
    lengths = RowStore.open(task.run_dir.local(task.rows)).prompt_lengths
    parts = dict(enumerate(plan_parts(lengths, 4)))
    do_here(task, {number: parts[number] for number in (0, 3)}, ScalingConfig())
    done: list[int] = []

    def rest(task: WritingTask, missing: dict[int, writing.Batches], scaling: ScalingConfig) -> None:
        done.extend(missing)
        do_here(task, missing, scaling)

    monkeypatch.setattr(writing, "_write", rest)
    assert write_answers(task, ScalingConfig()).equals(whole)
    assert done == [number for number in parts if number not in (0, 3)]
    assert write_answers(task, ScalingConfig()).equals(whole)
    assert len(done) == len(parts) - 2, "with all parts there, nothing is started"


@pytest.mark.parametrize("ids", [[0, 1], [0, 1, 2, 2], [0, 1, 3]])
def test_a_row_lost_or_answered_twice_is_never_passed_on(ids: list[int]) -> None:
    parts = pa.table([ids, [[5]] * len(ids), [True] * len(ids)], schema=writing.PART_SCHEMA)
    with pytest.raises(RuntimeError, match="answers to 3 prompts"):
        each_row_once([parts], 3)
