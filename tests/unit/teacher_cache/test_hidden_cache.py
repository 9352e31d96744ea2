from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pytest
import torch

from pocl_ray.errors import StorageError
from pocl_ray.teacher_cache.layout import Layout, estimate_bytes
from pocl_ray.teacher_cache.reader import HiddenCache
from pocl_ray.teacher_cache.writer import write_index, write_shard

K = 16


def make_rows(ids, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (len(ids),), generator=generator).tolist()
    return [torch.randn(length, K, generator=generator).to(dtype) for length in lengths]


def make_cache(directory: Path, dtype=torch.float32):
    rows = {}
    names = []
    for seed, ids in enumerate([[7, 3, 20], [1, 0], [11, 12, 13, 14]]):
        hidden = make_rows(ids, dtype, seed)
        rows.update(zip(ids, hidden, strict=True))
        names.append(write_shard(directory, np.array(ids), hidden).name)
    write_index(directory, names, teacher="teacher-a", rows="rows-a")
    return rows


def open_cache(directory: Path, **changes) -> HiddenCache:
    return HiddenCache.open(directory, **{"expect_teacher": "teacher-a", "expect_rows": "rows-a", **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back_bit_for_bit_in_any_order(tmp_path, dtype):
    rows = make_cache(tmp_path, dtype)
    cache = open_cache(tmp_path, expect_num_rows=9)
    for ids in ([0], [13, 20, 0, 7], [12, 13, 14, 1, 1, 3], sorted(rows), sorted(rows, reverse=True)):
        taken = cache.take(np.array(ids))
        expected = torch.cat([rows[i] for i in ids])
        assert taken.dtype == dtype
        assert torch.equal(taken.view(torch.uint8), expected.view(torch.uint8))
        assert cache.num_tokens(np.array(ids)).tolist() == [len(rows[i]) for i in ids]


def test_values_that_are_not_finite_are_refused_by_writer_and_reader(tmp_path, monkeypatch):
    fine, spoilt = torch.tensor([[65504.0, -0.0, 1e-40]]), torch.tensor([[float("nan"), float("inf"), 1.0]])
    with pytest.raises(ValueError, match=r"the outputs for row 7 \(counted from 0\) are not finite"):
        write_shard(tmp_path, np.array([5, 7]), [fine, spoilt])
    monkeypatch.setattr("pocl_ray.teacher_cache.writer.is_finite", lambda tokens: True)  # as older versions wrote it
    name = write_shard(tmp_path, np.array([5, 7]), [fine, spoilt]).name
    write_index(tmp_path, [name], "teacher-a", "rows-a")
    cache = open_cache(tmp_path)
    assert torch.equal(cache.take(np.array([5])).view(torch.int32), fine.view(torch.int32))
    with pytest.raises(StorageError, match=r"outputs for row 7 \(counted from 0\) are not finite; set teacher.dtype"):
        cache.take(np.array([5, 7]))


def test_no_rows_give_an_empty_tensor(tmp_path):
    make_cache(tmp_path)
    cache = open_cache(tmp_path)
    assert cache.take(np.array([], dtype=np.int64)).shape == (0, K)


def test_what_was_taken_may_be_changed_without_harm(tmp_path):
    rows = make_cache(tmp_path)
    cache = open_cache(tmp_path)
    cache.take(np.array([7])).zero_()
    assert torch.equal(cache.take(np.array([7])), rows[7])


def test_a_repeated_shard_is_the_same_file_with_the_same_bytes(tmp_path):
    hidden = make_rows([1, 2, 3])
    first = write_shard(tmp_path, np.array([1, 2, 3]), hidden)
    content = (tmp_path / first.name).read_bytes()
    assert write_shard(tmp_path, np.array([1, 2, 3]), hidden) == first
    assert (tmp_path / first.name).read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
    assert first.num_bytes == len(content)
    assert write_shard(tmp_path, np.array([1, 2, 4]), hidden).name != first.name
    assert write_shard(tmp_path, np.array([1, 2, 3]), make_rows([1, 2, 3], seed=9)).name != first.name


def test_size_on_disk_is_the_estimate_and_little_more(tmp_path):
    hidden = [torch.zeros(500, K, dtype=torch.bfloat16) for _ in range(20)]
    shard = write_shard(tmp_path, np.arange(20), hidden)
    estimate = estimate_bytes(500 * 20, Layout("hidden", "bfloat16", K))
    assert estimate == 500 * 20 * K * 2
    assert estimate < shard.num_bytes < estimate + 4096
    assert (shard.num_rows, shard.num_tokens) == (20, 10_000)


def test_the_index_drops_shards_of_given_up_attempts(tmp_path):
    stale = write_shard(tmp_path, np.array([0, 1]), make_rows([0, 1], seed=5)).name
    (tmp_path / ".shard-x.arrow.writing-1").write_bytes(b"half")
    rows = make_cache(tmp_path)
    assert not (tmp_path / stale).exists()
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())
    assert torch.equal(open_cache(tmp_path).take(np.array([0])), rows[0])


def test_a_row_in_two_shards_is_an_error(tmp_path):
    names = [write_shard(tmp_path, np.array([1, last]), make_rows([1, last])).name for last in (2, 3)]
    with pytest.raises(ValueError, match="row 1 is in the teacher cache twice"):
        write_index(tmp_path, names, "teacher-a", "rows-a")


def test_a_cache_on_another_filesystem_is_written_the_same(tmp_path):
    hidden = make_rows([4, 5])
    filesystem = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    shard = write_shard("run/cache", np.array([4, 5]), hidden, filesystem)
    write_index("run/cache", [shard.name, shard.name], "teacher-a", "rows-a", filesystem)
    assert torch.equal(open_cache(tmp_path / "run/cache").take(np.array([5, 4])), torch.cat(hidden[::-1]))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"expect_teacher": "teacher-b"}, "made by another teacher"),
        ({"expect_rows": "rows-b"}, "belongs to other rows"),
        ({"expect_num_rows": 8}, "holds 9 rows, expected 8"),
    ],
)
def test_a_cache_of_something_else_is_refused(tmp_path, changes, reason):
    make_cache(tmp_path)
    with pytest.raises(StorageError, match=reason):
        open_cache(tmp_path, **changes)


