from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pocl_ray.data.row_store import ROWS_SCHEMA, RowStore, shared_prompts
from pocl_ray.errors import DataError


def write_rows(path: Path, prompts: list[str], batch_rows: int = 3) -> RowStore:
    """Write rows of which row i has i prompt tokens and i + 1 response tokens, all of them i."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, ROWS_SCHEMA) as writer:
        for first in range(0, len(prompts), batch_rows):
            ids = range(first, min(first + batch_rows, len(prompts)))
            columns = [
                list(ids),
                [10 * i for i in ids],
                [None if i % 2 else f"t{i}" for i in ids],
                [prompts[i] for i in ids],
                [[f"r{i}", "x"] for i in ids],
                [[i] * i for i in ids],
                [[i] * (i + 1) for i in ids],
            ]
            arrays = [pa.array(c, type=field.type) for c, field in zip(columns, ROWS_SCHEMA, strict=True)]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=ROWS_SCHEMA))
    return RowStore.open(path)


@pytest.fixture
def store(tmp_path: Path) -> RowStore:
    return write_rows(tmp_path / "rows.arrow", [f"p{i}" for i in range(8)])


def test_rows_are_found_by_id_over_record_batches(store: RowStore) -> None:
    ids = np.array([7, 0, 3, 3, 2])
    assert len(store) == 8
    assert store.prompts(ids) == ["p7", "p0", "p3", "p3", "p2"]
    assert store.references([4]) == [["r4", "x"]]
    assert store.topics(ids) == [None, "t0", None, None, "t2"]
    assert store.source_rows(ids) == [70, 0, 30, 30, 20]
    prompt_ids, response_ids = store.tokens(ids)
    assert [ids.tolist() for ids in prompt_ids] == [[7] * 7, [], [3] * 3, [3] * 3, [2] * 2]
    assert [len(ids) for ids in response_ids] == [8, 1, 4, 4, 3]
    assert store.tokens([]) == ([], [])


def test_lengths_are_those_of_the_token_lists(store: RowStore) -> None:
    assert store.prompt_lengths.tolist() == list(range(8))
    assert store.response_lengths.tolist() == list(range(1, 9))
    assert store.prompt_lengths.dtype == np.int32


def test_token_ids_are_views_of_the_file(store: RowStore) -> None:
    (first,), _ = store.tokens([5])
    assert first.dtype == np.int32 and not first.flags.owndata and not first.flags.writeable


@pytest.mark.parametrize("ids", [[8], [-1]])
def test_ids_outside_the_file_are_refused(store: RowStore, ids: list[int]) -> None:
    with pytest.raises(IndexError, match="row ids go from 0 to 7"):
        store.tokens(ids)


def test_a_store_travels_to_another_process_by_path(store: RowStore) -> None:
    sent = pickle.dumps(store)
    assert len(sent) < 1000
    assert pickle.loads(sent).prompts([1]) == ["p1"]


def test_files_that_hold_no_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone: cannot be opened as prepared rows"):
        RowStore.open(tmp_path / "gone")
    (tmp_path / "text").write_text("not arrow")
    with pytest.raises(DataError, match="text: cannot be opened as prepared rows"):
        RowStore.open(tmp_path / "text")
    schema = pa.schema([("a", pa.int64())])
    with pa.OSFile(str(tmp_path / "other"), "wb") as file, pa.ipc.new_file(file, schema):
        pass
    with pytest.raises(DataError, match="other: is not a file of prepared rows"):
        RowStore.open(tmp_path / "other")


def test_prompts_that_also_stand_in_train_are_counted(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.arrow", ["a", "b", "b", "c", "d"], batch_rows=2)
    assert shared_prompts(train, write_rows(tmp_path / "dev.arrow", ["b", "x", "d", "b", "B"])) == 3
    assert shared_prompts(train, write_rows(tmp_path / "test.arrow", ["x", "y"])) == 0
