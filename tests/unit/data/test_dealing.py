"""How rows are dealt to workers and cut into micro-batches, by rows or by a token budget."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from pocl_ray.data.batching import Layout
from pocl_ray.data.dealing import check_budget, deal_rows
from pocl_ray.errors import ConfigError

LENGTHS = np.random.default_rng(3).integers(4, 90, 48)
LONG_TAIL = np.minimum(20 * np.exp(np.random.default_rng(4).normal(0, 1, 64)), 400).astype(np.int64) + 1


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "layout",
    [
        *(Layout(0, rows) for rows in (1, 3, 64)),
        *(Layout(0, 8, tokens, packed) for tokens in (96, 500, 10**6) for packed in (False, True)),
    ],
)
def test_the_workers_share_rows_without_rest_in_equally_many_micro_batches(world_size: int, layout: Layout) -> None:
    shares = [layout.deal(LENGTHS, rank, world_size) for rank in range(world_size)]
    assert sorted(np.concatenate([part for share in shares for part in share])) == list(range(len(LENGTHS)))
    assert len({len(share) for share in shares}) == 1, "equally many on each rank"
    for part in (part for share in shares for part in share):
        if layout.micro_batch_tokens is None:
            assert 0 < len(part) <= layout.micro_batch_rows
        else:
            width = -(-LENGTHS[part].max() // 8) * 8
            held = LENGTHS[part].sum() if layout.is_packed else width * len(part)
            assert 0 < held <= layout.micro_batch_tokens


def test_rows_of_similar_length_share_a_micro_batch() -> None:
    lengths = [LENGTHS[part] for part in deal_rows(LENGTHS, 0, 2, 4)]
    assert all(longer.min() >= shorter.max() for longer, shorter in pairwise(lengths))


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_token_budget_gives_each_worker_equally_much_to_do(world_size: int) -> None:
    layout = Layout(0, 8, 512, is_packed=True)
    shares = [[int(LONG_TAIL[part].sum()) for part in layout.deal(LONG_TAIL, r, world_size)] for r in range(world_size)]
    totals = [sum(share) for share in shares]
    assert max(totals) <= 1.02 * min(totals)
    by_step = np.array(shares)
    assert (by_step.max(0) <= 1.1 * by_step.min(0)).all(), "they run at once, and wait for each other"
    assert len(shares[0]) <= np.ceil(sum(totals) / world_size / 512) + 1


def test_neighbours_of_a_packed_micro_batch_are_sorted_by_length() -> None:
    """Neighbours of equal length share a call of the attention kernel."""
    for part in Layout(0, 8, 512, is_packed=True).deal(LONG_TAIL, 0, 2):
        assert (np.diff(LONG_TAIL[part]) <= 0).all()


@pytest.mark.parametrize("layout", [Layout(0, 4), Layout(0, 4, 100), Layout(0, 4, 100, is_packed=True)])
@pytest.mark.parametrize("num_rows", [1, 3, 5])
def test_with_fewer_rows_than_workers_some_micro_batches_are_empty(layout: Layout, num_rows: int) -> None:
    shares = [layout.deal(LENGTHS[:num_rows], rank, 4) for rank in range(4)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(np.concatenate([part for share in shares for part in share])) == list(range(num_rows))


def test_a_budget_below_the_longest_row_is_refused_with_its_length() -> None:
    check_budget(None, 10**6, True)
    check_budget(61, 61, True)
    check_budget(64, 61, False)
    with pytest.raises(
        ConfigError, match=r"train\.micro_batch_tokens is 60, and the longest row has 61 tokens; set it"
    ):
        check_budget(60, 61, True)
    with pytest.raises(ConfigError, match=r"sft\.micro_batch_tokens is 61.*has 61 tokens, 64 with padding; .*to 64 or"):
        check_budget(61, 61, False, "sft")
