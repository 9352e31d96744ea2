"""Two teachers with top-k caches: written by the scoring jobs, and read by the stages of a training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import FullRun, manifest, metrics

from pocl_ray.data.row_store import RowStore
from pocl_ray.inputs import FingerprintedModel
from pocl_ray.models.loading import load_model
from pocl_ray.pipeline import Pipeline
from pocl_ray.teacher_cache.reader import TopKCache
from pocl_ray.teacher_cache.top_k import top_k_of

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]


@torch.no_grad()
def assert_holds_the_likeliest(pipeline: Pipeline, teacher: FingerprintedModel, folder: str) -> None:
    """Against the logits of the whole model on single rows without padding."""
    model = load_model(teacher.ref)
    for made in (pipeline.inputs.rows.train, pipeline.inputs.rows.dev):
        directory = pipeline.run_dir.local(f"{folder}/{made.name}")
        cache = TopKCache.open(directory, teacher.fingerprint, made.fingerprint, made.num_rows)
        store = RowStore.open(pipeline.run_dir.local(made.path))
        for row in (0, made.num_rows - 1):
            (prompt,), (response,) = store.tokens([row])
            tokens = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
            expected = top_k_of(model(tokens).logits[0, len(prompt) - 1 : -1], 8)
            taken = cache.take(np.array([row]))
            assert (taken.ids_NK == expected.ids_NK).float().mean() > 0.9, "but for near ties"
            torch.testing.assert_close(taken.log_probs(1.5), expected.log_probs(1.5), rtol=1e-3, atol=1e-3)


def test_two_teachers_are_cached_and_teach_by_stage(full_run: FullRun, cluster: None, tmp_path_factory) -> None:
    config, run = full_run.copy(
        tmp_path_factory.mktemp("two_teachers"),
        ("teacher_cache",),
        distill__teacher_cache="topk",
        distill__top_k=8,
        teacher__stages=[0],
        # any other model
        other_teachers=[{"path": str(full_run.run / "student"), "stages": [1], "weight": 2.0}],
        control=None,
        scaling__num_workers=1,
    )
    before = manifest(run)
    pipeline = Pipeline(config, resume_with_changes=True)
    assert pipeline.distilled
    assert manifest(run)["scores"]["outputs"] == ["scores/signals.parquet", "teacher_cache", "teacher_cache_2"]
    assert manifest(run)["teacher"] == before["teacher"]
    (second,) = pipeline.inputs.other_teachers
    assert_holds_the_likeliest(pipeline, pipeline.inputs.teacher, "teacher_cache")
    assert_holds_the_likeliest(pipeline, second, "teacher_cache_2")
    losses = [record["train/kd_loss"] for record in metrics(run / "metrics.jsonl") if "train/kd_loss" in record]
    assert losses and all(0 <= loss < 20 for loss in losses)
