"""Evaluation of models on sets of rows: ROUGE-L and exact match of greedy and sampled answers.

All of it is one Ray Data job over one pool of actors (POCL, section 4.1). An item is one batch of one set, for one
model and all seeds: the answers to a prompt share its prefill. What is sampled depends on the row and the seed alone,
so the figures depend neither on the number of actors nor on the rows that share a batch.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from ray.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl_ray.answers.decode import GenerationSettings, generate
from pocl_ray.answers.rouge import exact_match_batch, rouge_l_batch
from pocl_ray.config import Config, EvaluationConfig, GenerationConfig, ScalingConfig
from pocl_ray.data.row_store import RowStore
from pocl_ray.evaluation.perplexity import measure_perplexity
from pocl_ray.models.loading import load_model, load_tokenizer
from pocl_ray.models.places import ModelRef, on_this_node
from pocl_ray.ray_cluster.actor_pools import collect, plan_pools, quiet_ray_data
from pocl_ray.ray_cluster.actor_watch import stall_watch
from pocl_ray.records import ID, RowsSummary
from pocl_ray.run_directory.storage import RunDirectory

PREDICTIONS = "predictions.parquet"
GREEDY = -1
"""The number that greedy answers have in place of a seed."""

METRICS = ("rouge_l", "exact_match")
_ORDER = [("model", "ascending"), ("set", "ascending"), ("seed", "ascending"), (ID, "ascending")]


def evaluate_rows(
    config: Config,
    models: Mapping[str, ModelRef],
    sets: Mapping[str, RowsSummary],
    run_dir: RunDirectory,
    tokenizer: str,
    own_tokens: Mapping[str, OwnTokens],
) -> tuple[dict[str, Any], dict[str, int], list[str]]:
    """Return the figures of all models: of their answers, or of plain text the perplexity.

    Arguments and errors are those of `evaluate_models`.

    Returns:
        Content of evaluation.json, counts for the manifest, and the files that are written with it.
    """
    if config.data.task == "text":
        return (*measure_perplexity(models, sets, run_dir, config.scaling), [])
    settings = (config.evaluation, config.scaling, config.data.max_tokens, own_tokens)
    return (*evaluate_models(models, sets, run_dir, tokenizer, *settings), [PREDICTIONS])


def evaluate_models(
    models: Mapping[str, ModelRef],
    sets: Mapping[str, RowsSummary],
    run_dir: RunDirectory,
    tokenizer: str,
    evaluation: EvaluationConfig,
    scaling: ScalingConfig,
    max_tokens: int,
    own_tokens: Mapping[str, OwnTokens] = MappingProxyType({}),
) -> tuple[dict[str, Any], dict[str, int]]:
    """Generate and score the answers of all models on all sets, on the running Ray cluster.

    The answers themselves are written to predictions.parquet: `model`, `set`, `id`, `seed` (-1: greedy), `text`,
    `rouge_l`, `exact_match`, `num_tokens`, `stopped`.

    Args:
        models: Mapping of the name in the result to the model.
        sets: Mapping of the name in the result to the prepared rows.
        run_dir: Run directory, which holds the rows and receives the predictions.
        tokenizer: Directory of the models' tokenizer, relative to the run directory.
        evaluation: Seeds and settings of generation.
        scaling: Number of actors and their resources.
        max_tokens: Maximum tokens of prompt and answer together (`data.max_tokens`).
        own_tokens: Mapping of each model with another tokenizer to that tokenizer and its rows.

    Returns:
        `{"sets": {set: {model: {"rouge_l": {"mean", "std", "by_seed"}, "exact_match": {...}, "greedy": {"rouge_l",
        "exact_match"}, "num_rows", "unstopped_share"}}}}`, from 0 to 100 (`unstopped_share`: 0 to 1). `std` is the
        sample standard deviation over seeds, 0 for a single one; `greedy` is there if the config has it. And counts for
        the manifest: `num_rows` answers of `num_tokens` tokens.

    Raises:
        ModelError: A model cannot be loaded.
        ResourceError: The cluster has no room for an actor.
    """
    seeds = (*evaluation.seeds, *((GREEDY,) if evaluation.greedy else ()))
    items = _plan_items(models, sets, len(seeds), run_dir, evaluation.generation.batch_rows)
    (pool,) = plan_pools(scaling, [scaling.evaluation_actors], len(items))
    paths = {name: rows.path for name, rows in sets.items()}
    settings = (seeds, evaluation.generation, max_tokens, pool.use_gpu)
    task = EvaluationTask(run_dir, dict(models), paths, tokenizer, *settings, dict(own_tokens))
    num_answers = len(models) * len(seeds) * sum(rows.num_rows for rows in sets.values())
    with quiet_ray_data(), stall_watch(scaling, "evaluate") as watched:
        dataset: Dataset = ray.data.from_arrow(items)
        dataset = dataset.map_batches(watched(AnswerActor), fn_constructor_args=(task,), **pool.options())
        answers = collect(dataset, "evaluate", num_answers, "answers").sort_by(_ORDER)
    if answers.num_rows != num_answers:
        raise RuntimeError(f"evaluation gave {answers.num_rows} answers instead of {num_answers}")
    run_dir.write_table(PREDICTIONS, answers)
    figures = {name: {model: _figures(answers, model, name) for model in models} for name in sets}
    return {"sets": figures}, {"num_rows": num_answers, "num_tokens": pc.sum(answers["num_tokens"]).as_py()}


@dataclass(frozen=True)
class OwnTokens:
    """A model's tokenizer, and the rows in its tokens; paths are relative to the run directory.

    Attributes:
        tokenizer: Directory of the tokenizer.
        rows: Mapping of each set to the Arrow file of its rows in these tokens.
    """

    tokenizer: str
    rows: dict[str, str]


@dataclass(frozen=True)
class EvaluationTask:
    """The settings that the actors receive.

    Attributes:
        run_dir: Run directory.
        models: Models by name.
        rows: Mapping of each set to the Arrow file of its rows, relative to the run directory.
        tokenizer: Directory of the tokenizer, relative to the run directory.
        seeds: Seed of each answer to a prompt; GREEDY stands for a greedy one.
        generation: Settings of sampled answers; greedy answers differ in the temperature alone.
        max_tokens: Maximum tokens of prompt and answer together.
        use_gpu: Whether actors run on a GPU.
        own_tokens: Tokenizer and rows of each model that does not share the tokenizer.
    """

    run_dir: RunDirectory
    models: dict[str, ModelRef]
    rows: dict[str, str]
    tokenizer: str
    seeds: tuple[int, ...]
    generation: GenerationConfig
    max_tokens: int
    use_gpu: bool
    own_tokens: dict[str, OwnTokens] = field(default_factory=dict)

    def tokens_of(self, model: str) -> OwnTokens:
        """Return the tokenizer and the rows of a model."""
        return self.own_tokens.get(model) or OwnTokens(self.tokenizer, self.rows)


class AnswerActor:
    """Generates and scores the answers of one item; it keeps the model of the last item loaded."""

    def __init__(self, task: EvaluationTask) -> None:
        self.task = task
        self._model: tuple[str, PreTrainedModel] | None = None
        self._rows: dict[str, RowStore] = {}
        self._tokenizers: dict[str, PreTrainedTokenizerBase] = {}

    def __call__(self, items: pa.Table) -> Iterator[pa.Table]:
        """Yield the scored answers to the prompts of items.

        Args:
            items: `model`, `set`, `ids`.

        Yields:
            One row for each answer of an item, as in predictions.parquet.
        """
        for item in items.to_pylist():
            yield self._answers(item["model"], item["set"], item["ids"])

    def _answers(self, model: str, name: str, ids: list[int]) -> pa.Table:
        rows, tokenizer = self._rows_of(model, name), self._tokenizer_of(model)
        prompts, _ = rows.tokens(ids)
        settings = GenerationSettings.of(self.task.generation, self.task.max_tokens, prompts)
        seeds = [None if seed == GREEDY else seed for seed in self.task.seeds]
        answered = generate(self._load(model), tokenizer, prompts, settings, seeds, ids)
        limits, references = settings.limits(len(ids)), rows.references(ids)
        tables = []
        for seed, answers in zip(self.task.seeds, answered, strict=True):
            texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
            columns = {
                "model": [model] * len(ids),
                "set": [name] * len(ids),
                ID: ids,
                "seed": [seed] * len(ids),
                "text": texts,
                "rouge_l": rouge_l_batch(texts, references),
                "exact_match": exact_match_batch(texts, references),
                "num_tokens": [len(answer) for answer in answers],
                "stopped": [len(answer) < limit for answer, limit in zip(answers, limits, strict=True)],
            }
            tables.append(pa.table(columns))
        return pa.concat_tables(tables)

    def _rows_of(self, model: str, name: str) -> RowStore:
        rel = self.task.tokens_of(model).rows[name]
        if rel not in self._rows:
            self._rows[rel] = RowStore.open(self.task.run_dir.local(rel))
        return self._rows[rel]

    def _tokenizer_of(self, model: str) -> PreTrainedTokenizerBase:
        rel = self.task.tokens_of(model).tokenizer
        if rel not in self._tokenizers:
            self._tokenizers[rel] = load_tokenizer(str(self.task.run_dir.local(rel)))
        return self._tokenizers[rel]

    def _load(self, name: str) -> PreTrainedModel:
        if self._model is None or self._model[0] != name:
            self._model = None  # free the old model first: two may not fit into memory
            device = "cuda" if self.task.use_gpu else "cpu"
            self._model = (name, load_model(on_this_node(self.task.models[name]), device))
        return self._model[1]


def _plan_items(
    models: Mapping[str, ModelRef],
    sets: Mapping[str, RowsSummary],
    num_seeds: int,
    run_dir: RunDirectory,
    batch_rows: int,
) -> list[pa.Table]:
    """One table for each batch of each model and set, model by model so that actors rarely load another one."""
    # An item's answers are generated at once: all seeds of as many prompts as make up a batch.
    num_prompts = max(1, batch_rows // num_seeds)
    batches: dict[str, list[list[int]]] = {}
    for name, rows in sets.items():
        lengths = RowStore.open(run_dir.local(rows.path)).prompt_lengths
        order = np.argsort(lengths, kind="stable").tolist()
        batches[name] = [order[start : start + num_prompts] for start in range(0, len(order), num_prompts)]
    items = []
    for model, (name, of_set) in product(models, batches.items()):
        for ids in reversed(of_set):  # long prompts first: the last ones to finish are short
            items.append(pa.table({"model": [model], "set": [name], "ids": [ids]}))
    return items


def _figures(answers: pa.Table, model: str, name: str) -> dict[str, Any]:
    """The entry of one model and one set in evaluation.json."""
    mine = answers.filter((pc.field("model") == model) & (pc.field("set") == name))
    by_seed = {seed: mine.filter(pc.field("seed") == seed) for seed in mine["seed"].unique().to_pylist()}
    figures: dict[str, Any] = {}
    for metric in METRICS:
        values = {str(seed): _mean(part, metric) for seed, part in by_seed.items() if seed != GREEDY}
        spread = statistics.stdev(values.values()) if len(values) > 1 else 0.0
        figures[metric] = {"mean": statistics.fmean(values.values()), "std": spread, "by_seed": values}
    if GREEDY in by_seed:
        figures["greedy"] = {metric: _mean(by_seed[GREEDY], metric) for metric in METRICS}
    figures["num_rows"] = next(iter(by_seed.values())).num_rows
    figures["unstopped_share"] = 1.0 - _mean(mine, "stopped")
    return figures


def _mean(table: pa.Table, column: str) -> float:
    return statistics.fmean(table[column].to_numpy().astype(float).tolist())
