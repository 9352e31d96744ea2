"""A teacher with its own tokenizer through the whole flow: its answers, scores, cache, distillation, evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny import LLAMA, config_tree, manifest, metrics

from pocl_ray.config import Config
from pocl_ray.data.row_store import RowStore
from pocl_ray.models.loading import load_tokenizer
from pocl_ray.pipeline import Pipeline

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]


def changes(ready_made: dict[str, Any]) -> dict[str, Any]:
    return {
        # The ready-made teacher brings its 300 tokens; the student's are trained on the rows, 380 of them.
        "teacher": {
            **ready_made["teacher"],
            "cross_tokenizer": "uld",
            "generation": {"sampling_temperature": 1.0, "max_new_tokens": 6},
        },
        "tokenizer": {"train_vocab_size": 380},
        "student": {"architecture": {**LLAMA, "hidden_size": 16, "intermediate_size": 24, "tie_word_embeddings": True}},
        "data__responses": "teacher",
        "data__max_reject_share": 0.9,  # a teacher that was never trained
        "difficulty__signals": ["rouge_l", "ce_loss", "teacher_ce_loss"],
        "curriculum": {"num_buckets": 2, "interval_epochs": 1, "kd_ratio": 0.6, "pacing": "one_pass"},
        "control": None,
    }


@pytest.fixture(scope="module")
def run(cluster: None, ready_made: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bridged")
    pipeline = Pipeline(Config.model_validate(config_tree(folder, **changes(ready_made))))
    assert pipeline.report
    pipeline.close()
    return folder / "runs" / "tiny"


def test_each_model_has_the_same_rows_in_its_own_tokens(run: Path) -> None:
    tokenizers = [load_tokenizer(str(run / name)) for name in ("tokenizer", "teacher_tokenizer")]
    assert len(tokenizers[0]) != len(tokenizers[1])
    for ours, theirs in (
        ("responses/train.arrow", "responses/for_teacher/train.arrow"),
        ("rows/held_out.arrow", "rows/for_teacher/held_out.arrow"),
    ):
        stores = [RowStore.open(run / ours), RowStore.open(run / theirs)]
        ids = np.arange(len(stores[0]))
        assert stores[0].references(ids) == stores[1].references(ids)
        for store, tokenizer in zip(stores, tokenizers, strict=True):
            texts = tokenizer.batch_decode(store.tokens(ids)[0], skip_special_tokens=True)
            assert texts == stores[0].prompts(ids)


def test_scores_and_cache_are_of_each_models_own_tokens(run: Path) -> None:
    scores = pq.read_table(run / "scores.parquet")
    assert "teacher_student_kl" not in scores.column_names and np.isfinite(scores["teacher_ce_loss"].to_numpy()).all()
    ours, theirs = (RowStore.open(run / f"responses/{name}train.arrow") for name in ("", "for_teacher/"))
    assert scores["num_response_tokens"].to_pylist() == ours.response_lengths.tolist()
    meta = json.loads((run / "teacher_cache" / "train" / "meta.json").read_text())
    assert theirs.response_lengths.sum() != ours.response_lengths.sum()
    assert sum(shard["num_tokens"] for shard in meta["shards"]) == theirs.response_lengths.sum()


def test_the_student_learns_by_sorted_probabilities_and_both_models_answer(run: Path) -> None:
    steps = [record for record in metrics(run / "metrics.jsonl") if "train/loss" in record]
    assert steps and all(0 < record["train/kd_loss"] < 2 and record["curriculum/kd_ratio"] == 0.6 for record in steps)
    figures = json.loads((run / "evaluation.json").read_text())["sets"]["held_out"]
    assert set(figures) == {"student", "student_before", "teacher"}
    predictions = pq.read_table(run / "predictions.parquet")
    assert set(predictions["model"].to_pylist()) == set(figures)
    assert {"tokenizer", "rows", "responses", "scores", "distill", "evaluation", "report"} <= set(manifest(run))
