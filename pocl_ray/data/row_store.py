"""The Arrow file of prepared rows, memory-mapped: what scoring, training and evaluation read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pocl_ray.data.readers import first_line
from pocl_ray.errors import DataError
from pocl_ray.records import COLUMN, ID, PROMPT, PROMPT_IDS, REFERENCES, RESPONSE_IDS, SOURCE_ROW, TOPIC

ROWS_SCHEMA = pa.schema(
    [
        pa.field(ID, pa.int64(), nullable=False),
        pa.field(SOURCE_ROW, pa.int64(), nullable=False),
        pa.field(TOPIC, pa.string()),
        pa.field(PROMPT, pa.string(), nullable=False),
        pa.field(REFERENCES, pa.list_(pa.string()), nullable=False),
        pa.field(PROMPT_IDS, pa.list_(pa.int32()), nullable=False),
        pa.field(RESPONSE_IDS, pa.list_(pa.int32()), nullable=False),
    ]
)


def rows_schema(numbers: Sequence[str] = ()) -> pa.Schema:
    """Return the schema of a file of rows with these numeric columns of the user's."""
    fields = [pa.field(f"{COLUMN}{name}", pa.float64(), nullable=False) for name in numbers]
    return pa.schema([*ROWS_SCHEMA, *fields])


Int32Array = npt.NDArray[np.int32]
Ids = Sequence[int] | npt.NDArray[np.integer[Any]]


class _TokenLists:
    """Views of one list column: per record batch the offsets and the values, without copying."""

    def __init__(self, batches: Sequence[pa.RecordBatch], column: str) -> None:
        arrays = [batch.column(column) for batch in batches]
        self._offsets = [array.offsets.to_numpy() for array in arrays]
        self._values = [array.values.to_numpy() for array in arrays]

    def row(self, batch: int, position: int) -> Int32Array:
        offsets = self._offsets[batch]
        return self._values[batch][offsets[position] : offsets[position + 1]]

    def lengths(self) -> Int32Array:
        return np.concatenate([np.diff(offsets) for offsets in self._offsets]).astype(np.int32, copy=False)


