"""Loading of a model's head alone from its safetensors: 1 GB of a 7B model in place of 15 GB."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from pocl_ray.errors import ModelError
from pocl_ray.models.heads import HeadWeights, LogitTransform, head_of
from pocl_ray.models.loading import load_model
from pocl_ray.models.lora import adapter_changes
from pocl_ray.models.places import ModelRef, check_place, find_file

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def load_head(ref: ModelRef, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> HeadWeights:
    """Return a model's head, loaded without the rest of the model.

    The model's own class, built without memory on the meta device, gives the names of the head's tensors. Only these
    tensors are read, and only their shard of a Hub model is downloaded. The whole model is loaded if that is not
    possible: for a class that comes with the model (`trust_remote_code`), quantized weights, tensors under the names of
    an older layout, or an adapter that changes the head.

    Args:
        ref: Model.
        device: Device of the head.
        dtype: Dtype that overrides `ref.dtype`; without either, the dtype that the model would be loaded in.

    Raises:
        ModelError: As in `load_model`.
    """
    check_place(ref)
    config = AutoConfig.from_pretrained(
        str(ref.directory or ref.path), revision=ref.revision, trust_remote_code=ref.trust_remote_code
    )
    wanted = dtype if dtype is not None else _dtype_of(ref, config)
    tensors = _read_head(ref, config)
    if tensors is None:
        return head_of(load_model(ref, device="cpu", dtype=dtype)).to(device)
    weight_VH, bias_V = tensors
    return HeadWeights(weight_VH, bias_V, LogitTransform.of(config)).to(device, wanted)


def _dtype_of(ref: ModelRef, config: PreTrainedConfig) -> torch.dtype | None:
    """The dtype that load_model would use; None means the dtype of the stored tensor."""
    if ref.dtype != "auto":
        return getattr(torch, ref.dtype)
    return config.dtype if isinstance(config.dtype, torch.dtype) else None


def _read_head(ref: ModelRef, config: PreTrainedConfig) -> tuple[Tensor, Tensor | None] | None:
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if not isinstance(architecture, type) or getattr(config, "quantization_config", None) is not None:
        return None
    with torch.device("meta"):
        skeleton = architecture(config)
    head = skeleton.get_output_embeddings()
    if head is None or adapter_changes(ref, _names_of(skeleton, head.weight)):
        return None
    weight_VH = _find_tensor(ref, _names_of(skeleton, head.weight), head.weight.shape)
    if weight_VH is None:
        return None
    if getattr(head, "bias", None) is None:
        return weight_VH, None
    bias_V = _find_tensor(ref, _names_of(skeleton, head.bias), head.bias.shape)
    return None if bias_V is None else (weight_VH, bias_V)


def _names_of(skeleton: PreTrainedModel, parameter: Tensor) -> list[str]:
    """All names that a parameter may be saved under, the head's own first; base models save without the prefix.

    A config may say that head and embedding are tied while the files hold a head of its own (merged adapters, resized
    heads). Then transformers computes with that one, so the embedding counts only where there is no other.
    """
    head = next(name for name, module in skeleton.named_modules() if module is skeleton.get_output_embeddings())
    names = [name for name, other in skeleton.named_parameters(remove_duplicate=False) if other is parameter]
    names.sort(key=lambda name: not name.startswith(f"{head}."))
    prefix = f"{skeleton.base_model_prefix}."
    return names + [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def _find_tensor(ref: ModelRef, names: list[str], shape: torch.Size) -> Tensor | None:
    """The first of the named tensors that exists, if it has the right shape."""
    path = find_file(ref, _SINGLE)
    if path is not None:
        return _read_tensor(path, names, shape)
    index_path = find_file(ref, _INDEX)
    if index_path is None:
        return None
    try:
        shard_of = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, KeyError) as error:
        raise ModelError(f"{index_path}: is not an index of safetensors shards ({error})") from None
    present = [name for name in names if name in shard_of]
    if not present:
        return None
    shard = find_file(ref, shard_of[present[0]])
    if shard is None:
        raise ModelError(f"{ref.path}: lacks the shard {shard_of[present[0]]} that its index names")
    return _read_tensor(shard, present, shape)


def _read_tensor(path: Path, names: list[str], shape: torch.Size) -> Tensor | None:
    try:
        with safe_open(path, framework="pt") as file:
            stored = set(file.keys())
            name = next((name for name in names if name in stored), None)
            if name is None:
                return None
            tensor: Tensor = file.get_tensor(name)
    except SafetensorError as error:
        raise ModelError(f"{path}: is not a readable safetensors file ({error})") from None
    return tensor if tensor.shape == shape and tensor.is_floating_point() else None
