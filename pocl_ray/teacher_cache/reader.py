"""The reader of the teacher cache: rows by id from memory-mapped shards, with one copy of each byte.

The format and the writer are in `writer.py`, the records of a top-k cache in `top_k.py`.

Legend: N tokens of several rows in one flat axis, R bytes of a token's record.
"""

from __future__ import annotations

import json
import mmap
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pocl_ray.errors import StorageError
from pocl_ray.models.heads import HeadSample, HeadWeights
from pocl_ray.teacher_cache.layout import Layout
from pocl_ray.teacher_cache.top_k import TopK
from pocl_ray.teacher_cache.writer import (
    DTYPES,
    FORMAT_VERSION,
    INDEX_NAME,
    META_NAME,
    SAMPLE,
    CacheMeta,
    ShardInfo,
    listed,
)

_MAX_OPEN_SHARDS = 256  # each holds a file descriptor
_MAX_SAMPLES = 4  # shards whose sample the head is held against


@dataclass(frozen=True)
class _Shard:
    """A mapped shard: its tokens as rows of bytes, and the first token of each row."""

    mapping: mmap.mmap
    bytes_NR: np.ndarray
    offset: int


class TeacherCache:
    """A finished teacher cache in a local directory; safe to use from several threads.

    Attributes:
        meta: Content of meta.json.
        directory: Directory of the cache.
    """

    kind: ClassVar[Literal["hidden", "topk"]]

    def __init__(self, directory: Path, meta: CacheMeta, index: pa.RecordBatch) -> None:
        self.meta = meta
        self.directory = directory
        self._ids = index.column("id").to_numpy()
        self._shard_of = index.column("shard").to_numpy()
        self._first_token = index.column("first_token").to_numpy()
        self._num_tokens = index.column("num_tokens").to_numpy()
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls, directory: str | Path, expect_teacher: str, expect_rows: str, expect_num_rows: int | None = None
    ) -> Self:
        """Return the cache of a directory, after a check that it belongs to this teacher and these rows.

        The sizes of all shards are checked. Their content is mapped when it is first needed.

        Args:
            directory: Local directory.
            expect_teacher: Fingerprint of the teacher.
            expect_rows: Fingerprint of the rows.
            expect_num_rows: Expected number of rows, if known.

        Raises:
            StorageError: The cache is not finished; it is of another kind, teacher, set of rows or version of the
                format; or a shard is missing or cut short.
        """
        directory = Path(directory)
        meta = _read_meta(directory)
        remedy = "score again"
        if meta.layout.kind != cls.kind:
            raise StorageError(
                f"{directory}: this teacher cache holds {meta.layout}, "
                f"and distill.teacher_cache is {cls.kind}; {remedy}"
            )
        if meta.teacher != expect_teacher:
            raise StorageError(f"{directory}: this teacher cache was made by another teacher; {remedy}")
        if meta.rows != expect_rows:
            raise StorageError(f"{directory}: this teacher cache belongs to other rows; {remedy}")
        if expect_num_rows is not None and meta.num_rows != expect_num_rows:
            found = f"holds {meta.num_rows} rows, expected {expect_num_rows}"
            raise StorageError(f"{directory}: this teacher cache {found}; {remedy}")
        for shard in meta.shards:
            path = directory / shard.name
            if not path.is_file():
                raise StorageError(f"{path}: this shard of the teacher cache is missing; {remedy}")
            size = path.stat().st_size
            if size != shard.num_bytes:
                raise StorageError(f"{path}: this shard has {size} bytes, expected {shard.num_bytes}; {remedy}")
        return cls(directory, meta, _read_index(directory, meta))

    def num_tokens(self, ids: np.ndarray) -> np.ndarray:
        """Return the number of response tokens of each row, shape (R,).

        Raises:
            StorageError: The cache does not hold an id.
        """
        return self._num_tokens[self._find(ids)]

    def records(self, ids: np.ndarray, out_NR: np.ndarray | None = None) -> np.ndarray:
        """Return the records of rows, one after the other in the order of `ids`.

        Args:
            ids: Row ids in any order; an id may be repeated.
            out_NR: Array of uint8 that receives the records; a new array by default.

        Returns:
            Array of uint8, shape (N, R), where N is the sum of `num_tokens(ids)`.

        Raises:
            StorageError: The cache does not hold an id, or a shard cannot be read.
        """
        places = self._find(ids)
        shape = (int(self._num_tokens[places].sum()), self.meta.layout.row_bytes)
        filled_NR = np.empty(shape, np.uint8) if out_NR is None else out_NR
        assert filled_NR.shape == shape
        filled = 0
        for number, first, length in self._runs(places):
            filled_NR[filled : filled + length] = self._shard(number).bytes_NR[first : first + length]
            filled += length
        return filled_NR

    def _check_finite(self, ids: np.ndarray, is_finite_N: Tensor) -> None:
        """Refuse rows of which some token's record is not finite; a loss would be NaN for the whole batch."""
        if bool(is_finite_N.all()):
            return
        row_N = np.repeat(ids, self.num_tokens(ids))
        bad = sorted({int(row) for row in row_N[~is_finite_N.numpy()]})
        raise StorageError(
            f"{self.directory}: the teacher's outputs for {listed(bad)} (counted from 0) are not finite; set "
            "teacher.dtype and distill.cache_dtype to bfloat16 or float32, delete this directory, and score again"
        )

    def _find(self, ids: np.ndarray) -> np.ndarray:
        wanted = np.asarray(ids, dtype=np.int64)
        places = np.minimum(np.searchsorted(self._ids, wanted), len(self._ids) - 1)
        missing = wanted[self._ids[places] != wanted]
        if len(missing):
            raise StorageError(f"{self.directory}: the teacher cache has no row {missing[0]}; score again")
        return places

    def _runs(self, places: np.ndarray) -> Iterator[tuple[int, int, int]]:
        """Yield (shard, first token, number of tokens); consecutive rows of a shard are combined."""
        if not len(places):
            return
        shard, first, length = self._shard_of[places], self._first_token[places], self._num_tokens[places]
        breaks = (shard[1:] != shard[:-1]) | (first[1:] != first[:-1] + length[:-1])
        starts = np.concatenate([[0], np.flatnonzero(breaks) + 1])
        totals = np.add.reduceat(length.astype(np.int64), starts)
        yield from zip(shard[starts].tolist(), first[starts].tolist(), totals.tolist(), strict=True)

    def _shard(self, number: int) -> _Shard:
        with self._lock:
            if number not in self._open:
                if len(self._open) >= _MAX_OPEN_SHARDS:
                    self._open.popitem(last=False)  # it is unmapped when the last view of it is gone
                self._open[number] = _map_shard(self.directory, self.meta, self.meta.shards[number])
            self._open.move_to_end(number)
            return self._open[number]


