"""The tasks of lm-eval on all models, as one Ray Data job with one pool of actors.

An item is one task for one model. Its figures go to a file of their own as soon as they are there, so a run that is
killed goes on with the items that are missing, and a changed list of tasks costs only what is new in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import Dataset
from transformers import PreTrainedModel

from pocl_ray.config import Config, EvaluationTaskConfig, ScalingConfig
from pocl_ray.evaluation.harness import folder_digest, harness_version, run_task
from pocl_ray.models.loading import load_model, load_tokenizer
from pocl_ray.models.places import ModelRef, on_this_node
from pocl_ray.ray_cluster.actor_pools import collect, plan_pools, quiet_ray_data
from pocl_ray.ray_cluster.actor_watch import stall_watch
from pocl_ray.run_directory.digests import fingerprint
from pocl_ray.run_directory.storage import RunDirectory

EVALUATION, FOLDER = "evaluation.json", "tasks"
_UNSAFE = re.compile(r"[^\w.-]")


@dataclass(frozen=True)
class EvaluatedModel:
    """A model that is evaluated.

    Attributes:
        ref: Place of the model.
        depends: Fingerprints of everything that the model and its tokenizer depend on.
        tokenizer: Directory of its tokenizer, relative to the run directory.
    """

    ref: ModelRef
    depends: list[str]
    tokenizer: str


@dataclass(frozen=True)
class Item:
    """One task for one model.

    Attributes:
        name: Model of `records`.
        model: The model.
        task: Task, as the config gives it.
        folder: Copy of the folder that defines the task, relative to the run directory; None if lm-eval defines it.
        path: File of the figures, relative to the run directory; its name holds what they depend on.
    """

    name: str
    model: EvaluatedModel
    task: EvaluationTaskConfig
    folder: str | None
    path: str


def plan_items(config: Config, models: Mapping[str, EvaluatedModel]) -> list[Item]:
    """Return every task for every model, model by model so that actors rarely load another one."""
    digests = {task.path: folder_digest(task.path) for task in config.evaluation.tasks if task.path is not None}
    items = []
    for name, model in models.items():
        for task in config.evaluation.tasks:
            digest = None if task.path is None else digests[task.path]
            settings = task.model_dump(mode="json", exclude={"path"})
            depends = fingerprint([model.depends, settings, digest, config.seed, harness_version()])
            path = f"{FOLDER}/{name}/{_UNSAFE.sub('_', task.name)}-{depends[:12]}.json"
            items.append(Item(name, model, task, None if digest is None else f"{FOLDER}/include/{digest[:12]}", path))
    return items


def evaluate_items(items: Sequence[Item], config: Config, run_dir: RunDirectory) -> dict[str, int]:
    """Evaluate the items that have no file yet, and add all figures to evaluation.json under `tasks`.

    `tasks` is `{entry of the config: {task: {model: figures}}}`, where figures are those of `harness.run_task` with
    `folder`, the digest of the folder that defines the task (None: lm-eval does), and `lm_eval`, the version: two runs
    can only be compared where both are the same.

    Returns:
        Counts for the manifest.

    Raises:
        UserError: A task fails, or a model cannot be loaded.
    """
    missing = [item for item in items if not run_dir.exists(item.path)]
    for source, folder in {(item.task.path, item.folder) for item in missing}:
        if source is not None and folder is not None and not run_dir.exists(folder):
            run_dir.publish(Path(source).expanduser(), folder)
    if missing:
        _run(missing, config.seed, config.evaluation.generation.batch_rows, config.scaling, run_dir)
    figures: dict[str, Any] = {}
    num_rows = 0
    for item in items:
        of_item = run_dir.read_json(item.path)
        groups = {found["group"] for found in of_item.values()}
        origin = {"folder": item.folder and Path(item.folder).name, "lm_eval": harness_version()}
        for name, found in of_item.items():
            figures.setdefault(item.task.name, {}).setdefault(name, {})[item.name] = {**found, **origin}
            num_rows += 0 if name in groups else found["num_rows"]
    run_dir.write_json(EVALUATION, {**run_dir.read_json(EVALUATION), "tasks": figures})
    return {"num_rows": num_rows}


def _run(items: Sequence[Item], seed: int, batch_rows: int, scaling: ScalingConfig, run_dir: RunDirectory) -> None:
    (pool,) = plan_pools(scaling, [scaling.evaluation_actors], len(items))
    arguments = (run_dir, list(items), seed, batch_rows, pool.use_gpu)
    with quiet_ray_data(), stall_watch(scaling, FOLDER) as watched:
        dataset: Dataset = ray.data.from_arrow([pa.table({"item": [place]}) for place in range(len(items))])
        dataset = dataset.map_batches(watched(TaskActor), fn_constructor_args=arguments, **pool.options())
        collect(dataset, FOLDER, len(items), "tasks")


class TaskActor:
    """Evaluates one item after the other; it keeps the model of the last item loaded."""

    def __init__(self, run_dir: RunDirectory, items: list[Item], seed: int, batch_rows: int, use_gpu: bool) -> None:
        self.run_dir, self.items, self.device = run_dir, items, "cuda" if use_gpu else "cpu"
        self.seed, self.batch_rows = seed, batch_rows
        self._model: tuple[str, PreTrainedModel] | None = None

    def __call__(self, places: pa.Table) -> Iterator[pa.Table]:
        """Write the figures of each item to its file.

        Args:
            places: `item`, the place in the list of items.

        Yields:
            The same place.
        """
        for place in places["item"].to_pylist():
            item = self.items[place]
            tokenizer = load_tokenizer(str(self.run_dir.local(item.model.tokenizer)))
            folder = None if item.folder is None else self.run_dir.local(item.folder)
            found = run_task(self._load(item), tokenizer, item.task, folder, self.seed, self.batch_rows)
            self.run_dir.write_json(item.path, found)
            yield pa.table({"item": [place]})

    def _load(self, item: Item) -> PreTrainedModel:
        if self._model is None or self._model[0] != item.name:
            self._model = None  # free the old model first: two may not fit into memory
            self._model = (item.name, load_model(on_this_node(item.model.ref), self.device))
        return self._model[1]
