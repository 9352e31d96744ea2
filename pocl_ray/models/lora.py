"""Low-rank adapters (LoRA, arXiv 2106.09685) by peft: how they are added to a student, written, and merged.

An adapter adds `alpha / rank * B A` to the weight W, of shape (out, in), of a linear layer. Only A and B are trained;
their shapes are (rank, in) and (out, rank). Fused experts (experts, out, in) have one A and one B for each expert.
Adapters are placed inside the layers. The student keeps its class, its body and its head, so that all code for models
also works on it. The LM head gets no adapter: the loss uses its weight directly, in chunks, and an adapter on a head
that is tied to the embedding could not be merged.

peft is imported where it is used, because it is an extra.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from pocl_ray.config import LoraConfig
from pocl_ray.errors import ConfigError, ModelError
from pocl_ray.models.adapter_targets import target_layers, target_weights
from pocl_ray.models.places import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ModelRef, adapter_config, adapter_file
from pocl_ray.models.saving import atomic_directory, write_model_files

ADAPTER = "adapter"
"""The name of the adapters' folder inside a student's directory."""

_NAME = "default"
_PREFIX = "base_model.model."  # prefix of module names in peft's files


def import_peft(place: str) -> Any:
    """Return the module peft.

    Raises:
        ConfigError: peft is not installed.
    """
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ConfigError(
            f"{place}: needs peft, which is not installed ({error}): pip install 'pocl-ray[lora]'"
        ) from None


def add_adapters(student: PreTrainedModel, lora: LoraConfig, seed: int) -> None:
    """Add new adapters to a student, in place, and freeze all other weights.

    A is random and B is zero, so the student's outputs do not change.

    Args:
        student: Complete student (not partitioned by ZeRO-3).
        lora: Rank, scale, dropout and targets.
        seed: Seed of the adapters' weights; the global random state does not change.

    Raises:
        ConfigError: peft is missing, a target matches nothing, or dropout is set where it cannot be.
    """
    peft = import_peft("student.lora")
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=target_layers(student, lora.target_modules),
        target_parameters=target_weights(student, lora) or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in student.modules()),
        task_type="CAUSAL_LM",
    )
    with _quiet(seed):
        peft.inject_adapter_in_model(config, student, _NAME)


def add_same_adapters(copy: PreTrainedModel, student: PreTrainedModel) -> None:
    """Add the student's adapters, if any, to a copy of it, so that both have the same parameter names."""
    for name, config in getattr(student, "peft_config", {}).items():
        with _quiet(seed=0):
            import_peft("student.lora").inject_adapter_in_model(config, copy, name)


def adapters_of_parameters(model: nn.Module) -> list[nn.Module]:
    """Return the modules that adapt parameters such as fused experts; of those that are nested, the outermost."""
    if "peft" not in sys.modules:
        return []
    wrapper = importlib.import_module("peft.tuners.lora").ParamWrapper
    found = {name: module for name, module in model.named_modules() if isinstance(module, wrapper)}
    return [module for name, module in found.items() if name.rpartition(".")[0] not in found]


def save_student(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    directory: Path,
    lora: LoraConfig | None,
    base: str,
    loaded_as: str = "auto",
) -> None:
    """Write a trained student: a plain model, and next to it the trained adapters in their own folder.

    Args:
        student: Student in float32, with adapters if `lora` is given; it is changed.
        tokenizer: Tokenizer of the student.
        dtype: Dtype of the written model. Adapters are merged in float32 and written in float32.
        directory: Target directory; it is replaced if it exists.
        lora: Config of the adapters; without `merge` no plain model is written.
        base: Place of the model that the adapters belong to.
        loaded_as: Dtype that the model is evaluated in, which transformers alone then loads it in as well.

    Raises:
        StorageError: The place cannot be written.
    """
    with atomic_directory(directory) as staging:
        if lora is not None:
            save_adapters(student, base, staging / ADAPTER)
            merge_adapters(student)
        if lora is None or lora.merge:
            nn.Module.to(student, dtype)
            write_model_files(student, tokenizer, staging, loaded_as)
        else:
            tokenizer.save_pretrained(staging)


