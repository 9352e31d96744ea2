"""Scoring: one streaming Ray Data job that measures the difficulty of every row and fills the teacher cache.

    row ids -> StudentActor pool -> TeacherActor pool -> one small row of signals for each id
                                                      -> shards of the teacher cache

The teacher also reads the dev rows in this job, for their part of the cache.

Rows are sorted by length and cut into tasks and micro-batches before anything starts. Lengths alone decide which rows
share a batch, so the results do not depend on the number of actors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from ray.data import Dataset

from pocl_ray.config import DifficultyConfig, ScalingConfig
from pocl_ray.data.row_store import RowStore
from pocl_ray.difficulty.actors import ScoringTask, StudentActor, TeacherActor
from pocl_ray.difficulty.tasks import (
    ANSWER_STOPPED,
    SET,
    SHARD,
    MicroBatches,
    plan_tasks,
    unit_table,
    unscored_units,
)
from pocl_ray.models.places import ModelRef
from pocl_ray.ray_cluster.actor_pools import ActorPool, Work, plan_pools, quiet_ray_data, stream
from pocl_ray.ray_cluster.actor_watch import stall_watch
from pocl_ray.records import ID, NUM_PROMPT_TOKENS, NUM_RESPONSE_TOKENS, RowsSummary
from pocl_ray.run_directory.storage import RunDirectory
from pocl_ray.teacher_cache.writer import write_index


class Results:
    """The results of one set, by id, gathered on the driver as they arrive.

    A million rows with nine signals take 72 MB here. Tables that are kept until the end, and then cut by set and
    sorted, would take several times as much, in as many objects as there are micro-batches.

    Attributes:
        rows: Summary of the set.
        num_results: Number of results that have arrived.
        shards: Shards of the teacher cache that hold the set.
    """

    def __init__(self, rows: RowsSummary, keeps_signals: bool = True) -> None:
        """Start empty; `keeps_signals` is False for a set of which only the shards are needed."""
        self.rows, self.num_results = rows, 0
        self.shards: set[str] = set()
        self._keeps_signals = keeps_signals
        self._has_come = np.zeros(rows.num_rows, dtype=bool)
        self._columns: dict[str, np.ndarray[Any, Any]] = {}
        self._types: dict[str, pa.DataType] = {}

    def add(self, table: pa.Table) -> None:
        """Add rows of the set in any order: `id`, `shard`, and numeric columns in which all values or none are null."""
        ids = table[ID].to_numpy()
        self._has_come[ids] = True
        self.num_results += len(ids)
        self.shards.update(table[SHARD].unique().drop_null().to_pylist())
        if self._keeps_signals:
            for name in table.column_names:
                if name not in (ID, SET, SHARD):
                    self._fill(name, ids, table[name])

    def _fill(self, name: str, ids: np.ndarray[Any, Any], values: pa.ChunkedArray) -> None:
        self._types.setdefault(name, values.type)
        assert values.null_count in (0, len(values)), f"{name} is measured for some rows only"
        if values.null_count == 0:
            if name not in self._columns:
                self._columns[name] = np.zeros(self.rows.num_rows, values.type.to_pandas_dtype())
            self._columns[name][ids] = values.to_numpy()

    def check(self) -> None:
        """Check that each row arrived exactly once: a lost row would silently shift the rank of all others."""
        num_rows = self.rows.num_rows
        if self.num_results != num_rows or not self._has_come.all():
            missing = np.flatnonzero(~self._has_come)[:5].tolist()
            raise RuntimeError(
                f"scoring gave {self.num_results} results for {num_rows} rows of {self.rows.name}; missing: {missing}"
            )

    def table(self) -> pa.Table:
        """Return one row for each row of the set, ordered by id; the table shares memory with the gathered results."""
        self.check()
        columns = {ID: pa.array(np.arange(self.rows.num_rows))}
        for name, kind in self._types.items():
            values = self._columns.get(name)
            columns[name] = pa.nulls(self.rows.num_rows, kind) if values is None else pa.array(values)
        return pa.table(columns)


def gather(tables: Iterable[pa.Table], results: dict[str, Results]) -> None:
    """Add tables of results to their sets, by column `set`, and check that each set is complete."""
    for table in tables:
        for name in table[SET].unique().to_pylist():
            results[name].add(table.filter(pc.field(SET) == name))
    for made in results.values():
        made.check()


Task = tuple[str, MicroBatches]


@dataclass(frozen=True)
class CacheTask:
    """The teacher cache that a pass of a teacher fills, one directory for each set.

    Attributes:
        folder: Directory of the cache, relative to the run directory.
        dtype: Dtype of its values; `auto` is the teacher's dtype, except float16 for the top k of a bfloat16 teacher.
        top_k: Number of tokens that it keeps for each response token; None for hidden states.
        fingerprint: Fingerprint of the teacher, by which a training run knows its cache.
    """

    folder: str
    dtype: str
    top_k: int | None
    fingerprint: str


@dataclass(frozen=True)
class ScoringInputs:
    """The inputs of a scoring pass: models, rows and settings.

    Attributes:
        rows: Set to score.
        dev_rows: Rows that go into the teacher cache alone.
        run_dir: Run directory, with the rows, the tokenizer and the teacher cache.
        tokenizer: Directory of the tokenizer.
        student: Untuned student.
        teacher: Frozen teacher; None if no signal of the teacher is needed.
        cache: Teacher cache to fill; None: nothing is cached.
        difficulty: Settings of generation, and numbers of rows and tokens that are computed at once.
        max_tokens: Maximum tokens of prompt and answer together.
        seed: Seed of the sampling of answers.
        compare: Whether student and teacher are compared token by token; False with two tokenizers.
        plugins: Names of signals that plug-ins measure.
        teacher_rows: Mapping of each set to the same rows in the teacher's tokens; empty if both models share a
            tokenizer.
        answers: Whether the student answers the prompts, for `rouge_l`.
        reads_student: Whether the student reads the responses.
    """

    rows: RowsSummary
    dev_rows: RowsSummary
    run_dir: RunDirectory
    tokenizer: str
    student: ModelRef
    teacher: ModelRef | None
    cache: CacheTask | None
    difficulty: DifficultyConfig
    max_tokens: int
    seed: int
    compare: bool = True
    plugins: tuple[str, ...] = ()
    teacher_rows: Mapping[str, RowsSummary] = field(default_factory=dict)
    answers: bool = True
    reads_student: bool = True

    @property
    def asks_student(self) -> bool:
        """Whether the student does anything."""
        return self.answers or self.reads_student

    @property
    def sets(self) -> list[RowsSummary]:
        """The sets that are read: without a cache, nobody needs the dev rows."""
        return [self.rows, self.dev_rows] if self.cache else [self.rows]

    def task(self, use_gpu: bool) -> ScoringTask:
        """Return the settings of the actors."""
        cache = self.cache
        return ScoringTask(
            run_dir=self.run_dir,
            rows={made.name: made.path for made in self.sets},
            student_set=self.rows.name,
            tokenizer=self.tokenizer,
            student=self.student,
            teacher=self.teacher,
            generation=self.difficulty.generation,
            max_tokens=self.max_tokens,
            seed=self.seed,
            compare=self.compare,
            plugins=self.plugins,
            top_k=cache.top_k if cache else None,
            cache=cache.folder if cache else None,
            cache_dtype=cache.dtype if cache else "auto",
            use_gpu=use_gpu,
            teacher_rows={name: made.path for name, made in self.teacher_rows.items()},
            batch_tokens=self.difficulty.batch_tokens,
            answers=self.answers,
            reads_student=self.reads_student,
        )


def score_rows(inputs: ScoringInputs, scaling: ScalingConfig) -> tuple[pa.Table, dict[str, int]]:
    """Measure the difficulty of every row and fill the teacher cache, on the running Ray cluster.

    Args:
        inputs: Models, rows and settings of the scoring.
        scaling: Number of actors and their resources.

    Returns:
        A table with one row for each of `rows`, by `id`, that holds the signals and numbers of tokens; and counts for
        the manifest.

    Raises:
        UserError: A model cannot be loaded, or the cluster has no room for the actors.
    """
    sets, run_dir = inputs.sets, inputs.run_dir
    tasks = [(made.name, batches) for made in sets for batches in _tasks_of(made, run_dir, inputs.difficulty)]
    if inputs.teacher is None and not inputs.asks_student:
        table = _lengths(inputs.rows, run_dir)
        return table, _counts(table, sets)
    pools = plan_pools(scaling, _actors(scaling, inputs), len(tasks))
    results = _run(inputs.task(pools[0].use_gpu), tasks, pools, sets, scaling)
    if inputs.cache:
        # After all tasks: a cache without its index is not finished, and an interrupted job leaves none.
        _finish_caches(results, run_dir, inputs.cache, [inputs.teacher_rows.get(made.name, made) for made in sets])
    table = _signals(results[inputs.rows.name].table())
    return table, _counts(table, sets)


def _signals(results: pa.Table) -> pa.Table:
    """The results without the columns that were not measured."""
    return results.drop_columns([name for name in results.column_names if results[name].null_count == results.num_rows])


def cache_teacher(
    sets: Sequence[RowsSummary],
    run_dir: RunDirectory,
    student: ModelRef,
    teacher: ModelRef,
    cache: CacheTask,
    difficulty: DifficultyConfig,
    scaling: ScalingConfig,
) -> None:
    """Fill the cache of a further teacher, which reads all sets and measures no signal.

    Args:
        sets: Sets that the teacher reads.
        run_dir: Run directory, which holds the rows and the cache.
        student: Student, whose vocabulary the top k are cut to.
        teacher: Frozen teacher.
        cache: Cache to fill.
        difficulty: Sizes of tasks and micro-batches.
        scaling: Number of actors and their resources.

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
        cache=cache.folder,
        cache_dtype=cache.dtype,
        use_gpu=pool.use_gpu,
        top_k=cache.top_k,
    )
    results = {made.name: Results(made, keeps_signals=False) for made in sets}
    with quiet_ray_data(), stall_watch(scaling, cache.folder) as watched:
        dataset: Dataset = ray.data.from_blocks([unscored_units(name, batches) for name, batches in tasks])
        dataset = dataset.map_batches(watched(TeacherActor), fn_constructor_args=(task,), **pool.options())
        work = Work(_num_rows(results), "rows", watched.num_done)
        gather(stream(dataset, cache.folder, work.total, "rows", work), results)
    _finish_caches(results, run_dir, cache, sets)


