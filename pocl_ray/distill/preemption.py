"""Notices that a node is about to be taken away: all workers learn of one at the same step, and save a checkpoint.

Ray Train's watcher tells each worker process by itself (spot instances, `ray drain-node`). Its own function for asking,
`ray.train.get_preemption_info`, waits for all workers through an actor, which is too slow for every step; so what a
worker was told is read where it lies, and the workers agree in one reduction of a number.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from ray.train import PreemptionInfo
from ray.train.v2._internal.execution.context import get_train_context

WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
SAVE_EVERY_S = 30.0
"""Training goes on until the node is gone, which may take minutes: so long is the work that is lost, at most."""


def watcher_is_on() -> bool:
    """Whether Ray Train watches for notices in this run."""
    return os.environ.get(WATCHER, "1") != "0"


def told_here() -> PreemptionInfo | None:
    """Return what this worker was told."""
    info: PreemptionInfo | None = get_train_context().preemption_context.preemption_info
    return info


class Notices:
    """Says when a checkpoint is to be saved because a node is about to go."""

    def __init__(
        self,
        device: torch.device,
        on_notice: Callable[[], object],
        told: Callable[[], PreemptionInfo | None] = told_here,
    ) -> None:
        """Set it up.

        Args:
            device: Where the process group computes.
            on_notice: Called on every worker when a checkpoint is about to be saved.
            told: Returns what this worker was told.
        """
        self._device, self._on_notice, self._told = device, on_notice, told
        self._saved_at = float("-inf")

    def ask_for_checkpoint(self) -> bool:
        """Whether to save now: at the first notice, and every SAVE_EVERY_S after it; collective."""
        is_due = self._told() is not None and time.monotonic() - self._saved_at > SAVE_EVERY_S
        flag = torch.tensor(float(is_due), device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if not flag.item():
            return False
        self._saved_at = time.monotonic()
        self._on_notice()
        return True
