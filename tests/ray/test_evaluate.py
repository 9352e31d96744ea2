"""Evaluation on a Ray cluster: figures that belong to the written answers, whatever the number of actors."""

from __future__ import annotations

import statistics
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pocl_ray.answers.rouge import exact_match_batch, rouge_l_batch
from pocl_ray.config import EvaluationConfig, ScalingConfig
from pocl_ray.config.root import FinalGenerationConfig
from pocl_ray.data.row_store import RowStore
from pocl_ray.evaluation.evaluate import GREEDY, evaluate_models

pytestmark = pytest.mark.ray

SEEDS = (10, 20)
EVALUATION = EvaluationConfig(
    seeds=SEEDS, generation=FinalGenerationConfig(max_new_tokens=10, batch_rows=8, no_repeat_ngram_size=0)
)


def evaluate(run: Any, num_actors: int, **changes: Any) -> tuple[dict[str, Any], dict[str, int], pa.Table]:
    options = {
        "models": {"student": run.student, "teacher": run.teacher},
        "sets": {"dev": run.dev},
        "run_dir": run.run_dir,
        "tokenizer": run.tokenizer,
        "evaluation": EVALUATION,
        "scaling": ScalingConfig(evaluation_actors=num_actors),
        "max_tokens": 48,
    }
    result, counts = evaluate_models(**{**options, **changes})
    return result, counts, pq.read_table(run.run_dir.local("predictions.parquet"))


@pytest.fixture(scope="module")
def evaluated(cluster: None, tiny_run: Any) -> Any:
    return evaluate(tiny_run, 1)


def test_every_model_answers_every_row_once_for_each_seed_and_greedily(evaluated: Any, tiny_run: Any) -> None:
    _, counts, answers = evaluated
    found = list(zip(*(answers[name].to_pylist() for name in ("model", "set", "seed", "id")), strict=True))
    seeds = sorted((GREEDY, *SEEDS))
    rows = range(tiny_run.dev.num_rows)
    assert found == [(model, "dev", seed, row) for model in ("student", "teacher") for seed in seeds for row in rows]
    assert counts == {"num_rows": len(found), "num_tokens": sum(answers["num_tokens"].to_pylist())}


def test_figures_are_means_over_the_written_answers(evaluated: Any, tiny_run: Any) -> None:
    result, _, answers = evaluated
    references = RowStore.open(tiny_run.run_dir.local(tiny_run.dev.path)).references(range(tiny_run.dev.num_rows))
    rows = answers.to_pylist()
    for model in ("student", "teacher"):
        figures = result["sets"]["dev"][model]
        texts = {
            seed: [r["text"] for r in rows if (r["model"], r["seed"]) == (model, seed)] for seed in (*SEEDS, GREEDY)
        }
        for metric, batch in (("rouge_l", rouge_l_batch), ("exact_match", exact_match_batch)):
            by_seed = {str(seed): statistics.fmean(batch(texts[seed], references)) for seed in SEEDS}
            assert figures[metric]["by_seed"] == pytest.approx(by_seed)
            assert figures[metric]["mean"] == pytest.approx(statistics.fmean(by_seed.values()))
            assert figures[metric]["std"] == pytest.approx(statistics.stdev(by_seed.values()))
            assert figures["greedy"][metric] == pytest.approx(statistics.fmean(batch(texts[GREEDY], references)))
        stopped = [r["stopped"] for r in rows if r["model"] == model]
        assert figures["num_rows"] == tiny_run.dev.num_rows
        assert figures["unstopped_share"] == pytest.approx(stopped.count(False) / len(stopped))


def test_seeds_give_different_answers(evaluated: Any) -> None:
    rows = evaluated[2].to_pylist()
    first, second = ([r["text"] for r in rows if r["seed"] == seed] for seed in SEEDS)
    assert first != second


def test_answers_do_not_depend_on_the_number_of_actors_or_on_the_other_seeds(evaluated: Any, tiny_run: Any) -> None:
    one_seed = EvaluationConfig(seeds=(20,), greedy=False, generation=EVALUATION.generation)
    result, _, answers = evaluate(tiny_run, 2, evaluation=one_seed)
    before = evaluated[2].to_pylist()
    assert answers.to_pylist() == [row for row in before if row["seed"] == 20]
    assert "greedy" not in result["sets"]["dev"]["student"]
    assert result["sets"]["dev"]["student"]["rouge_l"]["std"] == 0.0
