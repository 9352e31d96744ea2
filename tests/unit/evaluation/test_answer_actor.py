"""The answers of one item of an evaluation, without Ray: all seeds of its rows, each as it is drawn alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from pocl_ray.answers.decode import GenerationSettings, generate
from pocl_ray.config import DataConfig, GenerationConfig, SourceConfig
from pocl_ray.data.row_store import RowStore
from pocl_ray.data.rows import prepare_rows
from pocl_ray.data.tokenization import train_tokenizer
from pocl_ray.evaluation.evaluate import GREEDY, AnswerActor, EvaluationTask, _plan_items
from pocl_ray.models.building import build_model
from pocl_ray.models.loading import load_model, load_tokenizer
from pocl_ray.models.places import ModelRef
from pocl_ray.models.saving import save_model
from pocl_ray.records import RowsSummary
from pocl_ray.run_directory.storage import RunDirectory

NUM_ROWS, MAX_TOKENS = 9, 32
SEEDS = (10, 20, GREEDY)
LLAMA = {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
SIZES = {"hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 40}


@pytest.fixture
def prepared(tmp_path: Path) -> tuple[EvaluationTask, RowsSummary]:
    run_dir = RunDirectory.open(str(tmp_path), "run")
    lines = [json.dumps({"instruction": "go " * (1 + n % 7), "output": "one"}) for n in range(NUM_ROWS)]
    source = SourceConfig(path=str(tmp_path / "rows.jsonl"))
    Path(source.path).write_text("\n".join(lines), encoding="utf-8")
    train_tokenizer(lines, 300, run_dir.local("tokenizer"))
    tokenizer = load_tokenizer(str(run_dir.local("tokenizer")))
    config = DataConfig(
        train=source, holdout_rows=1, prompt_template="plain", max_prompt_tokens=20, max_tokens=MAX_TOKENS
    )
    made, _ = prepare_rows("test", source, config, tokenizer, run_dir.local("rows/test.arrow"))
    model = build_model({**LLAMA, **SIZES}, len(tokenizer), tokenizer.eos_token_id, None, 0)
    task = EvaluationTask(
        run_dir=run_dir,
        models={"student": ModelRef(str(save_model(model, tokenizer, run_dir.local("student"))))},
        rows={"test": "rows/test.arrow"},
        tokenizer="tokenizer",
        seeds=SEEDS,
        generation=GenerationConfig(sampling_temperature=1.0, batch_rows=8, max_new_tokens=8),
        max_tokens=MAX_TOKENS,
        use_gpu=False,
    )
    return task, made


def test_an_item_answers_its_rows_by_all_seeds_and_each_is_drawn_by_seed_and_row(
    prepared: tuple[EvaluationTask, RowsSummary],
) -> None:
    task, _ = prepared
    rows = RowStore.open(task.run_dir.local("rows/test.arrow"))
    model, tokenizer = load_model(task.models["student"]), load_tokenizer(str(task.run_dir.local("tokenizer")))
    (table,) = AnswerActor(task)(pa.table({"model": ["student"], "set": ["test"], "ids": [[7, 2, 5]]}))
    assert table["seed"].to_pylist() == [seed for seed in SEEDS for _ in range(3)]
    assert table["id"].to_pylist() == [7, 2, 5] * len(SEEDS)
    for answer in table.to_pylist():
        (prompt,), _ = rows.tokens([answer["id"]])
        settings = GenerationSettings.of(task.generation, MAX_TOKENS, [prompt])
        seed = None if answer["seed"] == GREEDY else answer["seed"]
        ((alone,),) = generate(model, tokenizer, [prompt], settings, [seed], [answer["id"]])
        assert answer["text"] == tokenizer.decode(alone, skip_special_tokens=True)
        assert answer["num_tokens"] == len(alone)
        assert answer["stopped"] == (len(alone) < 8)


def test_the_answers_of_an_item_fit_a_batch(prepared: tuple[EvaluationTask, RowsSummary]) -> None:
    task, made = prepared
    made = replace(made, path="rows/test.arrow")
    items = _plan_items(task.models, {"test": made}, len(SEEDS), task.run_dir, task.generation.batch_rows)
    ids = [row for item in items for row in item["ids"].to_pylist()[0]]
    assert sorted(ids) == list(range(NUM_ROWS))
    assert max(len(item["ids"].to_pylist()[0]) for item in items) * len(SEEDS) <= task.generation.batch_rows
