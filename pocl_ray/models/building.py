"""A new model from an architecture, with random weights that depend on the seed alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from pocl_ray.errors import ModelError
from pocl_ray.models.places import nearest

MAX_LAYERS, MAX_SIZE = 10_000, 100_000_000
_FROM_TOKENIZER = ("vocab_size", "eos_token_id", "bos_token_id", "pad_token_id")


def build_model(
    architecture: Mapping[str, Any], vocab_size: int, eos_id: int, bos_id: int | None, seed: int
) -> PreTrainedModel:
    """Return a new float32 causal language model with random weights.

    The config gets no pad token. With pad = eos the embedding row of eos would never be trained; the attention mask
    marks padding. The generation config has both tokens.

    Args:
        architecture: `model_type` and any keys of that type's config, such as `hidden_size`.
        vocab_size: Number of rows of the embedding; the tokenizer's size or more.
        eos_id: Token id that ends a response.
        bos_id: Token id that begins a text, if the tokenizer has one.
        seed: Seed of the initial weights; the global random state does not change.

    Returns:
        The model, in training mode on the CPU.

    Raises:
        ModelError: `model_type` or a key is unknown, or values contradict each other.
    """
    keys = dict(architecture)
    model_type = keys.pop("model_type", None)
    if model_type is None:
        raise ModelError("architecture: names no model_type, such as 'llama'")
    if model_type not in CONFIG_MAPPING:
        raise ModelError(f"architecture.model_type: unknown {model_type!r}{nearest(model_type, CONFIG_MAPPING)}")
    if CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"architecture.model_type: {model_type!r} is not a causal language model")
    _check_keys(model_type, keys)
    tokens = {"vocab_size": vocab_size, "eos_token_id": eos_id, "bos_token_id": bos_id, "pad_token_id": None}
    try:
        config = AutoConfig.for_model(model_type, **keys, **tokens)
        _check_depth(model_type, config)
        model = model_from_config(config, seed)
    except (StrictDataclassError, ArithmeticError, LookupError, ValueError, TypeError, RuntimeError) as error:
        unknown = " is no value that it knows" if isinstance(error, LookupError) else ""
        raise ModelError(f"architecture: {model_type!r}: {last_line(error)}{unknown}") from error
    model.generation_config.eos_token_id = eos_id
    model.generation_config.pad_token_id = eos_id
    return model.train()


def model_from_config(config: PreTrainedConfig, seed: int, **options: Any) -> PreTrainedModel:
    """Return a causal language model with random weights from `seed`; the global random state does not change.

    Args:
        config: Config of the model.
        seed: Seed of the weights.
        options: Further arguments, such as `dtype` (float32 by default) and `attn_implementation`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, **{"dtype": torch.float32, **options})


def _check_depth(model_type: str, config: PreTrainedConfig) -> None:
    """Refuse a model without layers, which transformers builds from embedding and head alone."""
    text = config.get_text_config()
    depth = getattr(text, "num_hidden_layers", None)
    if isinstance(depth, int) and depth < 1:
        name = text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        raise ModelError(f"architecture.{name}: {depth} layers make no {model_type!r} model; set it to 1 or more")


def _check_keys(model_type: str, keys: Mapping[str, Any]) -> None:
    """Refuse unknown keys, which transformers ignores: a misspelt `hidden_szie` would give the default size."""
    for name in keys:
        if name in _FROM_TOKENIZER:
            raise ModelError(f"architecture.{name}: comes from the tokenizer; leave it out")
    default = AutoConfig.for_model(model_type)
    known = set(default.to_dict()) | set(default.attribute_map) | {"head_dim", "rope_theta"}
    for name in keys:
        if name not in known:
            raise ModelError(f"architecture.{name}: {model_type!r} has no such key{nearest(name, known)}")
        largest = MAX_LAYERS if name.endswith(("layers", "layer")) else MAX_SIZE
        if isinstance(keys[name], int) and not isinstance(keys[name], bool) and keys[name] > largest:
            raise ModelError(
                f"architecture.{name}: {keys[name]} is more than any model has; set it to {largest} or less"
            )


def last_line(error: Exception) -> str:
    """Return the last line of an error's message, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
