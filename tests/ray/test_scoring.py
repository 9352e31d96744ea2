"""Scoring on a Ray cluster: the same figures as without Ray, whatever the number of actors."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional

from pocl_ray.answers.decode import GenerationSettings, generate
from pocl_ray.answers.rouge import rouge_l_batch
from pocl_ray.config import DifficultyConfig, ScalingConfig
from pocl_ray.config.sources import ScoringGenerationConfig
from pocl_ray.data.row_store import RowStore
from pocl_ray.difficulty.job import CacheTask, ScoringInputs, score_rows
from pocl_ray.errors import ModelError, ResourceError
from pocl_ray.models.heads import head_of
from pocl_ray.models.loading import load_model, load_tokenizer
from pocl_ray.models.places import ModelRef
from pocl_ray.teacher_cache.reader import HiddenCache

pytestmark = pytest.mark.ray

DIFFICULTY = DifficultyConfig(
    generation=ScoringGenerationConfig(sampling_temperature=0.01, no_repeat_ngram_size=6, max_new_tokens=12),
    batch_tokens=256,
    shard_rows=40,
)


def score(run: Any, cache: str | None, student_actors: int = 1, teacher_actors: int = 1, **changes: Any) -> Any:
    kept = None if cache is None else CacheTask(cache, "auto", changes.pop("top_k", None), "the teacher")
    inputs = {
        "rows": run.train,
        "dev_rows": run.dev,
        "run_dir": run.run_dir,
        "tokenizer": run.tokenizer,
        "student": run.student,
        "teacher": run.teacher,
        "cache": kept,
        "difficulty": DIFFICULTY,
        "max_tokens": 48,
        "seed": 7,
    }
    scaling = changes.pop("scaling", ScalingConfig(student_actors=student_actors, teacher_actors=teacher_actors))
    return score_rows(ScoringInputs(**{**inputs, **changes}), scaling)


@pytest.fixture(scope="module")
def scored(cluster: None, tiny_run: Any) -> tuple[pa.Table, dict[str, int]]:
    return score(tiny_run, "teacher_cache")


@torch.no_grad()
def response_logits(ref: ModelRef, prompt: np.ndarray, response: np.ndarray) -> torch.Tensor:
    """The logits that predict a response, of the whole model on one row without padding."""
    tokens = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
    return load_model(ref)(tokens).logits[0, len(prompt) - 1 : -1].double()


def test_signals_are_those_of_whole_models_on_single_rows(scored: Any, tiny_run: Any) -> None:
    table, _ = scored
    store = RowStore.open(tiny_run.run_dir.local(tiny_run.train.path))
    for row in (0, 17, 89):
        prompts, responses = store.tokens([row])
        p = response_logits(tiny_run.teacher, prompts[0], responses[0]).log_softmax(-1)
        q = response_logits(tiny_run.student, prompts[0], responses[0]).log_softmax(-1)
        targets = torch.from_numpy(responses[0].astype(np.int64))
        expected = {
            "ce_loss": functional.nll_loss(q, targets),
            "student_confidence": q.exp().amax(-1).mean(),
            "teacher_ce_loss": functional.nll_loss(p, targets),
            "teacher_entropy": -(p.exp() * p).sum(-1).mean(),
            "teacher_student_kl": (p.exp() * (p - q)).sum(-1).mean(),
            "num_prompt_tokens": len(prompts[0]),
            "num_response_tokens": len(responses[0]),
        }
        for name, value in expected.items():
            assert table[name][row].as_py() == pytest.approx(float(value), rel=1e-4), (row, name)


def test_rouge_l_is_that_of_the_students_answers(scored: Any, tiny_run: Any) -> None:
    table, counts = scored
    store = RowStore.open(tiny_run.run_dir.local(tiny_run.train.path))
    ids = np.arange(len(store))
    prompts, _ = store.tokens(ids)
    tokenizer = load_tokenizer(str(tiny_run.run_dir.local("tokenizer")))
    # At temperature 0.01 sampling is all but greedy; only near ties may differ with the batch.
    settings = GenerationSettings.of(DIFFICULTY.generation, 48, prompts)
    (answers,) = generate(load_model(tiny_run.student), tokenizer, prompts, settings, [7], ids.tolist())
    expected = rouge_l_batch(tokenizer.batch_decode(answers, skip_special_tokens=True), store.references(ids))
    agreeing = np.isclose(table["rouge_l"].to_numpy(), expected)
    assert agreeing.mean() > 0.9
    assert counts["num_unstopped_answers"] == table["answer_stopped"].to_pylist().count(False)


def test_each_row_comes_once_in_row_order_without_gaps(scored: Any, tiny_run: Any) -> None:
    table, counts = scored
    assert table["id"].to_pylist() == list(range(tiny_run.train.num_rows))
    assert all(column.null_count == 0 for column in table.columns)
    assert counts["num_rows"] == tiny_run.train.num_rows + tiny_run.dev.num_rows


def test_the_cache_holds_the_teachers_hidden_states_of_train_and_dev(scored: Any, tiny_run: Any) -> None:
    head = head_of(load_model(tiny_run.teacher))
    for made in (tiny_run.train, tiny_run.dev):
        directory = tiny_run.run_dir.local(f"teacher_cache/{made.name}")
        cache = HiddenCache.open(directory, "the teacher", made.fingerprint, made.num_rows)
        store = RowStore.open(tiny_run.run_dir.local(made.path))
        for row in (0, made.num_rows - 1):
            prompts, responses = store.tokens([row])
            expected = response_logits(tiny_run.teacher, prompts[0], responses[0])
            torch.testing.assert_close(
                head.logits(cache.take(np.array([row]))).double(), expected, rtol=1e-4, atol=1e-4
            )


def test_results_and_cache_do_not_depend_on_the_number_of_actors(scored: Any, tiny_run: Any) -> None:
    table, _ = score(tiny_run, "cache_of_many", student_actors=2, teacher_actors=2)
    assert table.equals(scored[0])
    one, many = (tiny_run.run_dir.local(name) for name in ("teacher_cache", "cache_of_many"))
    files = sorted(path.relative_to(one) for path in one.rglob("*.arrow"))
    assert files == sorted(path.relative_to(many) for path in many.rglob("*.arrow"))
    assert all((one / path).read_bytes() == (many / path).read_bytes() for path in files)


def test_a_model_that_cannot_be_loaded_is_one_clear_error(cluster: None, tiny_run: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_run.student.path, broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(ModelError) as caught:
        score(tiny_run, None, student=replace(tiny_run.student, path=str(broken)))
    assert type(caught.value) is ModelError
    assert "\n" not in str(caught.value)
    assert str(broken) in str(caught.value)


def test_actors_that_the_cluster_has_no_room_for_are_refused_at_once(cluster: None, tiny_run: Any) -> None:
    with pytest.raises(ResourceError, match=r"lower scaling\.cpus_per_actor"):
        score(tiny_run, None, scaling=ScalingConfig(cpus_per_actor=3))
    with pytest.raises(ResourceError, match=r"scaling\.use_gpu: the cluster has no GPU"):
        score(tiny_run, None, scaling=ScalingConfig(use_gpu=True))
