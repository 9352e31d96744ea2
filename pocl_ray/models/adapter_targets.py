"""Which weights of a student get a low-rank adapter, and which share of its layers that is.

Most weights belong to linear layers. Mixtures of experts keep theirs as tensors of shape (experts, ., .) in one module,
which is no linear layer; an adapter of such a tensor has one pair of low-rank matrices for each expert.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pocl_ray.config import LoraConfig
from pocl_ray.errors import ConfigError
from pocl_ray.models.heads import split_model
from pocl_ray.records import Coverage

_MODULES, _PARAMETERS = "student.lora.target_modules", "student.lora.target_parameters"


def target_layers(model: PreTrainedModel, target_modules: Sequence[str] | None) -> list[str]:
    """Return the full names of the linear layers that get an adapter.

    Args:
        model: Student; it may be on the meta device.
        target_modules: Names of layers, or ends of names after a dot; None for every linear layer except the LM head.

    Raises:
        ConfigError: A target matches no linear layer, or it is the LM head. The message names the existing layers.
    """
    head = split_model(model).head
    linear = {name: module for name, module in model.named_modules() if _is_linear(module)}
    body = [name for name, module in linear.items() if module is not head]
    if target_modules is None:
        return body
    existing = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in body))
    for target in target_modules:
        if any(_matches(name, target) for name in body):
            continue
        if any(_matches(name, target) for name in linear):
            raise ConfigError(f"{_MODULES}: '{target}' is the LM head, which stays frozen; choose among {existing}")
        raise ConfigError(
            f"{_MODULES}: '{target}' matches no linear layer of {type(model).__name__}; it has {existing}"
        )
    return [name for name in body if any(_matches(name, target) for target in target_modules)]


def target_weights(model: PreTrainedModel, lora: LoraConfig) -> list[str]:
    """Return the full names of the parameters, such as fused experts, that get an adapter.

    Without `target_parameters` these are all fused experts if all linear layers are adapted, and else none.

    Raises:
        ConfigError: A target matches no such parameter, or dropout is set, which these adapters cannot have.
    """
    if lora.target_parameters is None:
        found = _experts(model) if lora.target_modules is None else []
    else:
        found = _named_weights(model, lora.target_parameters)
    if found and lora.dropout > 0:
        raise ConfigError(
            f"student.lora.dropout: an adapter of {_short(found[0])}, which is no layer of its own, has no input to "
            f"drop; set dropout to 0, or {_PARAMETERS} to [] to leave such weights as they are"
        )
    return found


def coverage(model: PreTrainedModel, lora: LoraConfig) -> Coverage:
    """Return how much of a student without adapters they would change; it may be on the meta device."""
    head = split_model(model).head
    adapted = {f"{name}.weight" for name in target_layers(model, lora.target_modules)}
    adapted.update(target_weights(model, lora))
    sizes = {
        f"{place}.{name}": parameter.numel()
        for place, module in model.named_modules()
        if module is not head and not isinstance(module, nn.Embedding)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1 and not name.endswith("bias")
    }
    left_out = tuple(dict.fromkeys(_short(name) for name in _experts(model) if name not in adapted))
    return Coverage(sum(sizes.values()), sum(size for name, size in sizes.items() if name in adapted), left_out)


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer. A router may be derived from one, but it returns more than a tensor."""
    return isinstance(module, (nn.Linear, Conv1D)) and "Router" not in type(module).__name__


def _experts(model: PreTrainedModel) -> list[str]:
    """The full names of the fused experts: tensors (experts, ., .) of a module that is named after them."""
    return [
        f"{place}.{name}"
        for place, module in model.named_modules()
        if "expert" in f"{place.rpartition('.')[2]} {type(module).__name__}".lower()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    ]


def _named_weights(model: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    known = [
        f"{place}.{name}"
        for place, module in model.named_modules()
        if place and not type(module).__module__.startswith("torch.nn.") and not isinstance(module, (nn.Linear, Conv1D))
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() in (2, 3) and not name.endswith("bias")
    ]
    for target in targets:
        if not any(_matches(name, target) for name in known):
            raise ConfigError(f"{_PARAMETERS}: '{target}' {_why_not(model, target, known)}")
    return [name for name in known if any(_matches(name, target) for target in targets)]


def _why_not(model: PreTrainedModel, target: str, known: Sequence[str]) -> str:
    """The reason why a target matches none of the parameters that could get an adapter."""
    shorts = list(dict.fromkeys(map(_short, known)))
    layer = target.removesuffix(".weight")
    if any(_matches(name, layer) and _is_linear(module) for name, module in model.named_modules()):
        return f"is the weight of a linear layer; name the layer, {layer}, in target_modules"
    if not known:
        return f"matches nothing: all matrices of {type(model).__name__} belong to layers; use target_modules"
    near = difflib.get_close_matches(target, shorts, n=3, cutoff=0.0)
    return f"matches no parameter of {type(model).__name__} that is no layer of its own; nearest are {', '.join(near)}"


def _short(name: str) -> str:
    """The end of a parameter's name that all layers share: its own name and that of its module."""
    return ".".join(name.split(".")[-2:])


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
