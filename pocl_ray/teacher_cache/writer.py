"""The teacher cache, its format and its writer: a record of fixed size for each response token, by row id, in shards.

On fixed data the teacher's outputs are the same in every epoch of every stage, so it runs once. The cache keeps for
each token the final hidden state, from which the LM head computes the exact full distribution, or the likeliest tokens
(`top_k`).

A cache is a directory:

    shard-<digest>.arrow   one record batch: id int64, num_tokens int32, tokens large_binary (raw little-endian)
    index.arrow            the place of each row: id, shard, row, first_token, num_tokens; sorted by id
    meta.json              format, teacher and rows; it is written last, so a cache without it is not finished

The binary column of a single batch is one contiguous buffer. So a shard is a matrix (tokens, bytes of a record) that
can be sliced in place. The name of a shard is a digest of its ids and bytes, so a task that Ray runs twice writes the
same file again.

Legend: N tokens of several rows in one flat axis, K the teacher's hidden size, R bytes of a record.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import torch
from torch import Tensor

from pocl_ray.run_directory.storage import write_whole
from pocl_ray.teacher_cache.layout import Layout
from pocl_ray.teacher_cache.top_k import TopK

FORMAT_VERSION = 2
META_NAME = "meta.json"
INDEX_NAME = "index.arrow"
SAMPLE = "head_sample"  # in the metadata of a shard's schema
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ShardInfo:
    """A shard: file name, number of rows, number of tokens, and size of the file."""

    name: str
    num_rows: int
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True)
class CacheMeta:
    """The content of meta.json.

    Attributes:
        version: Version of the format.
        layout: Layout of a token's record.
        num_rows: Number of all rows.
        num_tokens: Number of all response tokens.
        num_bytes: Size of all shards.
        teacher: Fingerprint of the teacher that wrote the cache.
        rows: Fingerprint of the tokenized rows of the cache.
        shards: Shards in the order of their numbers in the index.
    """

    version: int
    layout: Layout
    num_rows: int
    num_tokens: int
    num_bytes: int
    teacher: str
    rows: str
    shards: tuple[ShardInfo, ...]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name that the cache stores for a dtype."""
    names = [name for name, known in DTYPES.items() if known == dtype]
    if not names:
        raise ValueError(f"the teacher cache holds {', '.join(DTYPES)}, not {dtype}")
    return names[0]


def layout_of(tokens: Tensor | TopK) -> Layout:
    """Return the layout of these outputs."""
    if isinstance(tokens, TopK):
        return Layout("topk", dtype_name(tokens.logp_NK.dtype), tokens.top_k, tokens.vocab_size)
    return Layout("hidden", dtype_name(tokens.dtype), tokens.shape[1])


def write_shard(
    directory: str | Path,
    ids: np.ndarray,
    tokens: Sequence[Tensor | TopK],
    filesystem: pafs.FileSystem | None = None,
    sample: bytes | None = None,
) -> ShardInfo:
    """Write the outputs for some rows as one shard, completely or not at all; a repetition changes nothing.

    Args:
        directory: Directory of the cache, a local path or a path on `filesystem`; it is created if it is missing.
        ids: Row ids, int64, one for each row.
        tokens: Hidden states of each row, shape (tokens of the row, K), or its top k; all have one layout, on any
            device.
        filesystem: Filesystem of the cache; the local one by default.
        sample: The teacher's own logits at a few tokens (`HeadSample`), which a head read from disk is held against.

    Returns:
        The shard's name and sizes. Pass the names of all shards to `write_index`.
    """
    ids = np.ascontiguousarray(ids, dtype=np.int64)
    if len(ids) != len(tokens) or not len(ids):
        raise ValueError(f"{len(ids)} ids and {len(tokens)} rows: give as many, and at least one")
    if bad := [int(row) for row, output in zip(ids, tokens, strict=True) if not is_finite(output)]:
        raise ValueError(f"the outputs for {listed(bad)} (counted from 0) are not finite")
    layouts = {layout_of(row) for row in tokens}
    if len(layouts) != 1:
        raise ValueError("the rows of a shard need one dtype and one hidden size or number of tokens kept")
    lengths = np.array([len(row) for row in tokens], dtype=np.int32)
    payload = np.concatenate([_as_bytes(row) for row in tokens]).reshape(-1)
    name = f"shard-{_digest(ids, lengths, payload)}.arrow"
    data = _shard_file(ids, lengths, payload, layouts.pop(), sample)
    write_whole(filesystem or pafs.LocalFileSystem(), f"{directory}/{name}", data)
    return ShardInfo(name, len(ids), int(lengths.sum()), data.size)


