"""A student cut from its teacher: some of its layers, evenly spaced, everything else as it is."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from pocl_ray.errors import ModelError
from pocl_ray.models.building import model_from_config
from pocl_ray.models.loading import release_eos_row


def evenly_spaced(num_layers: int, num_teacher_layers: int) -> tuple[int, ...]:
    """Return the layers that a student keeps: the first, the last and evenly between; one layer is the first.

    Raises:
        ModelError: fewer than one layer, or more than the teacher has.
    """
    if not 1 <= num_layers <= num_teacher_layers:
        raise ModelError(f"num_layers: {num_layers} of a teacher with {num_teacher_layers} layers; give 1 to that many")
    gaps = max(num_layers - 1, 1)
    # Rounded half up in integers: round() would go to the even neighbour and space them by the parity of the index.
    return tuple((2 * i * (num_teacher_layers - 1) + gaps) // (2 * gaps) for i in range(num_layers))


def cut_layers(model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """Make a student of some of a teacher's layers.

    The student is a model of its own, built from an adjusted config, so that everything that depends on depth (layer
    indices of the KV cache, kinds of layers) is as if it had always been this deep. The teacher is left as it was.

    Args:
        model: the teacher, with its weights whole (not partitioned by ZeRO-3).
        num_layers: layers to keep, 1 to all.

    Returns:
        The student in training mode, in the teacher's dtype and on its device.

    Raises:
        ModelError: more layers than the teacher has, or a family that cannot be cut.
    """
    family = type(model).__name__
    if type(model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{family}: a student cannot be cut from a model that brings its own code")
    kept = evenly_spaced(num_layers, model.config.num_hidden_layers)
    prefix = _layers_prefix(model)
    config = _cut_config(model.config, kept)
    attention = getattr(model.config, "_attn_implementation", None)
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    student = model_from_config(config, seed=0, dtype=model.dtype, **options)
    try:
        student.load_state_dict(_cut_state(model.state_dict(), prefix, kept), strict=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{family}: a student cannot be cut from this family ({reason})") from error
    student.generation_config = copy.deepcopy(model.generation_config)
    release_eos_row(student)
    nn.Module.to(student, model.device)
    return student.train()


def _layers_prefix(model: PreTrainedModel) -> str:
    """The name of the list of layers, such as `model.layers`."""
    depth = model.config.num_hidden_layers
    lists = [
        name
        for name, module in model.base_model.named_modules(prefix=model.base_model_prefix)
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    top = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists if other != name)]
    if len(top) != 1:
        raise ModelError(f"{type(model).__name__}: a student cannot be cut from it (lists of layers found: {top})")
    return top[0]


def _cut_config(config: PreTrainedConfig, kept: tuple[int, ...]) -> PreTrainedConfig:
    """The student's config; what the teacher's lists per layer (`layer_types`, `no_rope_layers`) is cut alike."""
    depth = config.num_hidden_layers
    fields = config.to_dict()
    for name, value in fields.items():
        if "layer" in name and isinstance(value, list) and len(value) == depth:
            fields[name] = [value[i] for i in kept]
    fields[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(kept)
    fields.pop("_name_or_path", None)
    return type(config).from_dict(fields)


def _cut_state(state: dict[str, Tensor], prefix: str, kept: tuple[int, ...]) -> dict[str, Tensor]:
    """Weights by the student's names: layer kept[j] becomes layer j."""
    place_of = {layer: place for place, layer in enumerate(kept)}
    cut: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith(f"{prefix}."):
            cut[name] = tensor
            continue
        layer, _, rest = name.removeprefix(f"{prefix}.").partition(".")
        if int(layer) in place_of:
            cut[f"{prefix}.{place_of[int(layer)]}.{rest}"] = tensor
    return cut
