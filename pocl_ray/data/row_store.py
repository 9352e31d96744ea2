"""The Arrow file of prepared rows, memory-mapped, which scoring, training and evaluation read."""

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
    """Return the schema of a file of rows, with these numeric columns of the user's data."""
    fields = [pa.field(f"{COLUMN}{name}", pa.float64(), nullable=False) for name in numbers]
    return pa.schema([*ROWS_SCHEMA, *fields])


Int32Array = npt.NDArray[np.int32]
Ids = Sequence[int] | npt.NDArray[np.integer[Any]]


class _TokenLists:
    """Views of one list column: the offsets and values of each record batch, without copies."""

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
    """Prepared rows by id, read from a memory map. It is cheap to open, and to send to other processes of the node.

    Args:
        path: Arrow IPC file with the columns of `ROWS_SCHEMA`; `id` is the position of the row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        own = [name.removeprefix(COLUMN) for name in reader.schema.names[len(ROWS_SCHEMA) :]]
        if not reader.schema.equals(rows_schema(own)):
            raise DataError(
                f"{path}: is not a file of prepared rows (its columns differ); delete it to have it made again"
            )
        self.schema = reader.schema
        self._batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])

    @classmethod
    def open(cls, path: str | Path) -> RowStore:
        """Return the memory-mapped rows of a file.

        Raises:
            DataError: The file is missing, or is not a file of rows.
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
        """Return whether rows have prompts; rows of plain text have none."""
        return any(batch.column(PROMPT)[0].as_py() != "" for batch in self._batches[:1])

    @cached_property
    def prompt_lengths(self) -> Int32Array:
        """The number of tokens of each prompt, shape (rows,)."""
        return self._prompt_ids.lengths()

    @cached_property
    def response_lengths(self) -> Int32Array:
        """The number of tokens of each response, with its end-of-sequence token, shape (rows,)."""
        return self._response_ids.lengths()

    def prompts(self, ids: Ids) -> list[str]:
        """Return the texts of the prompts."""
        return self._values(PROMPT, ids)

    def references(self, ids: Ids) -> list[list[str]]:
        """Return the accepted answers of each row; training uses the first."""
        return self._values(REFERENCES, ids)

    def topics(self, ids: Ids) -> list[str | None]:
        """Return the topics; None for a row without one."""
        return self._values(TOPIC, ids)

    def source_rows(self, ids: Ids) -> list[int]:
        """Return the numbers of the rows in their source, from 1."""
        return self._values(SOURCE_ROW, ids)

    def numbers(self, name: str) -> npt.NDArray[np.float64]:
        """Return a numeric column of the user's data, shape (rows,).

        Raises:
            KeyError: The file was prepared without this column.
        """
        return np.concatenate([batch.column(f"{COLUMN}{name}").to_numpy() for batch in self._batches])

    def tokens(self, ids: Ids) -> tuple[list[Int32Array], list[Int32Array]]:
        """Return the token ids of prompts and responses, one int32 array for each row.

        The arrays are read-only views of the memory map.

        Raises:
            IndexError: No row has such an id.
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
    """Return the number of rows of `other` whose prompt (or plain text) is also in `train`, to measure leakage."""
    theirs, ours = _prompt_or_text(other), _prompt_or_text(train)
    common = pc.unique(ours.filter(pc.is_in(ours, value_set=pc.unique(theirs))))
    return int(pc.sum(pc.is_in(theirs, value_set=common)).as_py() or 0)


def _prompt_or_text(rows: RowStore) -> pa.ChunkedArray:
    """The prompt of each row, or the text for rows of plain text."""
    if rows.has_prompts:
        return pa.chunked_array([batch.column(PROMPT) for batch in rows.batches], pa.string())
    return pa.chunked_array([pc.list_element(batch.column(REFERENCES), 0) for batch in rows.batches], pa.string())


IntArray = npt.NDArray[np.integer]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Pairs:
    """The response tokens of a batch that have a counterpart in the tokens of another tokenizer.

    In each response the k-th token is paired with the k-th; the rest of the longer one has none (arXiv 2402.12030 cuts
    it). Only lengths matter, so pairs are found for a whole batch at once. Axes: R rows, N response tokens of the
    student in one flat axis, M those of the teacher, P pairs.

    Attributes:
        student_N: Mask of the student's tokens that have a counterpart.
        teacher_M: Mask of the teacher's tokens that have a counterpart; equally many.
    """

    student_N: BoolArray
    teacher_M: BoolArray

    @classmethod
    def of(cls, student_lengths_R: IntArray, teacher_lengths_R: IntArray) -> Pairs:
        """Return the pairs in responses of these lengths, at least 1, row after row."""
        shared_R = np.minimum(student_lengths_R, teacher_lengths_R)
        return cls(_first_of_each(student_lengths_R, shared_R), _first_of_each(teacher_lengths_R, shared_R))


def pairing_figures(student: RowStore, teacher: RowStore, max_prompt_tokens: int, max_tokens: int) -> dict[str, int]:
    """Return figures about the rows of a set in two tokenizers.

    Args:
        student: Rows in the student's tokens.
        teacher: Rows in the teacher's tokens.
        max_prompt_tokens: Value of `data.max_prompt_tokens`.
        max_tokens: Value of `data.max_tokens`.

    Returns:
        `num_unpaired_tokens`, the number of the student's `num_response_tokens` without a counterpart; and
        `num_full_prompts` and `num_full_rows`, the numbers of the teacher's rows that reach the limits at which they
        are cut.
    """
    ours, theirs = student.response_lengths, teacher.response_lengths
    return {
        "num_response_tokens": int(ours.sum(dtype=np.int64)),
        "num_unpaired_tokens": int(np.maximum(ours - theirs, 0).sum(dtype=np.int64)),
        "num_full_prompts": int((teacher.prompt_lengths >= max_prompt_tokens).sum()),
        "num_full_rows": int((teacher.prompt_lengths + theirs >= max_tokens).sum()),
    }


def describe_pairing(figures: dict[str, int]) -> str:
    """Return one line about the result of `pairing_figures`, with the limits that should be raised."""
    share = figures["num_unpaired_tokens"] / max(1, figures["num_response_tokens"])
    line = f"{share:.1%} of the student's response tokens have no counterpart in the teacher's"
    if figures["num_full_prompts"]:
        line += f"; {figures['num_full_prompts']} of its prompts fill data.max_prompt_tokens, where prompts are cut"
    if figures["num_full_rows"]:
        line += f"; {figures['num_full_rows']} of its rows fill data.max_tokens, where responses are cut"
    return line


def _first_of_each(lengths_R: IntArray, counts_R: IntArray) -> BoolArray:
    """The mask of the first `counts_R` tokens of each row, shape (sum of lengths,)."""
    lengths_R = lengths_R.astype(np.int64)
    starts_R = np.cumsum(lengths_R) - lengths_R
    place_N = np.arange(int(lengths_R.sum())) - np.repeat(starts_R, lengths_R)
    return place_N < np.repeat(counts_R, lengths_R)
