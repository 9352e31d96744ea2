"""The token budget that fills a GPU (`train.micro_batch_tokens: auto`), found once before the first step.

Memory grows in a straight line with the tokens of a micro-batch: the head's logits are made in chunks, and attention
keeps no matrix of scores. So two steps that change nothing are measured, of one row of the greatest length, and of two
such rows or, where those might not fit, of half a row. The line is followed to the GPU's memory less a margin. Nothing
but a row that does not fit by itself runs out of memory on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from pocl_ray.data.batching import PAD_MULTIPLE, MicroBatch
from pocl_ray.distill.engine import Engine
from pocl_ray.distill.state import TrainingState
from pocl_ray.distill.step import StepSettings
from pocl_ray.errors import ConfigError, ResourceError

MARGIN = 0.15  # for the fragments of the allocator, and for the teacher's logits of a chunk


class Memory(Protocol):
    """The memory of a worker's device.

    Attributes:
        num_bytes: All of it.
    """

    num_bytes: int

    def start(self) -> None:
        """Begin to look for a peak."""

    def peak_bytes(self) -> int:
        """Return the most that was held since `start`."""


class GpuMemory:
    """The memory of a GPU, as PyTorch's allocator reserves it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.num_bytes = torch.cuda.get_device_properties(device).total_memory

    def start(self) -> None:
        """Begin to look for a peak."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak_bytes(self) -> int:
        """Return the most that was reserved since `start`."""
        return int(torch.cuda.max_memory_reserved(self._device))


class FrozenReader(Protocol):
    """A model in memory that reads rows, such as a live teacher."""

    def hidden(
        self,
        input_ids_BT: torch.Tensor,
        attention_mask_BT: torch.Tensor,
        response_index_N: torch.Tensor,
        row_lengths: tuple[int, ...] | None = None,
    ) -> torch.Tensor:
        """Return the final hidden states of response positions."""


def fitting_tokens(peak_bytes: Callable[[int], int], longest: int, most: int, room_bytes: int) -> int:
    """Return the largest token budget that fits.

    Args:
        peak_bytes: Function that runs a step of so many tokens and returns the memory that it took at its peak.
        longest: Tokens of the longest row, which the budget must hold.
        most: Tokens of a worker's share of a global batch; more are never used.
        room_bytes: Memory of the GPU.

    Raises:
        ResourceError: The longest row does not fit.
    """
    first = peak_bytes(longest)
    fits_twice = 2 * first <= room_bytes or longest <= PAD_MULTIPLE  # a part of the memory is the model's, held once
    other = 2 * longest if fits_twice else -(-longest // 2 // PAD_MULTIPLE) * PAD_MULTIPLE
    bytes_a_token = max(1.0, (peak_bytes(other) - first) / (other - longest))
    held = longest + math.floor(((1.0 - MARGIN) * room_bytes - first) / bytes_a_token)
    if held < longest:
        raise ResourceError(
            f"train.micro_batch_tokens auto: a row of {longest} tokens takes {first / 2**30:.1f} of the GPU's "
            f"{room_bytes / 2**30:.1f} GiB, which leaves too little; set student.gradient_checkpointing to true, raise "
            "train.zero_stage, shorten rows with data.max_tokens, or set micro_batch_tokens to a number"
        )
    return max(longest, min(held, most))


def find_budget(
    engine: Engine,
    longest: int,
    num_rows: int,
    is_packed: bool,
    teachers: Sequence[FrozenReader] = (),
    memory: Memory | None = None,
) -> int:
    """Return the token budget for the GPUs of all workers; collective.

    Args:
        engine: Engine with the student; its weights and moments are the same afterwards.
        longest: Tokens of the longest row.
        num_rows: Rows of a worker's share of a global batch.
        is_packed: Whether rows are packed.
        teachers: Live teachers, which read the rows before the student does.
        memory: Memory to fill; None: that of the worker's GPU.

    Raises:
        ConfigError: The workers have no GPUs.
        ResourceError: The longest row does not fit a GPU.
    """
    if memory is None and engine.device.type != "cuda":
        raise ConfigError(
            "train.micro_batch_tokens: auto measures a GPU's memory, and this worker has none; set a number of tokens"
        )
    # The length that a row takes: padded ones are as wide as a multiple of 8.
    width = longest if is_packed else -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
    memory = memory or GpuMemory(engine.device)
    state = TrainingState(engine)  # allocates the moments: a first step would do so after the budget was found
    scaler = state.loss_scaler()

    def most_of_all(num_bytes: int) -> int:
        most = torch.tensor(num_bytes, device=engine.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most.item())

    def peak_bytes(num_tokens: int) -> int:
        memory.start()
        rehearse(engine, max(1, num_tokens // width), min(width, num_tokens), is_packed, teachers)
        return most_of_all(memory.peak_bytes())  # all workers must take the same steps

    room_bytes = -most_of_all(-memory.num_bytes)
    budget = fitting_tokens(peak_bytes, width, num_rows * width, room_bytes)
    state.set_loss_scaler(scaler)
    return budget


def rehearse(
    engine: Engine, num_rows: int, length: int, is_packed: bool, teachers: Sequence[FrozenReader] = ()
) -> None:
    """Run a step on rows of one length that changes nothing; collective.

    Args:
        engine: Engine with the student.
        num_rows: Number of rows.
        length: Tokens of each row, at least 2.
        is_packed: Whether rows are packed.
        teachers: Live teachers.
    """
    ids_1T = torch.zeros(1, num_rows * length, dtype=torch.int64)
    index_N = (torch.arange(num_rows)[:, None] * length + torch.arange(length - 1)).flatten()
    packed = MicroBatch(ids_1T, torch.ones_like(ids_1T), index_N, ids_1T[0, index_N], row_lengths=(length,) * num_rows)
    batch = packed if is_packed else packed.padded()
    held = [teacher.hidden(*batch.rows_input) for teacher in teachers]  # kept, as a step keeps them
    engine.rehearse(batch, StepSettings(kd_temperature=1.0, kd_ratio=0.0))
    del held
