"""Frozen models in 8 bit, through bitsandbytes (LLM.int8(), arXiv 2208.07339), which is an extra and needs a CUDA GPU.

The linear layers of the body are quantized; embeddings and the LM head stay as they are, so that hidden states and head
work as everywhere.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from pocl_ray.errors import ResourceError

INSTALL = "pip install 'pocl-ray[int8]'"


def check_int8(name: str, has_gpu: bool = True) -> None:
    """Check that a model can be loaded in 8 bit.

    Args:
        name: The model, or its key in the config.
        has_gpu: Whether it would be loaded to a CUDA GPU.

    Raises:
        ResourceError: bitsandbytes is not installed, or there is no GPU.
    """
    if find_spec("bitsandbytes") is None:
        raise ResourceError(f"{name}: quantization int8 needs bitsandbytes, which is not installed: {INSTALL}")
    if not has_gpu:
        raise ResourceError(f"{name}: quantization int8 needs a CUDA GPU, and none is used; set quantization to none")


def int8_options(name: str, device: torch.device) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that load a model in 8 bit, straight to its device.

    Raises:
        ResourceError: bitsandbytes is not installed, or the device is no CUDA GPU.
    """
    check_int8(name, device.type == "cuda")
    return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": device}}
