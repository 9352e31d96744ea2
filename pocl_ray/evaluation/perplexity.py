"""Evaluation on plain text, which has no prompts to answer: the perplexity of each model.

It is one Ray Data job with one pool of actors, as for answers. An item is one batch of one set for one model. The mean
negative log-likelihood is taken over all response tokens of a set, in nats: `ce_loss = -1/N sum log q(token)`, and
`perplexity = exp(ce_loss)`. Figures can be compared between models with the same tokenizer only.

Axes: N the response tokens of a batch in one flat axis, C those of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
import torch
import torch.nn.functional as F
from ray.data import Dataset

from pocl_ray.config import ScalingConfig
from pocl_ray.data.batching import collate
from pocl_ray.data.row_store import RowStore
from pocl_ray.models.frozen import LiveTeacher as FrozenModel  # any model without gradients, split into body and head
from pocl_ray.models.places import ModelRef, on_this_node
from pocl_ray.ray_cluster.actor_pools import collect, plan_pools, quiet_ray_data
from pocl_ray.ray_cluster.actor_watch import stall_watch
from pocl_ray.records import RowsSummary
from pocl_ray.run_directory.storage import RunDirectory

_BATCH_TOKENS = 8192
_CHUNK_MIB = 64


def measure_perplexity(
    models: Mapping[str, ModelRef],
    sets: Mapping[str, RowsSummary],
    run_dir: RunDirectory,
    scaling: ScalingConfig,
) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the perplexity of each model on each set, computed on the running Ray cluster.

    Args:
        models: Mapping of the name in the result to the model.
        sets: Mapping of the name in the result to the prepared rows.
        run_dir: Run directory, which holds the rows.
        scaling: Number of actors and their resources.

    Returns:
        `{"sets": {set: {model: {"ce_loss", "perplexity", "num_rows", "num_tokens"}}}}`, and counts for the manifest.

    Raises:
        ModelError: A model cannot be loaded.
        ResourceError: The cluster has no room for an actor.
    """
    items = [
        pa.table({"model": [model], "set": [name], "ids": [ids.tolist()]})
        for model in models
        for name, rows in sets.items()
        for ids in reading_batches(RowStore.open(run_dir.local(rows.path)))
    ]
    (pool,) = plan_pools(scaling, [scaling.evaluation_actors], len(items))
    paths = {name: rows.path for name, rows in sets.items()}
    task = ReadingTask(run_dir, dict(models), paths, pool.use_gpu)
    num_rows = len(models) * sum(rows.num_rows for rows in sets.values())
    with quiet_ray_data(), stall_watch(scaling, "evaluate") as watched:
        dataset: Dataset = ray.data.from_arrow(items)
        dataset = dataset.map_batches(watched(ReadingActor), fn_constructor_args=(task,), **pool.options())
        read = collect(dataset, "evaluate", len(items), "batches")
    if pc.sum(read["num_rows"]).as_py() != num_rows:
        raise RuntimeError(f"evaluation read {pc.sum(read['num_rows']).as_py()} rows instead of {num_rows}")
    figures = {name: {model: _figures(read, model, name) for model in models} for name in sets}
    return {"sets": figures}, {"num_rows": num_rows, "num_tokens": pc.sum(read["num_tokens"]).as_py()}


@dataclass(frozen=True)
class ReadingTask:
    """The settings that the actors receive.

    Attributes:
        run_dir: Run directory.
        models: Models by name.
        rows: Mapping of each set to the Arrow file of its rows, relative to the run directory.
        use_gpu: Whether actors run on a GPU.
    """

    run_dir: RunDirectory
    models: dict[str, ModelRef]
    rows: dict[str, str]
    use_gpu: bool


class ReadingActor:
    """Reads the rows of one item; it keeps the model of the last item loaded."""

    def __init__(self, task: ReadingTask) -> None:
        self.task = task
        self._model: tuple[str, FrozenModel] | None = None
        self._rows: dict[str, RowStore] = {}

    def __call__(self, items: pa.Table) -> Iterator[pa.Table]:
        """Yield the summed loss of the rows of each item.

        Args:
            items: Table with columns `model`, `set`, `ids`.

        Yields:
            A row for each item: `model`, `set`, `first_id`, `nll` (the sum over tokens, in nats), `num_tokens`,
                `num_rows`.
        """
        for item in items.to_pylist():
            nll, num_tokens = self._read(item["model"], item["set"], item["ids"])
            yield pa.table(
                {
                    **{key: [item[key]] for key in ("model", "set")},
                    "first_id": [item["ids"][0]],
                    "nll": [nll],
                    "num_tokens": [num_tokens],
                    "num_rows": [len(item["ids"])],
                }
            )

    def _read(self, model_name: str, set_name: str, ids: list[int]) -> tuple[float, int]:
        if set_name not in self._rows:
            self._rows[set_name] = RowStore.open(self.task.run_dir.local(self.task.rows[set_name]))
        model = self._load(model_name)
        prompts, responses = self._rows[set_name].tokens(ids)
        batch = collate(prompts, responses, pad_id=0).to("cuda" if self.task.use_gpu else "cpu")
        hidden_NH = model.hidden(batch.input_ids_BT, batch.attention_mask_BT, batch.response_index_N)
        return summed_nll(hidden_NH, model.head.logits, batch.targets_N), batch.num_response_tokens

    def _load(self, name: str) -> FrozenModel:
        if self._model is None or self._model[0] != name:
            self._model = None  # free the old model first: two may not fit into memory
            device = "cuda" if self.task.use_gpu else "cpu"
            self._model = (name, FrozenModel(on_this_node(self.task.models[name]), device))
        return self._model[1]


@torch.no_grad()
def summed_nll(hidden_NH: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], targets_N: torch.Tensor) -> float:
    """Return the sum over tokens of -log q(target), in nats; logits exist for one chunk of tokens at a time.

    Args:
        hidden_NH: Final hidden states at the positions that predict `targets_N`.
        head: Function from hidden states of shape (C, H) to logits of shape (C, V).
        targets_N: Token ids.
    """
    vocab_size = head(hidden_NH[:1]).shape[-1]
    size = max(1, _CHUNK_MIB * 2**20 // (4 * vocab_size))
    parts = zip(hidden_NH.split(size), targets_N.split(size), strict=True)
    losses = [F.cross_entropy(head(hidden_CH).float(), target_C, reduction="none") for hidden_CH, target_C in parts]
    return float(torch.cat(losses).double().cpu().sum())


def reading_batches(rows: RowStore) -> list[np.ndarray]:
    """Return row ids, the longest rows first, cut by length alone into batches with a limit of padded tokens."""
    lengths = rows.prompt_lengths + rows.response_lengths
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, _BATCH_TOKENS // int(lengths[order[start]]))
        batches.append(order[start : start + size])
        start += size
    return batches


def _figures(read: pa.Table, model: str, name: str) -> dict[str, Any]:
    """The entry of one model and one set in evaluation.json; the sum runs over the batches in a fixed order."""
    mine = read.filter((pc.field("model") == model) & (pc.field("set") == name)).sort_by("first_id")
    num_tokens = pc.sum(mine["num_tokens"]).as_py()
    ce_loss = math.fsum(mine["nll"].to_pylist()) / num_tokens
    return {
        "ce_loss": ce_loss,
        "perplexity": math.exp(ce_loss),
        "num_rows": pc.sum(mine["num_rows"]).as_py(),
        "num_tokens": num_tokens,
    }
