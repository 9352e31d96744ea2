"""The ranking against the order and the scores of the authors' code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from pocl_ray.difficulty.ranking import rank_rows


def test_order_and_scores_are_those_of_the_authors_code(shared: Path) -> None:
    example = json.loads((shared / "parity" / "ranking.json").read_text(encoding="utf-8"))
    rrf_score, rank = rank_rows({"rouge_l": example["rouge_l"], "ce_loss": example["ce_loss"]}, rrf_k=60)
    order = np.argsort(rank)
    assert order.tolist() == example["order_easiest_first"]
    assert rrf_score[order].tolist() == example["rrf_score_in_that_order"]
