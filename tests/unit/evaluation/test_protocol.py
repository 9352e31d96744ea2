"""MiniLLM's evaluation protocol, by its preset: five sampled answers to each prompt, and a greedy one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from pocl_ray.config import Config, EvaluationConfig
from pocl_ray.config.sources import DataConfig, SourceConfig
from pocl_ray.data.rows import prepare_rows
from pocl_ray.data.tokenization import train_tokenizer
from pocl_ray.evaluation.evaluate import GREEDY, AnswerActor, EvaluationTask
from pocl_ray.models.building import build_model
from pocl_ray.models.loading import load_tokenizer
from pocl_ray.models.places import ModelRef
from pocl_ray.models.saving import save_model
from pocl_ray.run_directory.storage import RunDirectory

PRESET = Path(__file__).resolve().parents[3] / "configs" / "methods" / "minillm_evaluation.yaml"
WORDS = "one two three four five six seven".split()  # noqa: SIM905
SIZES = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
NUM_ROWS, MAX_TOKENS = 4, 40


def evaluation_of_the_preset() -> EvaluationConfig:
    layer = yaml.safe_load(PRESET.read_text(encoding="utf-8"))
    assert set(layer) == {"evaluation"}
    rows = {"train": {"path": "train"}, "dev": {"path": "dev"}}
    base = {"name": "run", "data": rows, "teacher": {"path": "teacher"}, "student": {"path": "student"}}
    return Config.model_validate({**base, **layer}).evaluation


@pytest.fixture(scope="module")
def actor(tmp_path_factory: pytest.TempPathFactory) -> AnswerActor:
    """The actor of an evaluation by the preset, with a model that knows nothing, in this process."""
    folder = tmp_path_factory.mktemp("protocol")
    run_dir = RunDirectory.open(str(folder), "run")
    train_tokenizer(WORDS, 300, run_dir.local("tokenizer"))
    tokenizer = load_tokenizer(str(run_dir.local("tokenizer")))
    source = folder / "rows.jsonl"
    lines = [json.dumps({"prompt": word, "response": word}) + "\n" for word in WORDS[:NUM_ROWS]]
    source.write_text("".join(lines), encoding="utf-8")
    lengths = {"max_prompt_tokens": 20, "max_tokens": MAX_TOKENS}
    data = DataConfig(train=SourceConfig(path="unused"), holdout_rows=1, prompt_template="plain", **lengths)
    rows = run_dir.local("rows/test.arrow")
    prepare_rows("test", SourceConfig(path=str(source)), data, tokenizer, rows)
    model = build_model(
        {**SIZES, "hidden_size": 16, "intermediate_size": 24}, len(tokenizer), tokenizer.eos_token_id, None, 0
    )
    student = ModelRef(str(save_model(model, tokenizer, run_dir.local("models/student"))))
    generation = evaluation_of_the_preset().generation
    rows_of = {"test": "rows/test.arrow"}
    task = EvaluationTask(run_dir, {"student": student}, rows_of, "tokenizer", (), generation, MAX_TOKENS, False)
    return AnswerActor(task)


def answers_of(actor: AnswerActor, seeds: Sequence[int]) -> pa.Table:
    actor.task = replace(actor.task, seeds=tuple(seeds))
    item = {"model": "student", "set": "test", "ids": list(range(NUM_ROWS))}
    return pa.concat_tables(list(actor(pa.Table.from_pylist([item]))))


def test_five_seeds_sample_from_all_tokens_and_a_greedy_answer_stands_beside_them(actor: AnswerActor) -> None:
    evaluation = evaluation_of_the_preset()
    assert evaluation.seeds == (10, 20, 30, 40, 50)
    answers = answers_of(actor, (*evaluation.seeds, GREEDY))
    assert answers.num_rows == 6 * NUM_ROWS
    by_seed = [answers["text"].to_pylist()[start : start + NUM_ROWS] for start in range(0, 6 * NUM_ROWS, NUM_ROWS)]
    assert len({tuple(texts) for texts in by_seed}) == 6, "no two seeds sample the same"
    assert answers_of(actor, (10,))["text"].to_pylist() == by_seed[0], "and one samples the same again"
