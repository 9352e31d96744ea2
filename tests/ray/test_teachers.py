"""Top-k caches of two teachers, from scoring to a trained student."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import FullRun, manifest, metrics

from pocl_ray.models.top_k_cache import TopKCache
from pocl_ray.pipeline import Pipeline
from pocl_ray.records import RowsSummary

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]


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