def write_index(
    directory: str | Path,
    shard_names: Iterable[str],
    teacher: str,
    rows: str,
    filesystem: pafs.FileSystem | None = None,
) -> CacheMeta:
    """Finish a cache: write the index, then meta.json, then delete shards that are not named.

    It reads ids and lengths of the shards, and not their records. Unnamed shards are left over from attempts that Ray
    gave up.

    Args:
        directory: Directory of the shards.
        shard_names: Names of the shards to keep; names may be repeated (one for each row, as a scoring job returns
            them).
        teacher: Fingerprint of the teacher.
        rows: Fingerprint of the rows.
        filesystem: Filesystem of the cache; the local one by default.

    Raises:
        ValueError: There is no shard, an id is in two shards, or shards have different layouts.
    """
    filesystem, folder = filesystem or pafs.LocalFileSystem(), str(directory)
    names = sorted(set(shard_names))
    if not names:
        raise ValueError(f"{folder}: a teacher cache needs at least one shard")
    described = [_describe_shard(filesystem, folder, name) for name in names]
    layouts = {layout for _, _, layout in described}
    if len(layouts) != 1:
        raise ValueError(f"{folder}: shards of different kinds: {', '.join(sorted(map(str, layouts)))}")
    infos = tuple(info for info, _, _ in described)
    index = _make_index([table for _, table, _ in described])
    meta = CacheMeta(
        version=FORMAT_VERSION,
        layout=layouts.pop(),
        num_rows=len(index),
        num_tokens=sum(info.num_tokens for info in infos),
        num_bytes=sum(info.num_bytes for info in infos),
        teacher=teacher,
        rows=rows,
        shards=infos,
    )
    if filesystem.get_file_info(f"{folder}/{META_NAME}").type == pafs.FileType.File:
        filesystem.delete_file(f"{folder}/{META_NAME}")  # the old one must not be read with the new index
    write_whole(filesystem, f"{folder}/{INDEX_NAME}", _ipc_file(index))
    write_whole(filesystem, f"{folder}/{META_NAME}", (json.dumps(asdict(meta), indent=2) + "\n").encode())
    _delete_unnamed(filesystem, folder, set(names))
    return meta


def is_finite(tokens: Tensor | TopK) -> bool:
    """Return whether a row's outputs can be trained on. A log-probability may be -inf: a token that cannot come."""
    if isinstance(tokens, TopK):
        return not bool(tokens.logp_NK.isnan().any())
    return bool(torch.isfinite(tokens).all())


def listed(rows: Sequence[int]) -> str:
    """Return the numbers of rows as text, the first few of them."""
    first = ", ".join(map(str, rows[:8]))
    more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
    return f"row{'s' if len(rows) > 1 else ''} {first}{more}"


def _as_bytes(tokens: Tensor | TopK) -> np.ndarray:
    """The records of a row's tokens, uint8, shape (N, R)."""
    if sys.byteorder != "little":
        raise ValueError("the teacher cache is little-endian; this machine is not")
    columns = (tokens.ids_NK, tokens.logp_NK, tokens.curve_NP) if isinstance(tokens, TopK) else (tokens,)
    parts = [column.detach().cpu().contiguous().view(torch.uint8) for column in columns]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).numpy()


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:20]


def _shard_file(
    ids: np.ndarray, lengths: np.ndarray, payload: np.ndarray, layout: Layout, sample: bytes | None
) -> pa.Buffer:
    row_bytes = lengths.astype(np.int64) * layout.row_bytes
    offsets = np.concatenate([[0], np.cumsum(row_bytes)]).astype(np.int64)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(payload)]
    columns = [pa.array(ids), pa.array(lengths), pa.Array.from_buffers(pa.large_binary(), len(ids), buffers)]
    metadata: dict[str, str | bytes] = {"version": str(FORMAT_VERSION), "layout": json.dumps(asdict(layout))}
    if sample is not None:
        metadata[SAMPLE] = sample
    schema = pa.schema(
        [("id", pa.int64()), ("num_tokens", pa.int32()), ("tokens", pa.large_binary())], metadata=metadata
    )
    return _ipc_file(pa.record_batch(columns, schema=schema))


def _ipc_file(batch: pa.RecordBatch) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def _describe_shard(filesystem: pafs.FileSystem, folder: str, name: str) -> tuple[ShardInfo, pa.RecordBatch, Layout]:
    """The ids and lengths of a shard, read without its records."""
    with filesystem.open_input_file(f"{folder}/{name}") as file:
        options = pa.ipc.IpcReadOptions(included_fields=[0, 1])
        reader = pa.ipc.open_file(file, options=options)
        table, num_bytes = reader.get_batch(0), file.size()
        metadata: dict[bytes, bytes] = reader.schema.metadata
    num_tokens = int(table.column("num_tokens").to_numpy().sum())
    return ShardInfo(name, table.num_rows, num_tokens, num_bytes), table, Layout(**json.loads(metadata[b"layout"]))


def _make_index(tables: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    """The place of each row, sorted by id."""
    parts: dict[str, list[Any]] = {name: [] for name in ("id", "shard", "row", "first_token", "num_tokens")}
    for number, table in enumerate(tables):
        lengths = table.column("num_tokens").to_numpy()
        parts["id"].append(table.column("id").to_numpy())
        parts["shard"].append(np.full(len(lengths), number, dtype=np.int32))
        parts["row"].append(np.arange(len(lengths), dtype=np.int32))
        parts["first_token"].append(np.cumsum(lengths, dtype=np.int64) - lengths)
        parts["num_tokens"].append(lengths)
    columns = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    order = np.argsort(columns["id"], kind="stable")
    sorted_ids = columns["id"][order]
    repeated = sorted_ids[1:][sorted_ids[1:] == sorted_ids[:-1]]
    if len(repeated):
        raise ValueError(f"row {repeated[0]} is in the teacher cache twice")
    return pa.RecordBatch.from_pydict({name: array[order] for name, array in columns.items()})


def _delete_unnamed(filesystem: pafs.FileSystem, folder: str, names: set[str]) -> None:
    for info in filesystem.get_file_info(pafs.FileSelector(folder)):
        is_shard = info.base_name.startswith("shard-") and info.base_name.endswith(".arrow")
        is_staging = info.base_name.startswith(".shard-")
        if info.type == pafs.FileType.File and (is_staging or (is_shard and info.base_name not in names)):
            filesystem.delete_file(info.path)
