"""A whole run beside the authors' scripts: both do the same work, in stages of the same rows, steps and losses."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_llama import tiny_llama

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import authors_scripts
import whole_run
from step_sides import FullLogitsStep, Row, random_rows
from text_rows import TEMPLATE, word_tokenizer, write_rows

from pocl_ray.config import Config
from pocl_ray.curriculum.schedule import plan_stages
from pocl_ray.distill.losses import resolve_loss
from pocl_ray.distill.step import StepSettings

VOCABULARY = 320


def text_rows(folder: Path, num_rows: int) -> list[authors_scripts.TextRow]:
    write_rows(folder / "rows.jsonl", num_rows, VOCABULARY)
    settings = {"rows": str(folder / "rows.jsonl"), "template": TEMPLATE}
    return authors_scripts.read_rows(settings, word_tokenizer(VOCABULARY))


def test_the_scripts_read_the_rows_with_the_token_that_ends_them(tmp_path: Path) -> None:
    rows, drawn = text_rows(tmp_path, 3), random_rows(3, VOCABULARY, 0)

    for row, own in zip(rows, drawn, strict=True):
        assert [*row.prompt, *row.response] == [*own.ids_T.tolist(), 0]
        assert len(row.prompt) == own.num_prompt_tokens


def test_the_loss_of_the_scripts_is_that_of_the_common_way(tmp_path: Path) -> None:
    student, teacher, rows = tiny_llama(VOCABULARY, 0), tiny_llama(VOCABULARY, 1), text_rows(tmp_path, 3)
    settings = StepSettings(kd_temperature=1.5, kd_ratio=0.8, kd=resolve_loss("forward_kl"))
    as_rows = [Row(torch.tensor([*row.prompt, *row.response]), len(row.prompt)) for row in rows]

    loss = authors_scripts.loss_of(student, teacher, rows, {"length": 512, "temperature": 1.5, "kd_ratio": 0.8})

    assert loss.item() == pytest.approx(FullLogitsStep(student, teacher, settings).loss(as_rows).item(), rel=1e-5)


def test_the_run_of_the_package_has_the_stages_of_the_scripts(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 8, VOCABULARY)
    options = argparse.Namespace(folder=tmp_path, new_tokens=8, epochs=2, batch=2)
    settings = {"rows": str(tmp_path / "rows.jsonl"), "teacher": "teacher", "student": "student"}

    config = Config.model_validate(json.loads(json.dumps(whole_run.our_config(options, settings))))

    stages = plan_stages(config, 8)
    assert [(stage.kd_temperature, stage.kd_ratio) for stage in stages] == [(1, 0.7), (1.33, 0.8), (1.67, 0.9), (2, 1)]
    assert [stage.num_steps for stage in stages] == [2, 4, 6, 8]
    assert config.train.weight_decay == 0.01 and config.train.max_grad_norm == 1.0 and config.train.warmup_ratio == 0
