"""The Ray Data job in which the teacher answers every training prompt once.

    row ids -> TeacherWriter pool -> parts of answers in the run directory

Rows of similar prompt length share a batch. Several batches are a part, which one actor writes as a whole. Lengths
alone decide which rows share a batch, and each row's answer is drawn with random numbers of its own
(`answers/sampling.py`). So neither the number of actors nor an interruption changes the answers. A resumed run writes
the missing parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from ray.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl_ray.answers.decode import GenerationSettings, generate
from pocl_ray.config import GenerationConfig, ScalingConfig
from pocl_ray.data.row_store import RowStore
from pocl_ray.models.loading import load_model, load_tokenizer
from pocl_ray.models.places import ModelRef, on_this_node
from pocl_ray.ray_cluster.actor_pools import collect, plan_pools, quiet_ray_data
from pocl_ray.ray_cluster.actor_watch import stall_watch
from pocl_ray.records import ID, RESPONSE_IDS
from pocl_ray.run_directory.storage import RunDirectory

PARTS = "responses/parts"
STOPPED = "stopped"
PART_SCHEMA = pa.schema(
    [
        pa.field(ID, pa.int64(), nullable=False),
        pa.field(RESPONSE_IDS, pa.list_(pa.int32()), nullable=False),  # excludes the end-of-sequence token
        pa.field(STOPPED, pa.bool_(), nullable=False),
    ]
)

_PART = "part"
_BATCHES = "batches"
_PART_ROWS = 512
_MIN_PARTS = 16  # keeps several actors busy to the end on a small data set

Batches = list[npt.NDArray[np.int64]]
"""The row ids of each batch of a part."""


@dataclass(frozen=True)
class WritingTask:
    """The settings that the actors receive.

    Attributes:
        run_dir: Run directory; the paths below are relative to it.
        rows: Arrow file of the rows.
        tokenizer: Directory of the tokenizer.
        teacher: Model that writes the answers.
        generation: Settings of generation.
        max_tokens: Maximum tokens of prompt and answer together.
        seed: Seed of the sampling.
        parts: Directory of the parts.
        use_gpu: Whether actors run on a GPU.
    """

    run_dir: RunDirectory
    rows: str
    tokenizer: str
    teacher: ModelRef
    generation: GenerationConfig
    max_tokens: int
    seed: int
    parts: str
    use_gpu: bool = False

    def part(self, number: int) -> str:
        """Return the file of a part."""
        return f"{self.parts}/{number:06d}.parquet"


class TeacherWriter:
    """Answers the prompts of one part after another."""

    def __init__(self, task: WritingTask) -> None:
        self.task = task

    @cached_property
    def model(self) -> PreTrainedModel:
        """The teacher. It is loaded with the first part, because an error there reaches the driver unchanged."""
        return load_model(on_this_node(self.task.teacher), "cuda" if self.task.use_gpu else "cpu")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the run."""
        return load_tokenizer(str(self.task.run_dir.local(self.task.tokenizer)))

    @cached_property
    def rows(self) -> RowStore:
        """The rows, memory-mapped on this node."""
        return RowStore.open(self.task.run_dir.local(self.task.rows))

    def __call__(self, units: pa.Table) -> Iterator[pa.Table]:
        """Yield the row ids of parts after they are written.

        Args:
            units: Table with columns `part` and `batches`.

        Yields:
            The row ids of each part, once it is in the run directory.
        """
        for unit in units.to_pylist():
            part = pa.concat_tables([self.answer(np.array(ids, dtype=np.int64)) for ids in unit[_BATCHES]])
            sink = pa.BufferOutputStream()
            pq.write_table(part, sink)
            self.task.run_dir.write_bytes(self.task.part(unit[_PART]), sink.getvalue().to_pybytes())
            yield part.select([ID])

    def answer(self, ids: npt.NDArray[np.int64]) -> pa.Table:
        """Return the answers to the prompts of one batch, with the columns of `PART_SCHEMA`."""
        task, (prompts, _) = self.task, self.rows.tokens(ids)
        settings = GenerationSettings.of(task.generation, task.max_tokens, prompts)
        (answers,) = generate(self.model, self.tokenizer, prompts, settings, [task.seed], ids.tolist())
        stopped = [len(a) < limit for a, limit in zip(answers, settings.limits(len(ids)), strict=True)]
        return pa.table([pa.array(ids), answers, stopped], schema=PART_SCHEMA)


def write_answers(task: WritingTask, scaling: ScalingConfig) -> pa.Table:
    """Return the teacher's answer to the prompt of every row, generated on the running Ray cluster.

    Args:
        task: Rows, teacher and settings; `use_gpu` is filled in here.
        scaling: Number of actors and their resources.

    Returns:
        One answer for each row, by id, with the columns of `PART_SCHEMA`.

    Raises:
        UserError: The teacher cannot be loaded, or the cluster has no room for an actor.
    """
    lengths = RowStore.open(task.run_dir.local(task.rows)).prompt_lengths
    parts = plan_parts(lengths, task.generation.batch_rows)
    missing = {number: part for number, part in enumerate(parts) if not task.run_dir.exists(task.part(number))}
    if missing:
        _write(task, missing, scaling)
    tables = [pq.read_table(pa.BufferReader(task.run_dir.read_bytes(task.part(n)))) for n in range(len(parts))]
    return each_row_once(tables, len(lengths))


def _write(task: WritingTask, missing: dict[int, Batches], scaling: ScalingConfig) -> None:
    (pool,) = plan_pools(scaling, [scaling.teacher_actors], len(missing))
    task = WritingTask(**{**vars(task), "use_gpu": pool.use_gpu})
    units = [_unit(number, batches) for number, batches in missing.items()]
    num_rows = sum(len(ids) for batches in missing.values() for ids in batches)
    with quiet_ray_data(), stall_watch(scaling, "responses") as watched:
        dataset: Dataset = ray.data.from_arrow(units)
        dataset = dataset.map_batches(watched(TeacherWriter), fn_constructor_args=(task,), **pool.options())
        collect(dataset, "responses", num_rows, "rows")


def plan_parts(prompt_lengths: npt.NDArray[np.integer], batch_rows: int) -> list[Batches]:
    """Return parts of batches of rows with similar prompt length, the longest prompts first.

    Args:
        prompt_lengths: Number of tokens of each prompt, shape (num_rows,).
        batch_rows: Number of rows generated at once.
    """
    order = np.argsort(-np.asarray(prompt_lengths, dtype=np.int64), kind="stable")
    batches = [order[start : start + batch_rows] for start in range(0, len(order), batch_rows)]
    size = max(1, min(_PART_ROWS // batch_rows, -(-len(batches) // _MIN_PARTS)))
    return [batches[start : start + size] for start in range(0, len(batches), size)]


def each_row_once(parts: Sequence[pa.Table], num_rows: int) -> pa.Table:
    """Return the rows of all parts by id; a lost or repeated row would pair answers with wrong prompts."""
    table = pa.concat_tables(parts).sort_by(ID)
    ids = table[ID].to_numpy()
    if not np.array_equal(ids, np.arange(num_rows)):
        missing = np.setdiff1d(np.arange(num_rows), ids)[:5].tolist()
        raise RuntimeError(f"the teacher gave {len(ids)} answers to {num_rows} prompts; missing: {missing}")
    return table


def _unit(number: int, batches: Batches) -> pa.Table:
    ids = pa.array([[batch.tolist() for batch in batches]], pa.list_(pa.list_(pa.int64())))
    return pa.table({_PART: pa.array([number]), _BATCHES: ids})