def save_adapters(student: PreTrainedModel, base: str, directory: Path) -> None:
    """Write a student's adapters in peft's format: `adapter_config.json` and `adapter_model.safetensors`, in float32.

    Args:
        student: Student with adapters.
        base: Place of the model that the adapters belong to.
        directory: Target directory; it is created if it is missing.
    """
    peft = import_peft("student.lora")
    directory.mkdir(parents=True, exist_ok=True)
    state = peft.get_peft_model_state_dict(student, adapter_name=_NAME, save_embedding_layers=False)
    tensors = {f"{_PREFIX}{name}": tensor.float().contiguous() for name, tensor in state.items()}
    save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = student.peft_config[_NAME]
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(str(directory))


def merge_adapters(student: PreTrainedModel) -> PreTrainedModel:
    """Return the plain model of a student: adapters are added to its weights and removed, in place."""
    layer_class = importlib.import_module("peft.tuners.lora").LoraLayer
    adapted = {name: module for name, module in student.named_modules() if isinstance(module, layer_class)}
    for module in adapted.values():
        module.merge()
    for name, module in adapted.items():
        parent, _, leaf = name.rpartition(".")
        if parent not in adapted:  # adapters of several parameters of one module are nested
            setattr(student.get_submodule(parent), leaf, module.get_base_layer())
    del student.peft_config
    return student.requires_grad_(True)


def merged_with_adapter(model: PreTrainedModel, ref: ModelRef) -> PreTrainedModel:
    """Return a model, which was just loaded, with the adapter of `ref` merged into it.

    Args:
        model: Model that the adapter belongs to; it is changed.
        ref: Reference with the adapter's directory or Hub id.

    Returns:
        The plain model in its former dtype, with no frozen weights.

    Raises:
        ModelError: The adapter is missing, is not a LoRA, is not in safetensors, or fits another model.
        ConfigError: peft is missing.
    """
    assert ref.adapter is not None
    peft = import_peft(ref.adapter)
    check_adapter(ref)
    config_file, weights_file = adapter_file(ref, ADAPTER_CONFIG), adapter_file(ref, ADAPTER_WEIGHTS)
    assert config_file is not None and weights_file is not None
    try:
        config = peft.PeftConfig.from_pretrained(str(config_file.parent))
        with _quiet(seed=0):
            wrapped = peft.get_peft_model(model, config)
            tensors = load_file(weights_file)
            unknown = peft.set_peft_model_state_dict(wrapped, tensors).unexpected_keys
            wanted = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
            differing = sorted({*unknown, *(wanted.keys() - tensors.keys())})
            if differing:
                raise ModelError(f"{ref.adapter}: does not fit {ref.path}: {differing[0]} is in one of them alone")
            return wrapped.merge_and_unload().requires_grad_(True)  # a teacher may be fine-tuned next
    except (ValueError, RuntimeError, TypeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise ModelError(f"{ref.adapter}: cannot be merged into {ref.path}: {reason}") from error


def check_adapter(ref: ModelRef) -> None:
    """Check that the adapter of a reference exists and can be merged, before anything large is read.

    Raises:
        ModelError: The adapter has no config or no safetensors, or is not a LoRA.
    """
    kind = adapter_config(ref).get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{ref.adapter}: is a {kind} adapter; only LoRA is merged")
    if adapter_file(ref, ADAPTER_WEIGHTS) is None:
        raise ModelError(f"{ref.adapter}: has no {ADAPTER_WEIGHTS}; only safetensors are read")


def adapter_changes(ref: ModelRef, parameters: Sequence[str]) -> bool:
    """Return whether the adapter of `ref`, if any, changes a named parameter, such as the LM head's weight."""
    if ref.adapter is None:
        return False
    check_adapter(ref)
    file = adapter_file(ref, ADAPTER_WEIGHTS)
    assert file is not None
    with safe_open(file, framework="pt") as stored:
        names = list(stored.keys())
    modules = [f"{_PREFIX}{name.rpartition('.')[0]}." for name in parameters]
    return any(name.startswith(module) for name in names for module in modules)


@contextmanager
def _quiet(seed: int) -> Iterator[None]:
    """Use random numbers from `seed`, restore the global random state afterwards, and hide peft's warnings."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", RuntimeWarning)  # of patterns in a config that fit no layer
        torch.manual_seed(seed)
        yield
