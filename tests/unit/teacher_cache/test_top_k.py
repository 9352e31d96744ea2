"""The kept part of the teacher's distribution, against all of it in float64; and the cache that holds it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pocl_ray.errors import StorageError
from pocl_ray.teacher_cache.layout import estimate_bytes
from pocl_ray.teacher_cache.reader import HiddenCache, TopKCache
from pocl_ray.teacher_cache.top_k import INVERSE_TEMPERATURES, LOG_ZERO, TopK, concatenate, top_k_of
from pocl_ray.teacher_cache.writer import write_index, write_shard

N, V = 12, 500
STORED = tuple(1.0 / inverse for inverse in INVERSE_TEMPERATURES)
CURRICULUM = (0.6, 0.9, 1.1, 1.33, 1.5, 1.67, 1.9, 2.5, 3.0)


def random_logits(spread: float = 2.0, seed: int = 0, vocab_size: int = V) -> Tensor:
    return spread * torch.randn(N, vocab_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def peaked_logits() -> Tensor:
    """One token far ahead, as a trained teacher has it."""
    logits_NV = random_logits()
    logits_NV[:, 7] += 12.0
    return logits_NV


def zipf_logits() -> Tensor:
    return -1.2 * torch.arange(1, V + 1, dtype=torch.float64).log().expand(N, V)[:, torch.randperm(V)]


def events_by_hand(logits_NV: Tensor, ids_NK: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of the tokens and of all others together, out of the whole distribution."""
    p_NV = (logits_NV / temperature).softmax(-1)
    top_NK = p_NV.gather(-1, ids_NK.long())
    tail_N1 = p_NV.scatter(-1, ids_NK.long(), 0.0).sum(-1, keepdim=True)
    return torch.cat([top_NK, tail_N1], -1).log()


SHAPES = {"random": random_logits(), "peaked": peaked_logits(), "zipf": zipf_logits(), "flat": random_logits(0.1)}
every_shape = pytest.mark.parametrize("shape", list(SHAPES))


@every_shape
@pytest.mark.parametrize("top_k", [1, 8, 64])
@pytest.mark.parametrize("temperature", STORED)
def test_events_are_exact_at_the_stored_temperatures(shape: str, top_k: int, temperature: float) -> None:
    kept = top_k_of(SHAPES[shape], top_k)
    got_NE = kept.log_probs(temperature)
    torch.testing.assert_close(
        got_NE.double(), events_by_hand(SHAPES[shape], kept.ids_NK, temperature), rtol=1e-4, atol=2e-5
    )


@every_shape
@pytest.mark.parametrize("temperature", CURRICULUM)
def test_between_them_the_tails_share_is_off_by_less_than_a_percent(shape: str, temperature: float) -> None:
    for top_k in (8, 64):
        kept = top_k_of(SHAPES[shape], top_k)
        expected_NE = events_by_hand(SHAPES[shape], kept.ids_NK, temperature)
        assert float((kept.log_probs(temperature).exp() - expected_NE.exp()).abs().max()) < 0.01


@pytest.mark.parametrize("temperature", [0.3, *STORED, *CURRICULUM, 9.0])
@pytest.mark.parametrize("seed", range(4))
def test_all_tokens_kept_are_the_distribution_itself_at_every_temperature(temperature: float, seed: int) -> None:
    logits_NV = random_logits(3.0, seed, vocab_size=40)
    for top_k in (39, 40, 1000):  # with one token left over the curve is a line, hence exact as well
        kept = top_k_of(logits_NV, top_k)
        assert kept.has_tail == (top_k == 39)
        expected_NV = (logits_NV / temperature).log_softmax(-1).sort(-1, descending=True).values
        torch.testing.assert_close(kept.log_probs(temperature).double(), expected_NV, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.25, 0.1])
def test_below_the_lowest_stored_temperature_the_tail_is_a_lower_bound(temperature: float) -> None:
    logits_NV = random_logits()
    kept = top_k_of(logits_NV, 8)
    expected_NE = events_by_hand(logits_NV, kept.ids_NK, temperature)
    got_NE = kept.log_probs(temperature)
    assert (got_NE[:, -1].double() <= expected_NE[:, -1] + 1e-5).all()
    torch.testing.assert_close(got_NE.exp().sum(-1), torch.ones(N))


def test_the_kept_tokens_are_the_likeliest_first() -> None:
    kept = top_k_of(SHAPES["random"], 5)
    assert torch.equal(kept.ids_NK.long(), SHAPES["random"].float().topk(5).indices)
    assert kept.ids_NK.dtype == torch.int32 and kept.curve_NP.dtype == torch.float32


