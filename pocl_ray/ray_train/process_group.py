"""The torch process group of the training workers, set up by Ray Train's controller without torch in its own process.

`ray.train.torch.TorchConfig` does the same, but its module imports torch. The controller is a process of its own, which
starts with every training run and before the workers do, so a run would wait for that import twice.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train.backend import Backend, BackendConfig

from pocl_ray.ray_train.internals import TrainingFramework

SHUTDOWN_S = 30.0
"""The time limit for workers to leave a group that ends, as in Ray's own."""


@dataclass
class ProcessGroupConfig(BackendConfig):
    """Settings of the process group.

    Attributes:
        backend: nccl or gloo.
        timeout_s: Seconds after which a collective fails.
    """

    backend: str = "gloo"
    timeout_s: int = 1800

    @property
    def backend_cls(self) -> type[Backend]:
        """The class with which the controller sets up the group."""
        return ProcessGroupBackend

    @property
    def train_func_context(self) -> type:
        """The context that a worker enters before it trains."""
        return OwnDevice

    @property
    def framework(self) -> Any:
        """The framework that the dashboard's Train page shows."""
        return TrainingFramework.TORCH

    def to_dict(self) -> dict[str, Any]:
        """Return the settings for the dashboard."""
        return {"backend": self.backend, "timeout_s": self.timeout_s}


class ProcessGroupBackend(Backend):
    """Makes the workers form a process group and leave it; only the functions that they run use torch."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Make every worker join the group at rank 0's address."""
        assert isinstance(backend_config, ProcessGroupConfig)
        address, port = worker_group.execute_single(0, free_address)
        world_size, settings = len(worker_group), (backend_config.backend, backend_config.timeout_s)
        joins = [
            worker_group.execute_single_async(rank, join, address, port, rank, world_size, *settings)
            for rank in range(world_size)
        ]
        ray.get(joins)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Make every worker leave the group, without waiting longer than the time limit."""
        with suppress(GetTimeoutError):
            ray.get(worker_group.execute_async(leave), timeout=SHUTDOWN_S)


class OwnDevice:
    """Makes the GPU that Ray has given a worker its current one, while it trains."""

    def __enter__(self) -> None:
        import torch
        from ray.train.torch import get_device

        if torch.cuda.is_available() and (device := get_device()).type == "cuda":
            torch.cuda.set_device(device)

    def __exit__(self, *_: object) -> None:
        pass


def free_address() -> tuple[str, int]:
    """Return the address of this node, and a port that nobody listens on."""
    address = ray.util.get_node_ip_address()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.bind(("", 0))
        return address, int(probe.getsockname()[1])


def join(address: str, port: int, rank: int, world_size: int, backend: str, timeout_s: int) -> None:
    """Join the process group, with the variables of the environment that torchrun sets as well.

    Args:
        address: Address at which rank 0 listens.
        port: Port on which rank 0 listens.
        rank: Rank of this worker.
        world_size: Number of workers.
        backend: nccl or gloo.
        timeout_s: Seconds after which a collective fails.
    """
    import torch.distributed as dist
    from ray.train.torch import get_device

    context = ray.train.get_context()
    places = {
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": context.get_local_rank(),
        "LOCAL_WORLD_SIZE": context.get_local_world_size(),
        "NODE_RANK": context.get_node_rank(),
        "ACCELERATE_TORCH_DEVICE": get_device(),  # else Accelerate, of Hugging Face, may take another one
    }
    if backend == "nccl":  # a collective that times out ends the process, as in Ray's own set-up
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    os.environ.update({name: str(value) for name, value in places.items()})
    dist.init_process_group(backend, "env://", timedelta(seconds=timeout_s), world_size, rank)


def leave() -> None:
    """Leave the process group if there is one, and give up what a GPU holds in reserve."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
