"""Results of scoring as they come: whole, in order of id, and no larger than their numbers."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pocl_ray.difficulty.job import Results, gather
from pocl_ray.records import RowsSummary


def summary(name: str, num_rows: int) -> RowsSummary:
    return RowsSummary(name, f"rows/{name}.arrow", num_rows, 0, num_rows, num_rows, 1, "f")


def part(ids: list[int], name: str = "train", shard: str | None = None, answered: bool = True) -> pa.Table:
    stopped = [value % 2 == 0 if answered else None for value in ids]
    return pa.table(
        {
            "id": pa.array(ids),
            "ce_loss": pa.array([value / 2 for value in ids]),
            "answer_stopped": pa.array(stopped, pa.bool_()),
            "num_prompt_tokens": pa.array([value + 1 for value in ids]),
            "set": pa.array([name] * len(ids)),
            "shard": pa.array([shard] * len(ids), pa.string()),
        }
    )


def test_rows_come_out_in_order_of_id_whatever_the_order_of_their_coming() -> None:
    results = {"train": Results(summary("train", 5))}
    gather([part([4, 1]), part([0, 3, 2])], results)
    assert results["train"].table().to_pydict() == {
        "id": [0, 1, 2, 3, 4],
        "ce_loss": [0.0, 0.5, 1.0, 1.5, 2.0],
        "answer_stopped": [True, False, True, False, True],
        "num_prompt_tokens": [1, 2, 3, 4, 5],
    }


def test_types_are_those_that_the_actors_give() -> None:
    results = Results(summary("train", 2))
    results.add(part([1, 0]))
    expected = part([0, 1]).drop_columns(["set", "shard"]).schema
    assert results.table().schema.equals(expected)


def test_what_nobody_measured_stays_null() -> None:
    results = Results(summary("train", 3))
    results.add(part([2, 0, 1], answered=False))
    column = results.table()["answer_stopped"]
    assert column.null_count == 3 and column.type == pa.bool_()


def test_sets_are_kept_apart_and_shards_noted() -> None:
    results = {"train": Results(summary("train", 3)), "dev": Results(summary("dev", 2), keeps_signals=False)}
    mixed = pa.concat_tables([part([2], shard="a"), part([0, 1], "dev", shard="d")])
    gather([mixed, part([0, 1], shard="b")], results)
    assert results["train"].shards == {"a", "b"} and results["dev"].shards == {"d"}
    assert results["train"].table()["id"].to_pylist() == [0, 1, 2]


@pytest.mark.parametrize("came", [[[0, 1], [3]], [[0, 1, 2], [3, 3]], [[0, 1], [2, 3], [1]]])
def test_a_row_that_is_lost_or_comes_twice_is_an_error(came: list[list[int]]) -> None:
    with pytest.raises(RuntimeError, match=f"{sum(map(len, came))} results for 4 rows of train"):
        gather(map(part, came), {"train": Results(summary("train", 4))})


def test_the_table_shares_the_memory_of_what_was_gathered() -> None:
    num_rows = 100_000
    results = Results(summary("train", num_rows))
    for ids in np.split(np.random.default_rng(0).permutation(num_rows), 100):
        results.add(part(ids.tolist()))
    before = pa.total_allocated_bytes()
    table = results.table()
    assert pa.total_allocated_bytes() - before < num_rows, "only bits are packed again"
    assert table["ce_loss"].to_numpy()[-1] == (num_rows - 1) / 2