def _map_shard(directory: Path, meta: CacheMeta, info: ShardInfo) -> _Shard:
    path = directory / info.name
    try:
        with path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        whole = pa.py_buffer(mapping)
        batch = pa.ipc.open_file(whole).get_batch(0)
    except (OSError, ValueError, pa.ArrowInvalid) as error:
        raise StorageError(f"{path}: this shard of the teacher cache cannot be read ({error}); score again") from None
    row_bytes = meta.layout.row_bytes
    data = batch.column("tokens").buffers()[2]
    num_bytes = info.num_tokens * row_bytes
    if data.size < num_bytes:
        raise StorageError(f"{path}: this shard of the teacher cache is cut short; score again")
    bytes_NR = np.frombuffer(data, dtype=np.uint8, count=num_bytes).reshape(info.num_tokens, row_bytes)
    return _Shard(mapping, bytes_NR, data.address - whole.address)


def _read_meta(directory: Path) -> CacheMeta:
    path = directory / META_NAME
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StorageError(f"{directory}: holds no finished teacher cache (no {META_NAME}); score again") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise StorageError(f"{path}: cannot be read ({error}); score again") from None
    version = fields.get("version") if isinstance(fields, dict) else None
    if version != FORMAT_VERSION:
        raise StorageError(f"{path}: teacher cache of format {version}, expected {FORMAT_VERSION}; score again")
    try:
        shards = tuple(ShardInfo(**shard) for shard in fields.pop("shards"))
        return CacheMeta(shards=shards, layout=Layout(**fields.pop("layout")), **fields)
    except (KeyError, TypeError) as error:
        raise StorageError(f"{path}: is damaged ({error}); score again") from None


