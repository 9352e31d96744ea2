"""The process group of the training workers: what each worker is told, and that all of them meet."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import ray.train.torch
import ray.util
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pocl_ray.ray_train import process_group
from pocl_ray.ray_train.process_group import ProcessGroupConfig, free_address, join, leave

CONTEXT = SimpleNamespace(get_local_rank=lambda: 1, get_local_world_size=lambda: 2, get_node_rank=lambda: 3)


class OneWorker:
    """A worker group of this process."""

    def __len__(self) -> int:
        return 1

    def execute_single(self, rank: int, function: Any, *arguments: Any) -> Any:
        return function(*arguments)

    def execute_single_async(self, rank: int, function: Any, *arguments: Any) -> Any:
        return function(*arguments)

    def execute_async(self, function: Any) -> list[Any]:
        return [function()]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(ray.train, "get_context", lambda: CONTEXT)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(process_group.ray, "get", lambda results, **_: results)


def test_a_group_stands_until_it_is_left(here: None) -> None:
    config = ProcessGroupConfig("gloo", 60)
    backend = config.backend_cls()
    backend.on_start(OneWorker(), config)
    try:
        assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (0, 1, "gloo")
        told = {
            name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK")
        }
        assert told == {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "3"}
        assert os.environ["ACCELERATE_TORCH_DEVICE"] == "cpu"
        with config.train_func_context():
            pass
        backend.on_shutdown(OneWorker(), config)
    finally:
        dist.destroy_process_group()


def _meet(rank: int, port: int, folder: str) -> None:
    ray.train.get_context = lambda: CONTEXT
    ray.train.torch.get_device = lambda: torch.device("cpu")
    join("127.0.0.1", port, rank, 2, "gloo", 60)
    total = torch.tensor(rank + 1.0)
    dist.all_reduce(total)
    leave()
    (Path(folder) / str(rank)).write_text(f"{total.item()} {dist.is_initialized()}")


def test_two_workers_meet_and_leave(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(_meet, (port, str(tmp_path)), 2, start_method="forkserver")
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["3.0 False"] * 2


def test_a_free_address_can_be_listened_on(here: None) -> None:
    address, port = free_address()
    assert address == "127.0.0.1" and 0 < port < 65536


def test_the_train_page_is_told_of_torch() -> None:
    assert ProcessGroupConfig().framework.name == "TORCH"
    assert ProcessGroupConfig("nccl", 5).to_dict() == {"backend": "nccl", "timeout_s": 5}