def test_an_unfinished_or_foreign_cache_is_refused(tmp_path):
    make_cache(tmp_path)
    meta = tmp_path / "meta.json"
    fields = json.loads(meta.read_text())
    meta.write_text(json.dumps({**fields, "version": 99}))
    with pytest.raises(StorageError, match="format 99, expected 2"):
        open_cache(tmp_path)
    meta.write_text(json.dumps({"version": 2}))
    with pytest.raises(StorageError, match="is damaged"):
        open_cache(tmp_path)
    meta.write_text("{")
    with pytest.raises(StorageError, match="cannot be read"):
        open_cache(tmp_path)
    meta.unlink()
    with pytest.raises(StorageError, match="no finished teacher cache"):
        open_cache(tmp_path)


def test_a_missing_or_truncated_shard_is_refused(tmp_path):
    make_cache(tmp_path)
    shard = sorted(tmp_path.glob("shard-*.arrow"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(StorageError, match="expected"):
        open_cache(tmp_path)
    shard.unlink()
    with pytest.raises(StorageError, match="is missing"):
        open_cache(tmp_path)
    shard.write_bytes(bytes(len(content)))
    with pytest.raises(StorageError, match="cannot be read"):
        open_cache(tmp_path).take(np.array([0, 3, 12]))


def test_an_index_that_is_damaged_is_refused(tmp_path):
    make_cache(tmp_path)
    (tmp_path / "index.arrow").write_bytes(b"no arrow")
    with pytest.raises(StorageError, match="index of the teacher cache"):
        open_cache(tmp_path)


def test_a_row_that_is_not_there_is_named(tmp_path):
    make_cache(tmp_path)
    for missing in (2, 99):
        with pytest.raises(StorageError, match=f"no row {missing}"):
            open_cache(tmp_path).take(np.array([0, missing]))


def test_more_shards_than_may_be_open_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("pocl_ray.teacher_cache.reader._MAX_OPEN_SHARDS", 1)
    rows = make_cache(tmp_path)
    cache = open_cache(tmp_path)
    order = [7, 1, 11, 20, 0, 14]
    assert torch.equal(cache.take(np.array(order)), torch.cat([rows[i] for i in order]))


def test_mistakes_of_the_caller_are_errors(tmp_path):
    with pytest.raises(ValueError, match="give as many"):
        write_shard(tmp_path, np.array([1]), [])
    with pytest.raises(ValueError, match="one dtype and one hidden size"):
        write_shard(tmp_path, np.array([1, 2]), [torch.zeros(1, 2), torch.zeros(1, 3)])
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        write_shard(tmp_path, np.array([1]), [torch.zeros(1, 2, dtype=torch.float64)])
    with pytest.raises(ValueError, match="at least one shard"):
        write_index(tmp_path, [], "teacher-a", "rows-a")
