"""The page for readers computes what the package does: rows, ranking, stages, and the loss of every step."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from runs import prepare, train, with_teacher
from transformers import AutoModelForCausalLM, AutoTokenizer

from pocl_ray.config import CurriculumConfig, DataConfig, SourceConfig, TrainConfig
from pocl_ray.curriculum.schedule import plan_curriculum
from pocl_ray.data.prepare import prepare_all
from pocl_ray.data.row_store import RowStore
from pocl_ray.difficulty.ranking import rank_rows
from pocl_ray.models.places import ModelRef
from pocl_ray.models.saving import save_model

PAGE = Path(__file__).resolve().parents[3] / "examples" / "one_page_pocl.py"
NUM_ROWS = 203  # no multiple of the stages, so the last one has a remainder
CURRICULUM = CurriculumConfig(interval_epochs=2, hand_off="last")
TRAIN = TrainConfig(
    global_batch_rows=32,
    micro_batch_rows=16,
    learning_rate=1e-3,
    betas=(0.9, 0.98),
    eps=1e-5,
    warmup_ratio=0.04,
    precision="fp32",
    eval_every_epochs=2,
)


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("one_page_pocl", PAGE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_one() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 200
    assert "import ray" not in text


def test_rows_are_ranked_as_the_package_ranks_them(page: ModuleType) -> None:
    rng = np.random.default_rng(0)
    rouge_l, ce_loss = rng.integers(0, 5, 101) / 4.0, rng.integers(0, 20, 101) / 8.0  # with ties
    _, rank = rank_rows({"rouge_l": rouge_l, "ce_loss": ce_loss})
    assert page.rank(rouge_l, ce_loss).tolist() == np.argsort(rank).tolist()


def test_the_published_stages_are_planned(page: ModuleType) -> None:
    ranked = np.random.default_rng(1).permutation(NUM_ROWS)
    planned = plan_curriculum(CURRICULUM, NUM_ROWS, page.BATCH_ROWS)
    for ours, stage in zip(page.baby_steps(ranked), planned, strict=True):
        assert ours.rows.tolist() == ranked[stage.first_rank : stage.end_rank].tolist()
        assert (ours.num_steps, ours.index) == (stage.num_steps, stage.index)
        assert ours.temperature == pytest.approx(stage.kd_temperature)
        assert ours.kd_ratio == pytest.approx(stage.kd_ratio)


@pytest.mark.slow
def test_losses_are_those_of_the_package(page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(page.TEACHER)
    teacher = AutoModelForCausalLM.from_pretrained(page.TEACHER, dtype=torch.float32).requires_grad_(False)
    rows, student = page.read("train", tokenizer, NUM_ROWS), page.new_student(tokenizer)
    page.train(student, None, rows, page.Stage(0, np.arange(NUM_ROWS), 40, temperature=1.0, kd_ratio=0.0))
    monkeypatch.setattr(page, "PEAK_LR", TRAIN.learning_rate)  # lower: Adam then magnifies less of what is rounded
    ranked = np.random.default_rng(1).permutation(NUM_ROWS)
    theirs = package_losses(page, tokenizer, student, ranked, rows, tmp_path)
    ours = [loss for stage in page.baby_steps(ranked) for loss in page.train(student, teacher, rows, stage)]
    assert len(ours) > 25
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def package_losses(
    page: ModuleType, tokenizer: Any, student: Any, ranked: np.ndarray, rows: list[dict], folder: Path
) -> list[float]:
    """Train the same student through the package's loop, one worker, from rows that the package reads itself."""
    task = prepare(folder / "task")
    data = DataConfig(
        train=SourceConfig(path="samples://instructions", max_rows=NUM_ROWS),
        dev=SourceConfig(path="samples://instructions", max_rows=8),
        prompt_template="{instruction}\n{input}\n=>\n",
        max_prompt_tokens=96,
        max_tokens=128,
    )
    made = prepare_all(data, tokenizer, page.SEED, task.run_dir)
    store = RowStore.open(task.run_dir.local(made.train.path))
    prompts, responses = store.tokens(np.arange(NUM_ROWS))
    assert [[*p, *r] for p, r in zip(prompts, responses, strict=True)] == [row["ids"] for row in rows]
    rank = np.empty(NUM_ROWS, np.int64)
    rank[ranked] = np.arange(1, NUM_ROWS + 1)
    pq.write_table(pa.table({"rank": rank}), f"{task.run_dir.uri}/scores.parquet")
    tokenizer.save_pretrained(task.run_dir.local("tokenizer"))
    save_model(student, tokenizer, folder / "student")
    task = replace(
        with_teacher(task, ref=ModelRef("samples://quickstart-teacher", dtype="float32")),
        stages=plan_curriculum(CURRICULUM, NUM_ROWS, page.BATCH_ROWS),
        student=ModelRef(str(folder / "student")),
        rows=made.train,
        dev_rows=made.dev,
        train=TRAIN,
        seed=page.SEED,
    )
    return train(task, folder / "outcome").losses
