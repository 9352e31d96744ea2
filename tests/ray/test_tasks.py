"""The other tasks from the command line, at tiny size: plain text without a prompt, and summaries of documents."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny import WORDS, cli, manifest, metrics, write_config

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

SHORT: dict[str, Any] = {
    "curriculum__interval_epochs": 1,
    "train__checkpoint_every_steps": None,
    "scaling": {"num_workers": 1},
    "student__sft": None,
    "control": None,
}


def write_task(folder: Path, rows: dict[str, list[dict[str, str]]], **changes: Any) -> Path:
    """Rows of each set, and the tiny config with them."""
    for name, of_set in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_set))
    return write_config(folder, **SHORT, **changes)


def words(rng: np.random.Generator, least: int, most: int) -> str:
    return " ".join(rng.choice(WORDS, size=int(rng.integers(least, most))))


def test_plain_text_is_distilled_and_measured_by_perplexity(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = {
        name: [{"text": words(rng, 2, 24)} for _ in range(count)]
        for name, count in (("train", 60), ("dev", 6), ("test", 6))
    }
    config = write_task(
        tmp_path,
        rows,
        data__task="text",
        data__prompt_template=None,
        data__max_prompt_tokens=None,
        data__max_tokens=32,
        teacher__sft={"max_steps": 20},
        difficulty={"signals": ["ce_loss", "teacher_student_kl"], "shard_rows": 32},
    )
    done = cli("run", str(config))
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "tiny"
    figures = json.loads((run / "evaluation.json").read_text())["sets"]["held_out"]
    assert set(figures) == {"student", "student_before", "teacher"}
    for found in figures.values():
        assert found["perplexity"] == pytest.approx(math.exp(found["ce_loss"])) and found["num_rows"] >= 6
    assert figures["student"]["ce_loss"] < figures["student_before"]["ce_loss"]
    scores = pq.read_table(run / "scores.parquet")
    assert "rouge_l" not in scores.column_names and scores.num_rows > 60
    assert scores["num_prompt_tokens"].unique().to_pylist() == [1]
    evaluations = [record for record in metrics(run / "metrics.jsonl") if "eval/dev/kd_loss" in record]
    assert evaluations and not any("eval/dev/rouge_l" in record for record in evaluations)
    assert "perplexity" in (run / "report.md").read_text() and "perplexity" in (run / "student/README.md").read_text()
    assert {step["status"] for step in manifest(run).values()} == {"done"}


def test_summaries_are_distilled(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = {}
    for name, count in (("train", 60), ("dev", 6), ("test", 6)):
        articles = [words(rng, 2, 30) for _ in range(count)]
        rows[name] = [{"article": text, "highlights": text.split()[0]} for text in articles]
    config = write_task(tmp_path, rows, data__task="summarization", data__prompt_template="Short: {document} =>")
    done = cli("run", str(config))
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "runs/tiny/evaluation.json").read_text())["sets"]["held_out"]
    assert set(figures) == {"student", "student_before", "teacher"} and "rouge_l" in figures["student"]


def test_a_missing_summary_column_is_refused_with_the_columns_found(tmp_path: Path) -> None:
    rows = {name: [{"article": "a", "title": "b"}] * 20 for name in ("train", "dev", "test")}
    done = cli("run", str(write_task(tmp_path, rows, data__task="summarization")))
    assert done.returncode == 2
    assert "the document and its summary; found: article, title" in done.stderr
