"""The report of a run on plain text: perplexities instead of answers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from fake_run import CONFIG, LocalFiles, make_run

from pocl_ray.report.build import build_report
from pocl_ray.report.figures import perplexities, perplexity_sentences
from pocl_ray.report.model_card import write_model_card

LOSSES = {"student_before": 4.0, "student_kd": 3.2, "student": 3.0, "teacher": 2.0}
SETS = {
    "stories": {
        model: {"ce_loss": loss, "perplexity": math.exp(loss), "num_rows": 9, "num_tokens": 90}
        for model, loss in LOSSES.items()
    }
}
NAMES = {"student": "POCL", "student_kd": "plain KD"}


def a_run(folder: Path) -> LocalFiles:
    files = make_run(folder, num_rows=64)
    config = yaml.safe_load(CONFIG)
    config["data"]["task"] = "text"
    config["difficulty"] = {"signals": ["ce_loss"]}
    files.write_text("config.yaml", yaml.safe_dump(config))
    files.write_json("evaluation.json", {"sets": SETS})
    return files


def test_the_gap_is_that_of_the_losses() -> None:
    found = {one.model: one for one in perplexities(SETS)}
    assert list(found) == ["student_before", "student_kd", "student", "teacher"]
    assert found["student"].gap_closed == pytest.approx(0.5)
    assert math.isnan(found["teacher"].gap_closed)


def test_a_sentence_says_which_way_it_went() -> None:
    (sentence,) = perplexity_sentences(perplexities(SETS), NAMES)
    assert sentence.startswith("On stories, POCL lowers perplexity from 54.60 to 20.09 (teacher 7.39; 50")
    assert "plain KD at the same number of steps 24.53" in sentence


def test_the_pages_show_perplexities_and_no_table_of_answers(tmp_path: Path) -> None:
    files = a_run(tmp_path)
    build_report(files)
    page, text = (files.read_bytes(f"report.{kind}").decode() for kind in ("html", "md"))
    assert "20.09" in page and 'id="results"' in page and "ROUGE-L<br>sampled" not in page
    assert "| stories | POCL | 20.09 | 3.0000 |" in text and "exact match" not in text
    assert not (tmp_path / "plots" / "evaluation.png").exists()


def test_the_card_shows_perplexities_and_no_template(tmp_path: Path) -> None:
    card = write_model_card(a_run(tmp_path))
    assert "| stories | **this model** | 20.09 |" in card
    assert "prompt template" not in card
