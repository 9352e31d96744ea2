"""The order of training, its cut over workers, and the tensors of a micro-batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pocl_ray.data.batching import (
    MicroBatch,
    collate,
    epoch_order,
    global_batches,
    pack,
)
from pocl_ray.records import Stage

ROWS = np.random.default_rng(0).permutation(53)
LENGTHS = np.random.default_rng(1).integers(2, 90, 53)
GOLDEN = [3, 2, 7, 8, 5, 6, 4, 1, 9, 0]


def stage(index: int = 0, num_epochs: int = 3, batch: int = 8, max_steps: int | None = None) -> Stage:
    return Stage(index, (0,), 0, 53, num_epochs, 53 // batch, 1.0, 1.0, True, 0, 1, max_steps)


def batches(first_step: int = 0, seed: int = 7, **changes: int) -> list[list[int]]:
    return [ids.tolist() for ids in global_batches(stage(**changes), ROWS, 8, seed, first_step)]


# The order


def test_the_order_is_a_function_of_seed_stage_and_epoch() -> None:
    order = epoch_order(ROWS, 1, 2, 3)
    assert np.array_equal(order, epoch_order(ROWS, 1, 2, 3))
    for other in ((0, 2, 3), (1, 3, 2), (1, 2, 4), (2, 1, 3)):
        assert not np.array_equal(order, epoch_order(ROWS, *other))
    assert sorted(order) == sorted(ROWS)


def test_the_order_does_not_touch_global_random_state() -> None:
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()
    epoch_order(ROWS, 1, 2, 3)
    assert np.random.get_state()[1].tolist() == before


def test_the_order_stays_what_it_was_in_earlier_versions() -> None:
    assert epoch_order(np.arange(10), 42, 1, 2).tolist() == GOLDEN


def test_an_epoch_shows_each_row_at_most_once_and_skips_the_rest() -> None:
    made = batches()
    assert len(made) == 18 and all(len(ids) == 8 for ids in made)
    for epoch in range(3):
        assert len(np.unique(made[epoch * 6 : (epoch + 1) * 6])) == 48
    assert len(np.unique(made)) == 53, "another epoch skips other rows"


@pytest.mark.parametrize("step", [0, 1, 5, 6, 7, 12, 17, 18])
def test_going_on_at_a_step_yields_the_same_batches(step: int) -> None:
    assert batches(first_step=step) == batches()[step:]


def test_seed_and_stage_change_the_batches() -> None:
    assert batches() != batches(seed=8) != batches(index=1)


@pytest.mark.parametrize("max_steps", [1, 6, 8])
def test_a_stage_that_ends_early_yields_the_first_batches(max_steps: int) -> None:
    assert batches(max_steps=max_steps) == batches()[:max_steps]


# The tensors


def row(*prompt: int) -> np.ndarray:
    return np.array(prompt, np.int32)


EOS = 0
PROMPTS = [row(5, 6, 7), row(8)]
RESPONSES = [row(9, EOS), row(EOS, 3, 4, EOS)]  # an EOS within a response stays, too


def predicted(batch: MicroBatch) -> list[tuple[int, int]]:
    width = batch.input_ids_BT.shape[1]
    return [(int(i) // width, int(i) % width) for i in batch.response_index_N]


def test_each_response_token_is_predicted_from_the_position_before_it() -> None:
    batch = collate(PROMPTS, RESPONSES, pad_id=EOS)
    assert predicted(batch) == [(0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)]
    assert batch.targets_N.tolist() == [9, EOS, EOS, 3, 4, EOS]
    assert batch.num_response_tokens == 6


def test_padding_that_is_the_eos_token_costs_no_eos() -> None:
    with_eos, with_other = (collate(PROMPTS, RESPONSES, pad_id=pad) for pad in (EOS, 99))
    assert torch.equal(with_eos.targets_N, with_other.targets_N)
    assert torch.equal(with_eos.response_index_N, with_other.response_index_N)
    assert torch.equal(with_eos.attention_mask_BT, with_other.attention_mask_BT)


def test_rows_are_padded_on_the_right_and_masked() -> None:
    batch = collate(PROMPTS, RESPONSES, pad_id=99)
    assert batch.input_ids_BT.tolist() == [[5, 6, 7, 9, 0, 99, 99, 99], [8, 0, 3, 4, 0, 99, 99, 99]]
    assert batch.attention_mask_BT.tolist() == [[1] * 5 + [0] * 3] * 2
    assert batch.input_ids_BT.dtype == batch.attention_mask_BT.dtype == batch.targets_N.dtype == torch.int64


@pytest.mark.parametrize(("length", "multiple", "width"), [(8, 8, 8), (9, 8, 16), (9, 1, 9), (3, 64, 64)])
def test_the_width_is_rounded_up_to_a_multiple(length: int, multiple: int, width: int) -> None:
    batch = collate([row(1)], [np.ones(length - 1, np.int32)], 0, multiple)
    assert batch.input_ids_BT.shape == (1, width)
    assert batch.num_response_tokens == length - 1


def test_a_row_that_fills_the_width_keeps_its_last_token() -> None:
    batch = collate([row(1, 2), row(3)], [row(4, EOS), row(5)], EOS, multiple=4)
    assert batch.targets_N.tolist() == [4, EOS, 5]
    assert predicted(batch)[-1] == (1, 0)


def test_moving_a_batch_keeps_all_of_it() -> None:
    batch = collate(PROMPTS, RESPONSES, EOS).to("meta")
    assert batch.input_ids_BT.is_meta and batch.targets_N.is_meta and batch.teacher_outputs == ()


def test_packed_rows_follow_each_other_without_padding() -> None:
    batch = pack(PROMPTS, RESPONSES)
    assert batch.input_ids_BT.tolist() == [[5, 6, 7, 9, EOS, 8, EOS, 3, 4, EOS]]
    assert batch.row_lengths == (5, 5) and batch.attention_mask_BT.tolist() == [[1] * 10]
    assert batch.response_index_N.tolist() == [2, 3, 5, 6, 7, 8]
    assert torch.equal(batch.targets_N, collate(PROMPTS, RESPONSES, EOS).targets_N)


@pytest.mark.parametrize("lengths", [[(1, 1)], [(3, 5), (1, 1), (6, 2)], [(2, 2)] * 3])
def test_packed_rows_that_are_padded_again_are_the_padded_rows(lengths: list[tuple[int, int]]) -> None:
    rng = np.random.default_rng(0)
    prompts, responses = ([rng.integers(1, 50, pair[side]) for pair in lengths] for side in (0, 1))
    padded, expected = pack(prompts, responses).padded(), collate(prompts, responses, 0, multiple=1)
    for name in ("input_ids_BT", "attention_mask_BT", "response_index_N", "targets_N"):
        assert torch.equal(getattr(padded, name), getattr(expected, name)), name
    assert padded.row_lengths is None and padded.padded() is padded
