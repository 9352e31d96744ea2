"""Low-rank adapters (LoRA, arXiv 2106.09685) by peft: put into a student, written, and merged into a model's weights.

An adapter of a linear layer with weight W, of shape (out, in), adds `alpha / rank * B A` to it; A and B alone are
trained, of shapes (rank, in) and (out, rank). They are put inside the layers: the student keeps its class, its body and
its head, so that all that works on a model works on it. The LM head gets none: the loss takes its weight directly, in
chunks, and where it is tied to the embedding an adapter on one of the two could not be merged.

peft is imported where it is used: it is an extra.
"""

from __future__ import annotations

import importlib
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
from pocl_ray.models.heads import split_model
from pocl_ray.models.places import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ModelRef, adapter_config, adapter_file
from pocl_ray.models.saving import atomic_directory, write_model_files

ADAPTER = "adapter"
"""The folder of a student's adapters inside its directory."""

_NAME = "default"
_PREFIX = "base_model.model."  # what peft puts before a module's name in its files


def import_peft(place: str) -> Any:
    """Return peft.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ConfigError(
            f"{place}: needs peft, which is not installed ({error}): pip install 'pocl-ray[lora]'"
        ) from None


def target_layers(model: PreTrainedModel, target_modules: Sequence[str] | None) -> list[str]:
    """Return the full names of the linear layers that get an adapter.

    Args:
        model: The student; may be on the meta device.
        target_modules: Names, or ends of names at a dot; None for every linear layer but the LM head.

    Raises:
        ConfigError: A target matches no linear layer, or the LM head; the message names the layers that exist.
    """
    head = split_model(model).head
    linear = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    body = [name for name, module in linear.items() if module is not head]
    if target_modules is None:
        return body
    place = "student.lora.target_modules"
    existing = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in body))
    for target in target_modules:
        if any(_matches(name, target) for name in body):
            continue
        if any(_matches(name, target) for name in linear):
            raise ConfigError(f"{place}: '{target}' is the LM head, which stays frozen; choose among {existing}")
        raise ConfigError(f"{place}: '{target}' matches no linear layer of {type(model).__name__}; it has {existing}")
    return [name for name in body if any(_matches(name, target) for target in target_modules)]


def add_adapters(student: PreTrainedModel, lora: LoraConfig, seed: int) -> None:
    """Put fresh adapters into a student, in place, and freeze everything else.

    A is drawn, B is zero: the student computes what it did before.

    Args:
        student: Whole (not partitioned by ZeRO-3).
        lora: Rank, scale, dropout and targets.
        seed: Of the adapters' weights; the global random state is left as it was.

    Raises:
        ConfigError: peft is missing, or a target matches nothing.
    """
    peft = import_peft("student.lora")
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=target_layers(student, lora.target_modules),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in student.modules()),
        task_type="CAUSAL_LM",
    )
    with _quiet(seed):
        peft.inject_adapter_in_model(config, student, _NAME)


def add_same_adapters(copy: PreTrainedModel, student: PreTrainedModel) -> None:
    """Put into a copy of a student the adapters that the student has, if any, so that names of parameters agree."""
    for name, config in getattr(student, "peft_config", {}).items():
        with _quiet(seed=0):
            import_peft("student.lora").inject_adapter_in_model(config, copy, name)


def save_student(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    directory: Path,
    lora: LoraConfig | None,
    base: str,
) -> None:
    """Write a trained student: a plain model, and the adapters that were trained, in a folder of their own.

    Args:
        student: In float32, with adapters in it where `lora` says so; it is changed.
        tokenizer: Its tokenizer.
        dtype: Of the written model; adapters are merged in float32 and stay in it.
        directory: Where to; replaced as a whole when it exists.
        lora: The adapters; with `merge` off there is no model beside them.
        base: Where the model lies that the adapters belong to.

    Raises:
        StorageError: The place cannot be written.
    """
    with atomic_directory(directory) as staging:
        if lora is not None:
            save_adapters(student, base, staging / ADAPTER)
            merge_adapters(student)
        if lora is None or lora.merge:
            nn.Module.to(student, dtype)
            write_model_files(student, tokenizer, staging)
        else:
            tokenizer.save_pretrained(staging)


def save_adapters(student: PreTrainedModel, base: str, directory: Path) -> None:
    """Write a student's adapters as peft does: `adapter_config.json` and `adapter_model.safetensors`, in float32.

    Args:
        student: With adapters in it.
        base: Where the model lies that the adapters belong to.
        directory: Where to; made if it is not there.
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
    """Add the adapters of a student to its weights and take them out, in place; return the plain model."""
    layer_class = importlib.import_module("peft.tuners.lora").LoraLayer
    for name, module in list(student.named_modules()):
        if isinstance(module, layer_class):
            module.merge()
            parent, _, leaf = name.rpartition(".")
            setattr(student.get_submodule(parent), leaf, module.get_base_layer())
    del student.peft_config
    return student.requires_grad_(True)


def merged_with_adapter(model: PreTrainedModel, ref: ModelRef) -> PreTrainedModel:
    """Merge the adapter that `ref` names into a model that has just been loaded.

    Args:
        model: The model that the adapter belongs to; changed.
        ref: Names the adapter, a directory or a Hub id.

    Returns:
        The plain model, in the dtype that it had, none of it frozen.

    Raises:
        ModelError: There is no such adapter, it is no LoRA, it is not in safetensors, or it fits another model.
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
    """Check that the adapter of a reference is there and can be merged, before anything large is read.

    Raises:
        ModelError: It has no config or no safetensors, or is of a kind other than LoRA.
    """
    kind = adapter_config(ref).get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{ref.adapter}: is a {kind} adapter; only LoRA is merged")
    if adapter_file(ref, ADAPTER_WEIGHTS) is None:
        raise ModelError(f"{ref.adapter}: has no {ADAPTER_WEIGHTS}; only safetensors are read")


def adapter_changes(ref: ModelRef, parameters: Sequence[str]) -> bool:
    """Whether the adapter of `ref`, if any, changes one of the named parameters, such as the LM head's weight."""
    if ref.adapter is None:
        return False
    check_adapter(ref)
    file = adapter_file(ref, ADAPTER_WEIGHTS)
    assert file is not None
    with safe_open(file, framework="pt") as stored:
        names = list(stored.keys())
    modules = [f"{_PREFIX}{name.rpartition('.')[0]}." for name in parameters]
    return any(name.startswith(module) for name in names for module in modules)


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


@contextmanager
def _quiet(seed: int) -> Iterator[None]:
    """Draw from `seed`, leave the global random state as it was, and keep peft's hints to its programmers away."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.manual_seed(seed)
        yield
