"""Runs a training as two processes on this machine, as `torchrun` would."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch
import torch.multiprocessing as mp


def run_as_two(train: Callable[[int, Path], None], folder: Path) -> None:
    """Call a function of rank and folder in two processes; it sets up and leaves open its process group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(_as_rank, (train, port, folder), 2, start_method="forkserver")


def _as_rank(rank: int, train: Callable[[int, Path], None], port: int, folder: Path) -> None:
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(own, MASTER_PORT=str(port))
    train(rank, folder)
    torch.distributed.destroy_process_group()
