"""Perplexity of plain text: the sum of losses, the batches, and the figures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pocl_ray.config import DataConfig
from pocl_ray.data.row_store import RowStore
from pocl_ray.data.rows import prepare_rows
from pocl_ray.data.tokenization import train_tokenizer
from pocl_ray.evaluation import perplexity
from pocl_ray.evaluation.perplexity import ReadingActor, ReadingTask, summed_nll
from pocl_ray.models.building import build_model
from pocl_ray.models.loading import load_model, load_tokenizer
from pocl_ray.models.places import ModelRef
from pocl_ray.models.saving import save_model
from pocl_ray.run_directory.storage import RunDirectory

LLAMA = {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}


def test_the_sum_is_that_of_a_float64_formula_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(9, 4), torch.randn(50, 4), torch.randint(0, 50, (9,))
    logp = (hidden.double() @ weight.double().T).log_softmax(-1)
    expected = -logp[torch.arange(9), targets].sum().item()
    whole = summed_nll(hidden, lambda part: part @ weight.T, targets)
    monkeypatch.setattr(perplexity, "_CHUNK_MIB", 0)
    assert whole == pytest.approx(expected, rel=1e-6)
    assert summed_nll(hidden, lambda part: part @ weight.T, targets) == pytest.approx(expected, rel=1e-6)


@pytest.fixture
def task(tmp_path: Path) -> ReadingTask:
    """Five texts in rows of at most 12 tokens, and a tiny model."""
    run_dir = RunDirectory.open(str(tmp_path), "run")
    texts = [" ".join(["one two three"] * count) for count in range(1, 6)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(texts, 300, run_dir.local("tokenizer"))
    tokenizer = load_tokenizer(str(run_dir.local("tokenizer")))
    config = DataConfig.model_validate(
        {"train": {"path": str(path)}, "holdout_rows": 1, "task": "text", "max_tokens": 12}
    )
    prepare_rows("test", config.train, config, tokenizer, run_dir.local("rows/test.arrow"))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 40}
    model = build_model({**LLAMA, **sizes}, len(tokenizer), tokenizer.eos_token_id, None, 0)
    ref = ModelRef(str(save_model(model, tokenizer, run_dir.local("model"))))
    return ReadingTask(run_dir, {"student": ref}, {"test": "rows/test.arrow"}, use_gpu=False)


def test_a_model_reads_every_token_but_the_first_of_each_text(task: ReadingTask) -> None:
    rows = RowStore.open(task.run_dir.local("rows/test.arrow"))
    items = [
        pa.table({"model": ["student"], "set": ["test"], "ids": [ids.tolist()]})
        for ids in perplexity.reading_batches(rows)
    ]
    read = pa.concat_tables([part for item in items for part in ReadingActor(task)(item)])
    figures = perplexity._figures(read, "student", "test")
    model, total = load_model(task.models["student"]), 0.0
    for row in range(len(rows)):
        (prompt,), (response,) = rows.tokens([row])
        ids = torch.tensor(np.concatenate([prompt, response]), dtype=torch.long)[None]
        with torch.no_grad():
            logp = model(ids).logits[0, :-1].double().log_softmax(-1)
        total -= logp[torch.arange(len(response)), ids[0, 1:]].sum().item()
    num_tokens = int(rows.response_lengths.sum())
    assert (figures["num_rows"], figures["num_tokens"]) == (len(rows), num_tokens)
    assert figures["ce_loss"] == pytest.approx(total / num_tokens, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(total / num_tokens), rel=1e-5)


def test_batches_hold_each_row_once_within_their_room(task: ReadingTask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "_BATCH_TOKENS", 30)
    rows = RowStore.open(task.run_dir.local("rows/test.arrow"))
    lengths = rows.prompt_lengths + rows.response_lengths
    batches = perplexity.reading_batches(rows)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(rows)))
    assert all(len(ids) * lengths[ids].max() <= 30 for ids in batches)
