"""Scoring: one streaming Ray Data job that measures every row's difficulty and fills the teacher cache.

    row ids -> StudentActor pool -> TeacherActor pool -> one small row of signals for each id
                                                      -> shards of the teacher cache

The teacher also reads the dev rows in this job, for their part of the cache.

Rows are sorted by length and cut into tasks and micro-batches before anything starts, by their lengths alone. Which
rows share a batch therefore does not depend on the number of actors, and neither do the results.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from ray.data import Dataset

from pocl_ray.config import DifficultyConfig, ScalingConfig
from pocl_ray.data.row_store import RowStore
from pocl_ray.difficulty.scoring_actors import (
    ANSWER_STOPPED,
    SET,
    SHARD,
    ScoringTask,
    StudentActor,
    TeacherActor,
    unit_table,
    unscored_units,
)
from pocl_ray.difficulty.tasks import MicroBatches, plan_tasks
from pocl_ray.evaluation.actors import ActorPool, collect, plan_pools, quiet_ray_data
from pocl_ray.evaluation.stalls import stall_watch
from pocl_ray.models.hidden_cache import write_index
from pocl_ray.models.places import ModelRef
from pocl_ray.records import ID, RowsSummary
from pocl_ray.storage import RunDirectory

Task = tuple[str, MicroBatches]


def score_rows(
    rows: RowsSummary,
    dev_rows: RowsSummary,
    run_dir: RunDirectory,
    tokenizer: str,
    student: ModelRef,
    teacher: ModelRef | None,
    teacher_fingerprint: str,
    cache: str | None,
    cache_dtype: str,
    difficulty: DifficultyConfig,
    max_tokens: int,
    scaling: ScalingConfig,
    seed: int,
    compare: bool = True,
    plugins: tuple[str, ...] = (),
    top_k: int | None = None,
) -> tuple[pa.Table, dict[str, int]]:
    """Measure the difficulty of every row and fill the teacher cache, on the running Ray cluster.

    Args:
        rows: The set to score; `dev_rows` go into the teacher cache alone.
        run_dir: Holds the rows, the `tokenizer` directory and, in directory `cache`, one teacher cache a set.
        student: The untuned student; `teacher` is the frozen one (None: without its signals), with its fingerprint.
        cache_dtype: Of what it holds, see `ScoringTask`; `top_k` too.
        difficulty: How answers are generated, and how much at once; `scaling` says by how many actors.
        compare: Whether signals of both models are measured; without it no hidden states pass between actors.
        plugins: Signals that plug-ins measure, which must be installed on every node.

    Returns:
        One row for each of `rows`, by `id`: the signals and numbers of tokens. And counts for the manifest.

    Raises:
        UserError: A model cannot be loaded, or the cluster has no room for the actors.
    """
    sets = [rows, *([dev_rows] if cache else [])]
    tasks = [(made.name, batches) for made in sets for batches in _tasks_of(made, run_dir, difficulty)]
    pools = plan_pools(scaling, _actors(scaling, teacher), len(tasks))
    task = ScoringTask(
        run_dir=run_dir,
        rows={made.name: made.path for made in sets},
        student_set=rows.name,
        tokenizer=tokenizer,
        student=student,
        teacher=teacher,
        generation=difficulty.generation,
        max_tokens=max_tokens,
        seed=seed,
        compare=compare,
        plugins=plugins,
        top_k=top_k,
        cache=cache,
        cache_dtype=cache_dtype,
        use_gpu=pools[0].use_gpu,
    )
    results = _run(task, tasks, pools, sum(made.num_rows for made in sets), scaling)
    by_set = {made.name: _of_set(results, made) for made in sets}
    for made in sets if cache else ():
        _finish_cache(by_set[made.name], run_dir, f"{cache}/{made.name}", teacher_fingerprint, made)
    return (table := _signals(by_set[rows.name])), _counts(table, sets)


def _signals(results: pa.Table) -> pa.Table:
    """The results without what only says where they lie, and without columns that plain text leaves empty."""
    unanswered = ["rouge_l", ANSWER_STOPPED] if results[ANSWER_STOPPED].null_count == results.num_rows else []
    return results.drop_columns([SET, SHARD, *unanswered])


def cache_teacher(
    sets: Sequence[RowsSummary],
    run_dir: RunDirectory,
    student: ModelRef,
    teacher: ModelRef,
    teacher_fingerprint: str,
    cache: str,
    cache_dtype: str,
    top_k: int | None,
    difficulty: DifficultyConfig,
    scaling: ScalingConfig,
) -> None:
    """Fill the cache of a further teacher, which reads all sets and measures nothing.

    Args:
        sets: What it reads.
        run_dir: Holds the rows and, in directory `cache`, one teacher cache a set.
        student: Whose vocabulary the top k are cut to.
        teacher: The frozen model; `teacher_fingerprint` goes into the cache.
        cache_dtype: Of what it holds, see `ScoringTask`; `top_k` too.
        difficulty: How much is computed at once.
        scaling: Actors, and what each of them asks for.

    Raises:
        UserError: The model cannot be loaded, or the cluster has no room for the actors.
    """
    tasks = [(made.name, batches) for made in sets for batches in _tasks_of(made, run_dir, difficulty)]
    (pool,) = plan_pools(scaling, [scaling.teacher_actors], len(tasks))
    task = ScoringTask(
        run_dir=run_dir,
        rows={made.name: made.path for made in sets},
        student_set="",
        tokenizer="",
        student=student,
        teacher=teacher,
        generation=difficulty.generation,
        max_tokens=0,
        seed=0,
        compare=False,
        cache=cache,
        cache_dtype=cache_dtype,
        use_gpu=pool.use_gpu,
        top_k=top_k,
    )
    with quiet_ray_data(), stall_watch(scaling, cache) as watched:
        dataset: Dataset = ray.data.from_arrow([unscored_units(name, batches) for name, batches in tasks])
        dataset = dataset.map_batches(watched(TeacherActor), fn_constructor_args=(task,), **pool.options())
        results = collect(dataset, cache, sum(made.num_rows for made in sets), "rows")
    for made in sets:
        _finish_cache(_of_set(results, made), run_dir, f"{cache}/{made.name}", teacher_fingerprint, made)


def _actors(scaling: ScalingConfig, teacher: ModelRef | None) -> list[int]:
    return [scaling.student_actors, *([] if teacher is None else [scaling.teacher_actors])]


def _finish_cache(results: pa.Table, run_dir: RunDirectory, rel: str, teacher: str, made: RowsSummary) -> None:
    shards = results[SHARD].unique().to_pylist()
    write_index(run_dir.fs_path(rel), shards, teacher, made.fingerprint, run_dir.filesystem)


def _run(
    task: ScoringTask, tasks: Sequence[Task], pools: Sequence[ActorPool], num_rows: int, scaling: ScalingConfig
) -> pa.Table:
    with quiet_ray_data(), stall_watch(scaling, "scores") as watched:
        dataset: Dataset = ray.data.from_arrow([unit_table(name, batches) for name, batches in tasks])
        dataset = dataset.map_batches(watched(StudentActor), fn_constructor_args=(task,), **pools[0].options())
        if task.teacher is not None:
            dataset = dataset.map_batches(watched(TeacherActor), fn_constructor_args=(task,), **pools[1].options())
        return collect(dataset, "scores", num_rows, "rows")


def _tasks_of(rows: RowsSummary, run_dir: RunDirectory, difficulty: DifficultyConfig) -> list[MicroBatches]:
    store = RowStore.open(run_dir.local(rows.path))
    return plan_tasks(store.prompt_lengths, store.response_lengths, difficulty.shard_rows, difficulty.batch_tokens)


def _of_set(results: pa.Table, rows: RowsSummary) -> pa.Table:
    """The results of one set by id, each row exactly once: a lost one would shift the rank of all others in silence."""
    table = results.filter(pc.field(SET) == rows.name).sort_by(ID)
    ids = table[ID].to_numpy()
    if not np.array_equal(ids, np.arange(rows.num_rows)):
        missing = np.setdiff1d(np.arange(rows.num_rows), ids)[:5].tolist()
        raise RuntimeError(
            f"scoring gave {len(ids)} results for {rows.num_rows} rows of {rows.name}; missing: {missing}"
        )
    return table


def _counts(table: pa.Table, sets: Sequence[RowsSummary]) -> dict[str, int]:
    counts = {
        "num_rows": sum(made.num_rows for made in sets),
        "num_tokens": sum(made.num_prompt_tokens + made.num_response_tokens for made in sets),
    }
    if ANSWER_STOPPED in table.column_names:
        counts["num_unstopped_answers"] = table.num_rows - int(pc.sum(table[ANSWER_STOPPED]).as_py())
    return counts
