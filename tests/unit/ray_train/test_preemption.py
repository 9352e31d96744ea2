"""A notice that a node is about to go reaches all workers at the same step, and saves one checkpoint, not many."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ray.train import PreemptionInfo

from pocl_ray.distill.checkpoint import Progress
from pocl_ray.ray_train import worker
from pocl_ray.ray_train.worker import SAVE_EVERY_S, PreemptionNotices

INFO = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"node": [1]})
TOLD_AT = {0: 3, 1: 1}


def _worker(rank: int, world_size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    step = 0
    saved: list[int] = []
    notices = PreemptionNotices(
        torch.device("cpu"),
        lambda progress: saved.append(progress.step),
        lambda: INFO if step >= TOLD_AT[rank] else None,
    )
    answers = []
    for current in range(6):
        step = current
        answers.append(notices.ask_for_checkpoint(Progress(step=current)))
    torch.save({"saved": saved, "answers": answers}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_workers_that_are_told_at_different_steps_save_together(tmp_path: Path) -> None:
    mp.start_processes(_worker, (2, str(tmp_path)), 2, start_method="forkserver")
    for rank in (0, 1):
        seen: dict[str, Any] = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert seen == {"saved": [1], "answers": [False, True, False, False, False, False]}


def test_while_the_node_stays_the_work_since_is_saved_now_and_then(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=lambda: now.s))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        notices = PreemptionNotices(torch.device("cpu"), lambda _: None, lambda: INFO)
        answers = []
        for now.s in (0.0, 1.0, SAVE_EVERY_S + 1, SAVE_EVERY_S + 2):
            answers.append(notices.ask_for_checkpoint(Progress()))
    finally:
        dist.destroy_process_group()
    assert answers == [True, False, True, False]
