"""Loading teachers, students and tokenizers, with one clear line when that cannot work.

Only safetensors are read: a pickled `.bin` may run any code. Nothing of a model's own Python code runs unless
`trust_remote_code` is asked for.
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
from pocl_ray.models.building import build_model
from pocl_ray.models.lora import merged_with_adapter
from pocl_ray.models.places import Attention, Dtype, ModelRef, check_place, model_fingerprint
from pocl_ray.models.saving import quiet_transformers, save_model

# Frozen models in 8 bit, through bitsandbytes (LLM.int8(), arXiv 2208.07339), which is an extra.
#
# The linear layers of the body are quantized; embeddings and the LM head stay as they are, so that hidden states and
# head work as everywhere. Meant for CUDA GPUs; CPUs do it too.

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


__all__ = [
    "Attention",
    "Dtype",
    "ModelRef",
    "build_model",
    "check_same_tokenizer",
    "load_model",
    "load_tokenizer",
    "model_fingerprint",
    "num_parameters",
    "save_model",
]


def load_model(
    ref: ModelRef,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    eval_mode: bool = True,
) -> PreTrainedModel:
    """Load a causal language model, its adapter merged where it has one.

    Args:
        ref: what to load.
        device: where to put it.
        dtype: overrides `ref.dtype`.
        eval_mode: switch dropout off (teachers, scoring, generation); False for a model about to be trained.

    Returns:
        The model. Its embedding passes gradients for the eos token even where that doubles as the pad token.

    Raises:
        ModelError: nothing there, weights that are unsafe, missing, damaged or of another shape than config.json
            says, an unknown architecture, an attention implementation that is not available, or an adapter that
            does not fit.
        ResourceError: a GPU is asked for where there is none, or 8 bit where that cannot be.
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
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
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
    """Load a tokenizer that has an eos and a pad token; pad becomes eos where there is none.

    Args:
        path: a local directory or a Hub id.
        revision: branch, tag or commit of a Hub id.
        trust_remote_code: run Python code that comes with the tokenizer.

    Raises:
        ModelError: no tokenizer there, or one without an eos token.
    """
    ref = ModelRef(path, revision=revision, trust_remote_code=trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            _location(ref), revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: has no tokenizer that can be loaded: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{path}: its tokenizer has no eos token; set eos_token in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_same_tokenizer(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """Check that each token id means the same to both models.

    Embeddings may be padded to different sizes: that is a matter of the models, not of the tokenizers.

    Raises:
        ModelError: the vocabularies differ; the message names the token with the smallest id that does.
    """
    teacher_ids, student_ids = teacher.get_vocab(), student.get_vocab()
    differing = teacher_ids.items() ^ student_ids.items()
    if not differing:
        return
    token, _ = min(differing, key=lambda item: (item[1], item[0]))
    place = f"token {token!r} is {_told(teacher_ids.get(token))} for the teacher"
    remedy = "distillation compares token by token and needs one tokenizer; teacher.cross_tokenizer: uld bridges two"
    raise ModelError(f"tokenizers differ: {place} and {_told(student_ids.get(token))} for the student; {remedy}")


def num_parameters(model: nn.Module) -> int:
    """Return the number of parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def release_eos_row(model: PreTrainedModel) -> None:
    """Let the input embedding of eos be trained where eos doubles as pad.

    `nn.Embedding(padding_idx=...)` gives that row no gradient. With pad = eos the row of a real token would stand still
    for ever. The forward pass is unaffected; padding is kept out by the attention mask and the labels.
    """
    embedding: Any = model.get_input_embeddings()
    eos = model.config.eos_token_id
    eos_ids = eos if isinstance(eos, list) else [eos]
    if getattr(embedding, "padding_idx", None) in eos_ids:
        embedding.padding_idx = None


def _location(ref: ModelRef) -> str:
    return str(ref.directory or ref.path)


def _check_complete(ref: ModelRef, report: dict[str, Any]) -> None:
    """transformers fills missing weights with random numbers and warns; here that is an error."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(f"{ref.path}: its safetensors lack {missing[0]} ({len(missing)} tensors in all are missing)")
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        raise ModelError(f"{ref.path}: {mismatched[0][0]} has another shape than config.json says")


def _told(token_id: int | None) -> str:
    return "absent" if token_id is None else f"id {token_id}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
