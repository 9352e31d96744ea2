"""The other tasks at tiny size: plain text without a prompt, and summaries of documents."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny import WORDS, config_tree, manifest, metrics

from pocl_ray.config import Config
from pocl_ray.pipeline import Pipeline

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

SHORT: dict[str, Any] = {
    "curriculum__interval_epochs": 1,
    "train__checkpoint_every_steps": None,
    "control": None,
}


def run_task(folder: Path, rows: dict[str, list[dict[str, str]]], **changes: Any) -> Path:
    """Run the tiny config with these rows of each set to its end; return the run directory."""
    for name, of_set in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_set))
    pipeline = Pipeline(Config.model_validate(config_tree(folder, **SHORT, **changes)))
    assert pipeline.report
    pipeline.close()
    return folder / "runs" / "tiny"


def words(rng: np.random.Generator, least: int, most: int) -> str:
    return " ".join(rng.choice(WORDS, size=int(rng.integers(least, most))))


def test_plain_text_is_distilled_and_measured_by_perplexity(
    cluster: None, ready_made: dict[str, Any], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    rows = {
        name: [{"text": words(rng, 2, 24)} for _ in range(count)]
        for name, count in (("train", 60), ("dev", 6), ("test", 6))
    }
    run = run_task(
        tmp_path,
        rows,
        **ready_made,
        data__task="text",
        data__prompt_template=None,
        data__max_prompt_tokens=None,
        data__max_tokens=32,
        difficulty={"signals": ["ce_loss", "teacher_student_kl"], "shard_rows": 32},
    )
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


def test_summaries_are_distilled(cluster: None, ready_made: dict[str, Any], tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = {}
    for name, count in (("train", 60), ("dev", 6), ("test", 6)):
        articles = [words(rng, 2, 30) for _ in range(count)]
        rows[name] = [{"article": text, "highlights": text.split()[0]} for text in articles]
    changes = {"data__task": "summarization", "data__prompt_template": "Short: {document} =>"}
    run = run_task(tmp_path, rows, **ready_made, **changes)
    figures = json.loads((run / "evaluation.json").read_text())["sets"]["held_out"]
    assert set(figures) == {"student", "student_before", "teacher"} and "rouge_l" in figures["student"]