def _read_index(directory: Path, meta: CacheMeta) -> pa.RecordBatch:
    path = directory / INDEX_NAME
    try:
        with pa.memory_map(str(path)) as file:
            index = pa.ipc.open_file(file).get_batch(0)
    except (OSError, pa.ArrowInvalid) as error:
        raise StorageError(f"{path}: the index of the teacher cache cannot be read ({error}); score again") from None
    if index.num_rows != meta.num_rows:
        raise StorageError(f"{path}: has {index.num_rows} rows, expected {meta.num_rows}; score again")
    return index


class HiddenCache(TeacherCache):
    """A finished cache of the teacher's final hidden states, from which its LM head computes the distribution again.

    K is the teacher's hidden size.
    """

    kind: ClassVar[Literal["hidden", "topk"]] = "hidden"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the hidden states."""
        return DTYPES[self.meta.layout.dtype]

    def take(self, ids: np.ndarray) -> Tensor:
        """Return the hidden states of rows, one after the other in the order of `ids`.

        Args:
            ids: Row ids in any order; an id may be repeated.

        Returns:
            hidden_NK, where N is the sum of `num_tokens(ids)`.

        Raises:
            StorageError: The cache does not hold an id, a shard cannot be read, or a hidden state is not finite.
        """
        shape = (int(self.num_tokens(ids).sum()), self.meta.layout.width)
        hidden_NK = torch.empty(shape, dtype=self.dtype)
        self.records(ids, hidden_NK.view(torch.uint8).numpy())
        self._check_finite(ids, torch.isfinite(hidden_NK).all(dim=1))
        return hidden_NK

    def check_head(self, head: HeadWeights, place: str) -> None:
        """Compare the head that training uses with the logits of the model that filled the cache.

        The files of a model and its computation may differ: the config ties the embeddings, but the checkpoint has a
        separate head. Shards of earlier versions hold no sample to compare with.

        Args:
            head: LM head of the teacher.
            place: Name of the teacher in the message.

        Raises:
            ModelError: The head gives other logits.
            StorageError: A shard cannot be read.
        """
        for shard in self.meta.shards[:_MAX_SAMPLES]:
            path = self.directory / shard.name
            try:
                with pa.memory_map(str(path)) as file:
                    metadata = pa.ipc.open_file(file).schema.metadata or {}
            except (OSError, pa.ArrowInvalid) as error:
                raise StorageError(
                    f"{path}: this shard of the teacher cache cannot be read ({error}); score again"
                ) from None
            sample = metadata.get(SAMPLE.encode())
            if sample is not None:
                HeadSample.from_bytes(sample).check(head, place)


class TopKCache(TeacherCache):
    """A finished cache of the teacher's likeliest tokens, for corpora whose hidden states would not fit.

    K is the number of tokens kept.
    """

    kind: ClassVar[Literal["hidden", "topk"]] = "topk"

    def take(self, ids: np.ndarray) -> TopK:
        """Return the likeliest tokens of rows, one row after the other in the order of `ids`.

        Raises:
            StorageError: The cache does not hold an id, a shard cannot be read, or a log-probability is NaN.
        """
        layout = self.meta.layout
        records_NR = torch.from_numpy(self.records(ids))
        sizes = [4 * layout.width, DTYPES[layout.dtype].itemsize * layout.width]
        ids_NR, logp_NR, curve_NR = records_NR.tensor_split((sizes[0], sum(sizes)), dim=1)
        found = TopK(
            ids_NR.contiguous().view(torch.int32),
            logp_NR.contiguous().view(DTYPES[layout.dtype]),
            curve_NR.contiguous().view(torch.float32),
            layout.vocab_size,
        )
        self._check_finite(ids, ~found.logp_NK.isnan().any(dim=1))
        return found

    def check(self, top_k: int, student_vocab_size: int) -> None:
        """Check that the cache keeps the requested number of tokens, and that the student has all of them.

        Args:
            top_k: Number of tokens in the config; a smaller vocabulary is kept completely.
            student_vocab_size: Number of the student's logits, padding included.

        Raises:
            StorageError: The cache does not fit.
        """
        layout, remedy = self.meta.layout, "score again"
        if layout.width != min(top_k, layout.vocab_size):
            raise StorageError(
                f"{self.directory}: this teacher cache keeps {layout.width} tokens, "
                f"and distill.top_k is {top_k}; {remedy}"
            )
        if layout.vocab_size > student_vocab_size:
            raise StorageError(
                f"{self.directory}: this teacher cache is over {layout.vocab_size} tokens, more than the student's "
                f"{student_vocab_size}; {remedy}"
            )