def _actors(scaling: ScalingConfig, inputs: ScoringInputs) -> list[int]:
    """The numbers of actors of the student and of the teacher; a model that is not asked has none."""
    student = [scaling.student_actors] if inputs.asks_student else []
    return [*student, *([] if inputs.teacher is None else [scaling.teacher_actors])]


def _lengths(rows: RowsSummary, run_dir: RunDirectory) -> pa.Table:
    """The results of a scoring that asks no model: the lengths of the rows."""
    store, ids = RowStore.open(run_dir.local(rows.path)), np.arange(rows.num_rows)
    lengths = store.prompt_lengths.astype(np.int64), store.response_lengths.astype(np.int64)
    return pa.table({ID: ids, NUM_PROMPT_TOKENS: lengths[0], NUM_RESPONSE_TOKENS: lengths[1]})


def _finish_caches(
    results: Mapping[str, Results], run_dir: RunDirectory, cache: CacheTask, sets: Sequence[RowsSummary]
) -> None:
    """Write the index of each set's cache; `sets` are in the teacher's tokens."""
    for made in sets:
        shards = results[made.name].shards
        folder = run_dir.fs_path(f"{cache.folder}/{made.name}")
        write_index(folder, shards, cache.fingerprint, made.fingerprint, run_dir.filesystem)


