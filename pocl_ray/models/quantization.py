"""Frozen models in 8 bit, through bitsandbytes (LLM.int8(), arXiv 2208.07339), which is an extra.

The linear layers of the body are quantized; embeddings and the LM head stay as they are, so that hidden states and head
work as everywhere. Meant for CUDA GPUs; CPUs do it too.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from pocl_ray.errors import ResourceError

INSTALL = "pip install 'pocl-ray[int8]'"


def check_int8(name: str) -> None:
    """Check that a model can be loaded in 8 bit.

    Args:
        name: The model, or its key in the config.

    Raises:
        ResourceError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise ResourceError(f"{name}: quantization int8 needs bitsandbytes, which is not installed: {INSTALL}")


def int8_options(name: str, device: torch.device) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that load a model in 8 bit, straight to its device.

    Raises:
        ResourceError: bitsandbytes is not installed.
    """
    check_int8(name)
    # Its products are taken in float16, which it says at every one of them.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": device}}
