"""Top-k caches of two teachers, as the scoring jobs write them, and from scoring to a trained student."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import FullRun, manifest, metrics

from pocl_ray.config import DifficultyConfig, ScalingConfig
from pocl_ray.config.sources import ScoringGenerationConfig
from pocl_ray.data.row_store import RowStore
from pocl_ray.difficulty.job import CacheTask, ScoringInputs, cache_teacher, score_rows
from pocl_ray.models.loading import load_model
from pocl_ray.pipeline import Pipeline
from pocl_ray.records import RowsSummary
from pocl_ray.teacher_cache.reader import TopKCache
from pocl_ray.teacher_cache.top_k import top_k_of

pytestmark = pytest.mark.ray


DIFFICULTY = DifficultyConfig(generation=ScoringGenerationConfig(max_new_tokens=4), shard_rows=32, batch_tokens=256)


@torch.no_grad()
def assert_holds_the_likeliest(tiny_run: Any, teacher: Any, cache: str, fingerprint: str) -> None:
    """Against the logits of the whole model on single rows without padding."""
    model = load_model(teacher)
    for made in (tiny_run.train, tiny_run.dev):
        opened = open_cache(tiny_run.run_dir.local(cache), fingerprint, made)
        store = RowStore.open(tiny_run.run_dir.local(made.path))
        for row in (0, made.num_rows - 1):
            (prompt,), (response,) = store.tokens([row])
            tokens = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
            expected = top_k_of(model(tokens).logits[0, len(prompt) - 1 : -1], 8)
            taken = opened.take(np.array([row]))
            assert (taken.ids_NK == expected.ids_NK).float().mean() > 0.9, "but for near ties"
            torch.testing.assert_close(taken.log_probs(1.5), expected.log_probs(1.5), rtol=1e-3, atol=1e-3)


def test_the_scoring_jobs_write_the_top_k_caches_of_two_teachers(cluster: None, tiny_run: Any) -> None:
    shared = {"run_dir": tiny_run.run_dir, "student": tiny_run.student, "difficulty": DIFFICULTY}
    inputs = ScoringInputs(
        rows=tiny_run.train,
        dev_rows=tiny_run.dev,
        tokenizer=tiny_run.tokenizer,
        teacher=tiny_run.teacher,
        cache=CacheTask("top_k_cache", "auto", 8, "first"),
        max_tokens=48,
        seed=7,
        **shared,
    )
    score_rows(inputs, ScalingConfig())
    cache_teacher(
        sets=[tiny_run.train, tiny_run.dev],
        teacher=tiny_run.student,  # any other model
        cache=CacheTask("top_k_cache_2", "auto", 8, "second"),
        scaling=ScalingConfig(),
        **shared,
    )
    assert_holds_the_likeliest(tiny_run, tiny_run.teacher, "top_k_cache", "first")
    assert_holds_the_likeliest(tiny_run, tiny_run.student, "top_k_cache_2", "second")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_teachers_are_cached_and_teach_by_stage(full_run: FullRun, cluster: None, tmp_path_factory) -> None:
    second = str(full_run.run / "models" / "teacher")
    config, run = full_run.copy(
        tmp_path_factory.mktemp("two_teachers"),
        ("teacher_cache",),
        distill__teacher_cache="topk",
        distill__top_k=8,
        teacher__stages=[0],
        other_teachers=[{"path": second, "stages": [1], "weight": 2.0}],
        control=None,
        scaling__num_workers=1,
    )
    before = manifest(run)
    pipeline = Pipeline(config, resume_with_changes=True)
    assert pipeline.distilled
    assert manifest(run)["scores"]["outputs"] == ["scores/signals.parquet", "teacher_cache", "teacher_cache_2"]
    assert manifest(run)["teacher"] == before["teacher"]
    teachers = [pipeline.inputs.teacher, *pipeline.inputs.other_teachers]
    caches = [open_cache(run / f"teacher_cache{end}", made.fingerprint, pipeline.inputs.rows.train)
              for end, made in zip(("", "_2"), teachers, strict=True)]  # fmt: skip
    ids = np.arange(pipeline.inputs.rows.train.num_rows)
    first, other = (cache.take(ids) for cache in caches)
    assert first.top_k == 8 and (first.ids_NK == other.ids_NK).float().mean() > 0.99, "it is the same teacher"
    losses = [record["train/kd_loss"] for record in metrics(run / "metrics.jsonl") if "train/kd_loss" in record]
    assert losses and all(0 <= loss < 20 for loss in losses)


def open_cache(directory, fingerprint: str, rows: RowsSummary) -> TopKCache:
    return TopKCache.open(directory / rows.name, fingerprint, rows.fingerprint, rows.num_rows)