def _run(
    task: ScoringTask,
    tasks: Sequence[Task],
    pools: Sequence[ActorPool],
    sets: Sequence[RowsSummary],
    scaling: ScalingConfig,
) -> dict[str, Results]:
    results = {made.name: Results(made, keeps_signals=made.name == task.student_set) for made in sets}
    with quiet_ray_data(), stall_watch(scaling, "scores") as watched:
        # `from_arrow` would ask for the size of every block by a remote task.
        asks_student = task.answers or task.reads_student
        blocks = unit_table if asks_student else unscored_units
        dataset: Dataset = ray.data.from_blocks([blocks(name, batches) for name, batches in tasks])
        if asks_student:
            dataset = dataset.map_batches(watched(StudentActor), fn_constructor_args=(task,), **pools[0].options())
        if task.teacher is not None:
            dataset = dataset.map_batches(watched(TeacherActor), fn_constructor_args=(task,), **pools[-1].options())
        work = Work(num_passes(task, sets), "passes", watched.num_done)
        gather(stream(dataset, "scores", _num_rows(results), "rows", work), results)
    return results


def num_passes(task: ScoringTask, sets: Sequence[RowsSummary]) -> int:
    """Return how often a model goes over a row in a job: an answer is a pass, and so is each reading."""
    of_student = int(task.answers) + int(task.reads_student)
    student = sum(of_student * made.num_rows for made in sets if made.name == task.student_set)
    return student + (0 if task.teacher is None else sum(made.num_rows for made in sets))


def _num_rows(results: dict[str, Results]) -> int:
    return sum(each.rows.num_rows for each in results.values())


def _tasks_of(rows: RowsSummary, run_dir: RunDirectory, difficulty: DifficultyConfig) -> list[MicroBatches]:
    store = RowStore.open(run_dir.local(rows.path))
    return plan_tasks(store.prompt_lengths, store.response_lengths, difficulty.shard_rows, difficulty.batch_tokens)


def _counts(table: pa.Table, sets: Sequence[RowsSummary]) -> dict[str, int]:
    counts = {
        "num_rows": sum(made.num_rows for made in sets),
        "num_tokens": sum(made.num_prompt_tokens + made.num_response_tokens for made in sets),
    }
    if ANSWER_STOPPED in table.column_names:
        counts["num_unstopped_answers"] = table.num_rows - int(pc.sum(table[ANSWER_STOPPED]).as_py())
    return counts
