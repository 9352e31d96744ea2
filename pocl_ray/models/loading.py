"""Loading of teachers, students and tokenizers, with one clear line if that fails.

Only safetensors are read, since a pickled `.bin` may run any code. A model's own Python code runs only if
`trust_remote_code` is set.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pocl_ray.errors import ModelError, ResourceError
from pocl_ray.models.lora import merged_with_adapter
from pocl_ray.models.places import Attention, ModelRef, check_place
from pocl_ray.models.saving import quiet_transformers

INSTALL = "pip install 'pocl-ray[int8]'"


def check_int8(name: str) -> None:
    """Check that a model can be loaded in 8 bit.

    Args:
        name: Name of the model, or its key in the config.

    Raises:
        ResourceError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise ResourceError(f"{name}: quantization int8 needs bitsandbytes, which is not installed: {INSTALL}")


def check_attention(key: str, attention: Attention) -> None:
    """Check that an attention implementation is installed.

    Args:
        key: Section of the model in the config.
        attention: Attention implementation.

    Raises:
        ResourceError: It is not installed.
    """
    # transformers takes the kernel from the package `kernels` where flash-attn itself is missing.
    if attention == "flash_attention_2" and not any(map(find_spec, ("flash_attn", "kernels"))):
        raise ResourceError(
            f"{key}.attention: flash_attention_2 needs flash-attn, which is not installed: pip install flash-attn, or "
            "set it to auto"
        )


def int8_options(name: str, device: torch.device) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that load a model in 8 bit, directly onto its device.

    bitsandbytes quantizes the linear layers of the body (LLM.int8(), arXiv 2208.07339). Embeddings and the LM head stay
    as they are, so that hidden states and head work as in other models.

    Raises:
        ResourceError: bitsandbytes is not installed.
    """
    check_int8(name)
    # It computes products in float16, and prints a warning for each of them.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": device}}


def load_model(
    ref: ModelRef,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    eval_mode: bool = True,
) -> PreTrainedModel:
    """Return a causal language model, with its adapter merged if it has one.

    Args:
        ref: Model to load.
        device: Device of the model.
        dtype: Dtype that overrides `ref.dtype`.
        eval_mode: Whether dropout is off (teachers, scoring, generation); False for a model that will be trained.

    Returns:
        The model. Its embedding has a gradient for the eos token, even if that is also the pad token.

    Raises:
        ModelError: The model is missing; its weights are unsafe, missing, damaged or of another shape than in
            config.json; its architecture is unknown; its attention implementation is not available; or its adapter does
            not fit.
        ResourceError: The machine has no GPU but one is requested, or 8 bit is not possible.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ResourceError(f"{ref.path}: device {device} asked for, and this machine has no usable GPU")
    check_place(ref)
    options: dict[str, Any] = {"dtype": dtype if dtype is not None else ref.dtype}
    if ref.attention != "auto":
        options["attn_implementation"] = ref.attention
    if ref.quantization == "int8":
        options.update(int8_options(ref.path, device))
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                _location(ref),
                revision=ref.revision,
                trust_remote_code=ref.trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, TypeError, ImportError, RuntimeError, SafetensorError) as error:
        # A TypeError comes of a generation_config.json that holds no object.
        raise ModelError(f"{ref.path}: cannot be loaded: {_first_line(error)}") from error
    model: PreTrainedModel = loaded[0]
    _check_complete(ref, loaded[1])
    if ref.adapter is not None:
        model = merged_with_adapter(model, ref)
    release_eos_row(model)
    if ref.quantization == "none":
        nn.Module.to(model, device)
    return model.eval() if eval_mode else model.train()


def load_tokenizer(path: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return a tokenizer with an eos token and a pad token; eos is used as pad if there is none.

    Args:
        path: Local directory or Hub id.
        revision: Branch, tag or commit of a Hub id.
        trust_remote_code: Whether Python code that comes with the tokenizer may run.

    Raises:
        ModelError: There is no tokenizer, or it has no eos token.
    """
    ref = ModelRef(path, revision=revision, trust_remote_code=trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            _location(ref), revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the tokenizers library, in Rust, has no error of its own kind for a damaged file
        raise ModelError(f"{path}: has no tokenizer that can be loaded: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{path}: its tokenizer has no eos token; set eos_token in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_same_tokenizer(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """Check that each token id means the same token for both models.

    Embeddings may be padded to different sizes; that concerns the models and not the tokenizers.

    Raises:
        ModelError: The vocabularies differ. The message names the differing token with the smallest id.
    """
    teacher_ids, student_ids = teacher.get_vocab(), student.get_vocab()
    differing = teacher_ids.items() ^ student_ids.items()
    if not differing:
        return
    token, _ = min(differing, key=lambda item: (item[1], item[0]))
    place = f"token {token!r} is {_id_text(teacher_ids.get(token))} for the teacher"
    remedy = "distillation compares token by token and needs one tokenizer; teacher.cross_tokenizer: uld bridges two"
    raise ModelError(f"tokenizers differ: {place} and {_id_text(student_ids.get(token))} for the student; {remedy}")


def num_parameters(model: nn.Module) -> int:
    """Return the number of parameters; tied parameters count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def release_eos_row(model: PreTrainedModel) -> None:
    """Make the input embedding of eos trainable if eos is also the pad token.

    `nn.Embedding(padding_idx=...)` gives that row no gradient. With pad = eos the row of a real token would never
    change. The forward pass stays the same; the attention mask and the labels exclude padding.
    """
    embedding: Any = model.get_input_embeddings()
    eos = model.config.eos_token_id
    eos_ids = eos if isinstance(eos, list) else [eos]
    if getattr(embedding, "padding_idx", None) in eos_ids:
        embedding.padding_idx = None


def _location(ref: ModelRef) -> str:
    return str(ref.directory or ref.path)


def _check_complete(ref: ModelRef, report: dict[str, Any]) -> None:
    """Refuse missing weights, which transformers fills with random numbers after a warning."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(f"{ref.path}: its safetensors lack {missing[0]} ({len(missing)} tensors in all are missing)")
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        raise ModelError(f"{ref.path}: {mismatched[0][0]} has another shape than config.json says")


def _id_text(token_id: int | None) -> str:
    return "absent" if token_id is None else f"id {token_id}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