def test_float16_moves_probabilities_by_less_than_a_thousandth() -> None:
    for logits_NV in SHAPES.values():
        fine, coarse = (top_k_of(logits_NV, 64, dtype).log_probs(1.5) for dtype in (torch.float32, torch.float16))
        assert float((fine.exp() - coarse.exp()).abs().max()) < 1e-3


def test_masked_tokens_leave_everything_finite() -> None:
    logits_NV = random_logits()
    logits_NV[:, 20:] = -torch.inf
    for top_k in (8, 20, 30):
        kept = top_k_of(logits_NV, top_k, torch.float16)
        assert torch.isfinite(kept.log_probs(1.7)).all() and float(kept.logp_NK.min()) > LOG_ZERO - 0.1


def test_cutting_and_joining_give_back_the_same() -> None:
    kept = top_k_of(SHAPES["zipf"], 6)
    again = concatenate(kept.split([5, 0, 7]))
    assert all(torch.equal(getattr(again, name), getattr(kept, name)) for name in ("ids_NK", "logp_NK", "curve_NP"))


# The cache


def write(directory: Path, top_k: int = 6, dtype: torch.dtype = torch.float16) -> dict[int, TopK]:
    kept = top_k_of(SHAPES["zipf"], top_k, dtype)
    rows = dict(zip((4, 0, 9, 2), kept.split([3, 1, 6, 2]), strict=True))
    ids = list(rows)
    shards = [write_shard(directory, np.array(part), [rows[i] for i in part]) for part in (ids[:2], ids[2:])]
    write_index(directory, [shard.name for shard in shards], "teacher-a", "rows-a")
    return rows


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    rows = write(tmp_path, dtype=dtype)
    cache = TopKCache.open(tmp_path, "teacher-a", "rows-a", 4)
    taken, expected = cache.take(np.array([9, 4, 4, 0])), concatenate([rows[i] for i in (9, 4, 4, 0)])
    for name in ("ids_NK", "logp_NK", "curve_NP"):
        assert torch.equal(getattr(taken, name), getattr(expected, name))
    assert taken.vocab_size == V and taken.logp_NK.dtype == dtype


def test_the_size_on_disk_is_the_estimate_and_little_more(tmp_path: Path) -> None:
    kept = top_k_of(random_logits(), 64, torch.float16)
    shard = write_shard(tmp_path, np.arange(N), kept.split([1] * N))
    meta = write_index(tmp_path, [shard.name], "teacher-a", "rows-a")
    assert meta.layout.row_bytes == 64 * 6 + 44
    assert estimate_bytes(N, meta.layout) < shard.num_bytes < estimate_bytes(N, meta.layout) + 4096


@pytest.mark.parametrize(
    ("expected", "reason"),
    [
        (("teacher-b", "rows-a"), "made by another teacher"),
        (("teacher-a", "rows-b"), "belongs to other rows"),
        (("teacher-a", "rows-a", 5), "holds 4 rows, expected 5"),
    ],
)
def test_a_cache_of_something_else_is_refused(tmp_path: Path, expected: tuple, reason: str) -> None:
    write(tmp_path)
    with pytest.raises(StorageError, match=reason):
        TopKCache.open(tmp_path, *expected)


def test_one_kind_of_cache_is_not_taken_for_the_other(tmp_path: Path) -> None:
    write(tmp_path / "topk")
    name = write_shard(tmp_path / "hidden", np.array([0]), [torch.zeros(2, 3)]).name
    write_index(tmp_path / "hidden", [name], "teacher-a", "rows-a")
    with pytest.raises(StorageError, match=r"holds the 6 likeliest tokens in float16, and .* is hidden; score again"):
        HiddenCache.open(tmp_path / "topk", "teacher-a", "rows-a")
    with pytest.raises(StorageError, match=r"holds hidden states of 3 x float32, and .* is topk; score again"):
        TopKCache.open(tmp_path / "hidden", "teacher-a", "rows-a")


def test_another_number_of_tokens_or_a_smaller_student_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    cache = TopKCache.open(tmp_path, "teacher-a", "rows-a")
    cache.check(6, V + 12)
    with pytest.raises(StorageError, match=r"keeps 6 tokens, and distill\.top_k is 8"):
        cache.check(8, V)
    with pytest.raises(StorageError, match="over 500 tokens, more than the student's 499"):
        cache.check(6, V - 1)


def test_rows_of_several_layouts_make_no_shard_and_no_cache(tmp_path: Path) -> None:
    five, six = (top_k_of(random_logits(), k) for k in (5, 6))
    with pytest.raises(ValueError, match="need one dtype"):
        write_shard(tmp_path, np.array([0, 1]), [five, six])
    names = [write_shard(tmp_path, np.array([i]), [kept]).name for i, kept in enumerate((five, six))]
    with pytest.raises(ValueError, match="shards of different kinds"):
        write_index(tmp_path, names, "teacher-a", "rows-a")
