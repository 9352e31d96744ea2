"""DeepSpeed as a training worker imports it: without what it compiles at first use, and joined to its process group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pocl_ray.errors import ConfigError


def check_precision(precision: str, accelerator: Any) -> None:
    """Refuse a precision that DeepSpeed cannot train in on this device.

    Raises:
        ConfigError: It is fp16 or bf16, and the device lacks it.
    """
    supported = {
        "fp32": lambda: True,
        "bf16": accelerator.is_bf16_supported,
        "fp16": accelerator.is_fp16_supported,
    }[precision]
    if not supported():
        others = " or ".join(name for name in ("bf16", "fp32") if name != precision)
        raise ConfigError(
            f"train.precision: {precision} cannot be trained in on {accelerator.device_name()}; set {others}"
        )


def import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed and join its communication layer to the process group that stands already.

    On a CPU its shared-memory op is left out: it is compiled at first use, and a missing compiler must not stop a run.
    """
    with without_dynamo():
        if device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        deepspeed.logger.setLevel("WARNING")
        if device.type == "cpu":
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = "nccl" if device.type == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return deepspeed


@contextmanager
def without_dynamo() -> Iterator[None]:
    """Let what is decorated with `torch.compile` stay as it is while the block runs; otherwise inductor is imported."""
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before
