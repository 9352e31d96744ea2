from __future__ import annotations

import itertools

import numpy as np
import pytest

from pocl_ray.difficulty.tasks import plan_tasks


@pytest.fixture
def lengths() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(1, 200, 3000).astype(np.int32), rng.integers(1, 300, 3000).astype(np.int32)


def test_each_row_is_in_one_micro_batch_of_one_task(lengths: tuple[np.ndarray, np.ndarray]) -> None:
    tasks = plan_tasks(*lengths, shard_rows=100, batch_tokens=4096)
    assert sorted(np.concatenate([ids for task in tasks for ids in task]).tolist()) == list(range(3000))
    assert max(sum(map(len, task)) for task in tasks) == 100


def test_micro_batches_keep_to_the_budget_save_for_a_single_long_row(lengths: tuple[np.ndarray, np.ndarray]) -> None:
    total = lengths[0] + lengths[1]
    for task in plan_tasks(*lengths, shard_rows=100, batch_tokens=400):
        for ids in task:
            padded = -(-int(total[ids].max()) // 8) * 8 * len(ids)
            assert padded <= 400 or len(ids) == 1


def test_rows_of_a_micro_batch_fill_it(lengths: tuple[np.ndarray, np.ndarray]) -> None:
    total = lengths[0] + lengths[1]
    for ids in (ids for task in plan_tasks(*lengths, shard_rows=3000, batch_tokens=100_000) for ids in task):
        assert len(ids) <= 4 or total[ids].min() >= 0.75 * total[ids].max()


def test_rows_of_a_task_are_of_similar_length_and_the_longest_come_first(
    lengths: tuple[np.ndarray, np.ndarray],
) -> None:
    total = lengths[0] + lengths[1]
    tasks = plan_tasks(*lengths, shard_rows=512, batch_tokens=4096)
    spans = [(total[np.concatenate(task)].max(), total[np.concatenate(task)].min()) for task in tasks]
    assert all(low >= high for (_, low), (high, _) in itertools.pairwise(spans))


@pytest.mark.parametrize(
    ("num_rows", "num_tasks", "task_rows"), [(20, 1, 20), (90, 3, 32), (2048, 16, 128), (20000, 40, 512)]
)
def test_small_sets_still_make_several_tasks(num_rows: int, num_tasks: int, task_rows: int) -> None:
    ones = np.ones(num_rows, dtype=np.int32)
    tasks = plan_tasks(ones, ones, shard_rows=512, batch_tokens=8192)
    assert len(tasks) == num_tasks
    assert sum(map(len, tasks[0])) == task_rows


def test_the_plan_is_a_function_of_the_lengths(lengths: tuple[np.ndarray, np.ndarray]) -> None:
    first, second = (plan_tasks(*lengths, shard_rows=100, batch_tokens=4096) for _ in range(2))
    assert [[ids.tolist() for ids in task] for task in first] == [[ids.tolist() for ids in task] for task in second]
