"""Scoring: one streaming Ray Data job that measures every row's difficulty and fills the teacher cache.

    row ids -> StudentActor pool -> TeacherActor pool -> one small row of signals for each id
                                                      -> shards of the teacher cache

Rows are sorted by length and cut into tasks and micro-batches before anything starts, by their lengths alone. Which
rows share a batch therefore does not depend on the number of actors, and neither do the results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
import torch
from ray.data import Dataset

from pocl_ray.config import DifficultyConfig, ScalingConfig
from pocl_ray.data.row_store import RowStore
from pocl_ray.difficulty.scoring_actors import IDS, SHARD, ScoringTask, StudentActor, TeacherActor
from pocl_ray.evaluation.actors import ActorPool, collect, plan_pools, quiet_ray_data
from pocl_ray.models.hidden_cache import write_index
from pocl_ray.models.places import ModelRef
from pocl_ray.records import ID, RowsSummary
from pocl_ray.storage import RunDirectory

_MIN_TASKS = 16  # so that a small data set still keeps several actors busy to the end
_MIN_TASK_ROWS = 32
_LENGTH_MULTIPLE = 8  # that `collate` rounds up to

Tasks = list[list[npt.NDArray[np.int64]]]
"""Of each task the micro-batches, of each micro-batch the row ids."""


@dataclass(frozen=True)
class CacheTarget:
    """Where the teacher cache goes, and what it belongs to.

    Attributes:
        directory: Relative to the run directory.
        dtype: Of the hidden states; `auto` is the teacher's own.
        teacher: Fingerprint of the teacher.
        rows: Fingerprint of the rows.
    """

    directory: str
    dtype: str
    teacher: str
    rows: str


def score_rows(
    run_dir: RunDirectory,
    rows: RowsSummary,
    tokenizer: str,
    teacher: ModelRef,
    student: ModelRef | None,
    difficulty: DifficultyConfig,
    scaling: ScalingConfig,
    max_tokens: int,
    seed: int,
    cache: CacheTarget | None = None,
    compare: bool = True,
) -> pa.Table:
    """Measure the difficulty of every row, on the running Ray cluster.

    Args:
        run_dir: Holds the rows; the cache is written there.
        rows: The set to score.
        tokenizer: Directory or Hub id.
        teacher: The frozen teacher.
        student: The untuned student; None runs the teacher alone, for the cache of a dev set.
        difficulty: How answers are generated, and how much is computed at once.
        scaling: Actors, and what each of them asks for.
        max_tokens: `data.max_tokens`: prompt and answer together.
        seed: Of the answers.
        cache: Where the teacher's hidden states are kept; None keeps none.
        compare: Whether `teacher_student_kl` is measured; without it no hidden states pass between actors.

    Returns:
        One row for each row of the set, sorted by `id`: `rouge_l` (0 to 100), `answer_stopped`, `ce_loss`,
        `student_confidence`, `teacher_ce_loss`, `teacher_entropy`, `teacher_student_kl` (nats a token),
        `num_prompt_tokens`, `num_response_tokens`. Without a student, what the teacher measures.

    Raises:
        ModelError: A model cannot be loaded.
        ResourceError: The cluster has no room for the actors.
    """
    store = RowStore.open(run_dir.local(rows.path))
    tasks = plan_tasks(store.prompt_lengths, store.response_lengths, difficulty.shard_rows, difficulty.batch_tokens)
    actors = [scaling.teacher_actors] if student is None else [scaling.teacher_actors, scaling.student_actors]
    pools = plan_pools(scaling, actors, len(tasks))
    task = ScoringTask(
        run_dir=run_dir,
        rows=rows.path,
        tokenizer=tokenizer,
        teacher=teacher,
        student=student,
        generation=difficulty.generation,
        max_tokens=max_tokens,
        seed=seed,
        compare=compare and student is not None,
        cache=None if cache is None else cache.directory,
        cache_dtype=None if cache is None or cache.dtype == "auto" else getattr(torch, cache.dtype),
        use_gpu=pools[0].use_gpu,
    )
    table = _run(task, tasks, pools, f"score {rows.name}", len(store))
    if cache is not None:
        directory, names = run_dir.fs_path(cache.directory), table[SHARD].unique().to_pylist()
        write_index(directory, names, cache.teacher, cache.rows, run_dir.filesystem)
    return table.drop_columns([SHARD])


def _run(task: ScoringTask, tasks: Tasks, pools: Sequence[ActorPool], name: str, num_rows: int) -> pa.Table:
    with quiet_ray_data():
        dataset: Dataset = ray.data.from_arrow([_unit_table(batches) for batches in tasks])
        if task.student is not None:
            dataset = dataset.map_batches(StudentActor, fn_constructor_args=(task,), **pools[1].options())
        dataset = dataset.map_batches(TeacherActor, fn_constructor_args=(task,), **pools[0].options())
        table = collect(dataset, name, num_rows, "rows").sort_by(ID)
    _check_complete(table, num_rows)
    return table


def plan_tasks(
    prompt_lengths: npt.NDArray[np.integer],
    response_lengths: npt.NDArray[np.integer],
    shard_rows: int,
    batch_tokens: int,
) -> Tasks:
    """Cut rows into tasks, and these into micro-batches of rows of similar length.

    Args:
        prompt_lengths: Tokens of each prompt, shape (num_rows,).
        response_lengths: Tokens of each response, shape (num_rows,).
        shard_rows: Rows of a task, at most; fewer where there would be only a few tasks.
        batch_tokens: Padded tokens of a micro-batch, at most, save for a single row that is longer.

    Returns:
        Tasks, the longest rows first, so that the last ones to finish are short: micro-batches of row ids.
    """
    lengths = np.asarray(prompt_lengths, dtype=np.int64) + response_lengths
    order = np.argsort(-lengths, kind="stable")
    task_rows = min(shard_rows, max(_MIN_TASK_ROWS, -(-len(order) // _MIN_TASKS)))
    starts = range(0, len(order), task_rows)
    return [_micro_batches(order[start : start + task_rows], lengths, batch_tokens) for start in starts]


def _micro_batches(
    ids: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], batch_tokens: int
) -> list[npt.NDArray[np.int64]]:
    """Cut rows, longest first, wherever the padded size would pass the budget."""
    batches, start = [], 0
    while start < len(ids):
        width = -(-int(lengths[ids[start]]) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        end = start + max(1, batch_tokens // width)
        batches.append(ids[start:end])
        start = end
    return batches


def _unit_table(batches: list[npt.NDArray[np.int64]]) -> pa.Table:
    return pa.table({IDS: pa.array([ids.tolist() for ids in batches], pa.list_(pa.int64()))})


def _check_complete(table: pa.Table, num_rows: int) -> None:
    """A lost or doubled row would shift the ranking of all others in silence."""
    ids = table[ID].to_numpy()
    if not np.array_equal(ids, np.arange(num_rows)):
        missing = np.setdiff1d(np.arange(num_rows), ids)
        raise RuntimeError(
            f"scoring gave {len(ids)} results for {num_rows} rows; the first rows missing: {missing[:5].tolist()}"
        )