class RowStore:
    """Prepared rows by id, read from a memory map. Cheap to open, and to send to other processes of the node.

    Args:
        path: Arrow IPC file with the columns of `ROWS_SCHEMA`; `id` is the position.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        own = [name.removeprefix(COLUMN) for name in reader.schema.names[len(ROWS_SCHEMA) :]]
        if not reader.schema.equals(rows_schema(own)):
            raise DataError(f"{path}: is not a file of prepared rows (its columns differ); delete it to make it anew")
        self.schema = reader.schema
        self._batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])

    @classmethod
    def open(cls, path: str | Path) -> RowStore:
        """Map a file of rows.

        Raises:
            DataError: It is missing, or no file of rows.
        """
        try:
            return cls(Path(path))
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{path}: cannot be opened as prepared rows ({first_line(error)})") from None

    def __reduce__(self) -> tuple[Callable[[Path], RowStore], tuple[Path]]:
        return RowStore, (self.path,)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def batches(self) -> list[pa.RecordBatch]:
        """The record batches of the file, in order of id."""
        return self._batches

    @cached_property
    def has_prompts(self) -> bool:
        """Whether rows ask for something; those of plain text do not."""
        return any(batch.column(PROMPT)[0].as_py() != "" for batch in self._batches[:1])

    @cached_property
    def prompt_lengths(self) -> Int32Array:
        """Tokens of each prompt, shape (rows,)."""
        return self._prompt_ids.lengths()

    @cached_property
    def response_lengths(self) -> Int32Array:
        """Tokens of each response with its end-of-sequence token, shape (rows,)."""
        return self._response_ids.lengths()

    def prompts(self, ids: Ids) -> list[str]:
        """Return the texts of prompts."""
        return self._values(PROMPT, ids)

    def references(self, ids: Ids) -> list[list[str]]:
        """Return the accepted answers of each row; the first is the one trained on."""
        return self._values(REFERENCES, ids)

    def topics(self, ids: Ids) -> list[str | None]:
        """Return the topics; None where the source names none."""
        return self._values(TOPIC, ids)

    def source_rows(self, ids: Ids) -> list[int]:
        """Return the numbers of the rows in their source, from 1."""
        return self._values(SOURCE_ROW, ids)

    def numbers(self, name: str) -> npt.NDArray[np.float64]:
        """Return a numeric column of the user's, shape (rows,).

        Raises:
            KeyError: The file was prepared without it.
        """
        return np.concatenate([batch.column(f"{COLUMN}{name}").to_numpy() for batch in self._batches])

    def tokens(self, ids: Ids) -> tuple[list[Int32Array], list[Int32Array]]:
        """Return token ids of prompts and responses, one int32 array a row.

        The arrays are read-only views of the memory map.

        Raises:
            IndexError: An id is not that of a row.
        """
        places = self._places(ids)
        prompt, response = self._prompt_ids, self._response_ids
        return [prompt.row(*place) for place in places], [response.row(*place) for place in places]

    @cached_property
    def _prompt_ids(self) -> _TokenLists:
        return _TokenLists(self._batches, PROMPT_IDS)

    @cached_property
    def _response_ids(self) -> _TokenLists:
        return _TokenLists(self._batches, RESPONSE_IDS)

    def _places(self, ids: Ids) -> list[tuple[int, int]]:
        """Return (record batch, position in it) of each id."""
        wanted = np.asarray(ids, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"row ids go from 0 to {len(self) - 1}, asked for {wanted.min()} to {wanted.max()}")
        batch = np.searchsorted(self._starts, wanted, side="right") - 1
        return list(zip(batch.tolist(), (wanted - self._starts[batch]).tolist(), strict=True))

    def _values(self, column: str, ids: Ids) -> list[Any]:
        return [self._batches[batch].column(column)[position].as_py() for batch, position in self._places(ids)]


def shared_prompts(train: RowStore, other: RowStore) -> int:
    """Count the rows of `other` whose prompt, or text without one, also stands in `train`; a measure of leakage."""
    theirs, ours = _what_is_asked(other), _what_is_asked(train)
    common = pc.unique(ours.filter(pc.is_in(ours, value_set=pc.unique(theirs))))
    return int(pc.sum(pc.is_in(theirs, value_set=common)).as_py() or 0)


def _what_is_asked(rows: RowStore) -> pa.ChunkedArray:
    """The prompt of each row; of plain text, which has none, the text."""
    if rows.has_prompts:
        return pa.chunked_array([batch.column(PROMPT) for batch in rows.batches], pa.string())
    return pa.chunked_array([pc.list_element(batch.column(REFERENCES), 0) for batch in rows.batches], pa.string())


# Which response tokens of two tokenizers belong together: of each response the k-th with the k-th.
#
# The longer one's rest has no counterpart (arXiv 2402.12030 cuts it). Only lengths count, so pairs are found for a
# whole batch at once.
#
# Axes: R rows, N response tokens of the student in one flat axis, M those of the teacher, P pairs.

IntArray = npt.NDArray[np.integer]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Pairs:
    """The tokens of a batch that have a counterpart; the p-th of one model belongs to the p-th of the other.

    Attributes:
        student_N: Which of the student's tokens.
        teacher_M: Which of the teacher's tokens; equally many.
    """

    student_N: BoolArray
    teacher_M: BoolArray

    @classmethod
    def of(cls, student_lengths_R: IntArray, teacher_lengths_R: IntArray) -> Pairs:
        """Pair the tokens of responses of these lengths, at least 1, row after row."""
        shared_R = np.minimum(student_lengths_R, teacher_lengths_R)
        return cls(_first_of_each(student_lengths_R, shared_R), _first_of_each(teacher_lengths_R, shared_R))


def pairing_figures(student: RowStore, teacher: RowStore, max_prompt_tokens: int, max_tokens: int) -> dict[str, int]:
    """Return what becomes of a set in two tokenizers.

    Args:
        student: Its rows in the student's tokens.
        teacher: And in the teacher's.
        max_prompt_tokens: `data.max_prompt_tokens`.
        max_tokens: `data.max_tokens`.

    Returns:
        `num_unpaired_tokens`, the student's response tokens without a counterpart, of `num_response_tokens`; and of the
        teacher's rows `num_full_prompts` and `num_full_rows`, which reach the limits at which they are cut.
    """
    ours, theirs = student.response_lengths, teacher.response_lengths
    return {
        "num_response_tokens": int(ours.sum(dtype=np.int64)),
        "num_unpaired_tokens": int(np.maximum(ours - theirs, 0).sum(dtype=np.int64)),
        "num_full_prompts": int((teacher.prompt_lengths >= max_prompt_tokens).sum()),
        "num_full_rows": int((teacher.prompt_lengths + theirs >= max_tokens).sum()),
    }


def describe_pairing(figures: dict[str, int]) -> str:
    """Return one line on what `pairing_figures` found, with the limits that are worth raising."""
    share = figures["num_unpaired_tokens"] / max(1, figures["num_response_tokens"])
    line = f"{share:.1%} of the student's response tokens have no counterpart in the teacher's"
    if figures["num_full_prompts"]:
        line += f"; {figures['num_full_prompts']} of its prompts fill data.max_prompt_tokens, where prompts are cut"
    if figures["num_full_rows"]:
        line += f"; {figures['num_full_rows']} of its rows fill data.max_tokens, where responses are cut"
    return line


def _first_of_each(lengths_R: IntArray, counts_R: IntArray) -> BoolArray:
    """Mark the first `counts_R` tokens of each row, shape (sum of lengths,)."""
    lengths_R = lengths_R.astype(np.int64)
    starts_R = np.cumsum(lengths_R) - lengths_R
    place_N = np.arange(int(lengths_R.sum())) - np.repeat(starts_R, lengths_R)
    return place_N < np.repeat(counts_R, lengths_R)
