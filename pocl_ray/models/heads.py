"""The two parts of a language model: the body computes hidden states, and the head turns them into logits.

Logits are needed at response positions only, and training with a cached teacher needs its head alone. So a model is
split where it is narrowest: at the final hidden state, after the last norm (and after OPT-350m's projection). Logits
are

    logits = softcap * tanh(z / softcap),   z = multiplier / divisor * (hidden @ weight^T + bias)

Most families have no softcap, multiplier or divisor (Gemma has a cap, Cohere a multiplier, Granite a divisor).

Legend: B batch, T tokens, V vocabulary, H hidden, N response tokens in one flat axis.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel

from pocl_ray.errors import ModelError
from pocl_ray.models.building import last_line
from pocl_ray.models.packing import packed_inputs
from pocl_ray.run_directory.storage import replacing

_FORMAT_VERSION = "1"


@dataclass(frozen=True)
class LogitTransform:
    """The transform of a model family that follows the head's linear layer.

    Attributes:
        multiplier: Multiplier of the logits, Cohere's `logit_scale`.
        divisor: Divisor of the logits, Granite's `logits_scaling`.
        softcap: Limit of the logits, Gemma's `final_logit_softcapping`.
    """

    multiplier: float | None = None
    divisor: float | None = None
    softcap: float | None = None

    @staticmethod
    def of(config: PreTrainedConfig) -> LogitTransform:
        """Return the transform of a model's config; a multimodal one keeps it in the config of its text model."""
        text = config.get_text_config()
        return LogitTransform(
            multiplier=_first_of(text, "logit_scale", "lm_head_multiplier"),
            divisor=_first_of(text, "logits_scaling"),
            softcap=_first_of(text, "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"),
        )

    def __call__(self, logits_NV: Tensor) -> Tensor:
        """Return the transformed logits; the order of operations is that of transformers."""
        if self.multiplier is not None:
            logits_NV = logits_NV * self.multiplier
        if self.divisor is not None:
            logits_NV = logits_NV / self.divisor
        if self.softcap is not None:
            logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
        return logits_NV


def _first_of(config: PreTrainedConfig, *names: str) -> float | None:
    """The first of some keys that a config has: families give the same thing different names."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


@dataclass(frozen=True)
class ModelParts:
    """The modules of a loaded model. A call runs their hooks, which ZeRO-3 needs.

    Attributes:
        body: Module that computes the final hidden states.
        head: Linear layer of the vocabulary.
        transform: Transform after the linear layer.
    """

    body: nn.Module
    head: nn.Module
    transform: LogitTransform

    def response_hidden(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        index_N: Tensor,
        row_lengths: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Return the final hidden states (N, H) at flat positions `b * T + t`.

        The rows are padded on the right. With `row_lengths` they follow each other in a batch of one.
        """
        inputs: dict[str, Any] = {"attention_mask": attention_mask_BT, "use_cache": False}
        if row_lengths is not None:
            inputs = packed_inputs(self.body, row_lengths, input_ids_BT.device)
        output = self.body(input_ids=input_ids_BT, **inputs)
        return output.last_hidden_state.flatten(0, 1).index_select(0, index_N)

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Return the logits (N, V) of final hidden states."""
        return self.transform(self.head(hidden_NH))


@dataclass(frozen=True)
class HeadWeights:
    """The head of a frozen model without the body; picklable.

    Attributes:
        weight_VH: Weight with one row for each token id, possibly padded.
        bias_V: Bias; None in nearly all families.
        transform: Transform after the linear layer.
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    transform: LogitTransform = LogitTransform()

    @property
    def vocab_size(self) -> int:
        """The number of rows, including padding."""
        return self.weight_VH.shape[0]

    @property
    def hidden_size(self) -> int:
        """The width of the hidden states that the head takes."""
        return self.weight_VH.shape[1]

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Return logits (N, V) in the dtype of the weight; the hidden states (N, H) may have any floating dtype."""
        hidden_NH = hidden_NH.to(self.weight_VH.dtype)
        return self.transform(functional.linear(hidden_NH, self.weight_VH, self.bias_V))

    def cut(self, vocab_size: int) -> HeadWeights:
        """Return the head of the first `vocab_size` tokens, which padded vocabularies have in common."""
        bias_V = None if self.bias_V is None else self.bias_V[:vocab_size]
        return replace(self, weight_VH=self.weight_VH[:vocab_size], bias_V=bias_V)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> HeadWeights:
        """Return the same head on another device or in another dtype."""
        bias_V = None if self.bias_V is None else self.bias_V.to(device=device, dtype=dtype)
        return replace(self, weight_VH=self.weight_VH.to(device=device, dtype=dtype), bias_V=bias_V)

    def save(self, path: Path) -> Path:
        """Write one safetensors file, whole or not at all."""
        path = Path(path)
        tensors = {"weight": self.weight_VH.contiguous()}
        if self.bias_V is not None:
            tensors["bias"] = self.bias_V.contiguous()
        metadata = {"version": _FORMAT_VERSION, "transform": json.dumps(asdict(self.transform))}
        with replacing(path) as new:
            save_file(tensors, new, metadata=metadata)
        return path

    @staticmethod
    def load(path: Path) -> HeadWeights:
        """Return a head that `save` wrote.

        Raises:
            ModelError: The file is missing, is not a head, or is from another version.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata: dict[str, Any] = file.metadata() or {}
                if metadata.get("version") != _FORMAT_VERSION or "transform" not in metadata:
                    raise ModelError(f"{path}: is not a head that this version of pocl-ray has written")
                names = set(file.keys())
                weight_VH = file.get_tensor("weight")
                bias_V = file.get_tensor("bias") if "bias" in names else None
        except FileNotFoundError:
            raise ModelError(f"{path}: no such file") from None
        except SafetensorError as error:
            raise ModelError(f"{path}: is not a readable safetensors file ({error})") from None
        return HeadWeights(weight_VH, bias_V, LogitTransform(**json.loads(metadata["transform"])))


def split_model(model: PreTrainedModel) -> ModelParts:
    """Return the modules of a causal language model that compute hidden states and logits.

    Raises:
        ModelError: The model has no output layer.
    """
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        raise ModelError(f"{type(model).__name__}: is not a causal language model with a head of its own")
    return ModelParts(model.base_model, head, LogitTransform.of(model.config))


def response_hidden(model: PreTrainedModel, input_ids_BT: Tensor, attention_mask_BT: Tensor, index_N: Tensor) -> Tensor:
    """Return the final hidden states of response positions.

    Args:
        model: Causal language model.
        input_ids_BT: Token ids, padded on the right.
        attention_mask_BT: Mask with 1 for tokens and 0 for padding.
        index_N: Flat positions `b * T + t`.

    Returns:
        Hidden states (N, H). `head_of(model).logits` turns them into the model's logits at these positions.
    """
    return split_model(model).response_hidden(input_ids_BT, attention_mask_BT, index_N)


def head_of(model: PreTrainedModel) -> HeadWeights:
    """Return the head of a loaded model. It shares the model's memory and has no gradient."""
    parts = split_model(model)
    weight_VH = parts.head.weight
    bias_V = getattr(parts.head, "bias", None)
    assert isinstance(weight_VH, Tensor)
    return HeadWeights(weight_VH.detach(), None if bias_V is None else bias_V.detach(), parts.transform)


@torch.no_grad()
def check_split(model: PreTrainedModel, place: str = "") -> None:
    """Check on a few tokens that body and head together give the model's logits.

    A family with a transform that `LogitTransform` does not know must not be silently distilled with wrong logits.

    Args:
        model: Causal language model.
        place: Path of the model for the message.

    Raises:
        ModelError: Body and head give other logits than the model, or it cannot compute in its dtype.
    """
    was_training = model.training
    name = f"{place}: {type(model).__name__}" if place else type(model).__name__
    model.eval()
    try:
        found_NV, expected_NV = _first_logits(model)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # a dtype that a family's code cannot compute with, as Mamba's bfloat16 on CPUs
        if model.dtype == torch.float32:
            raise
        raise ModelError(
            f"{name}: fails on its first tokens in {_plain(model.dtype)} ({last_line(error)}); load it in float32 "
            "(teacher.dtype, student.dtype)"
        ) from error
    finally:
        model.train(was_training)
    compare_logits(name, found_NV, expected_NV, model.dtype)


def _first_logits(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """The logits of a few tokens: those of head and body, and the model's own."""
    embedding: Any = model.get_input_embeddings()  # not the config, in which the size may be nested
    ids_BT = torch.arange(4, device=model.device).unsqueeze(0) % embedding.weight.shape[0]
    mask_BT = torch.ones_like(ids_BT)
    expected_NV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits[0].float()
    parts = split_model(model)
    index_N = torch.arange(4, device=model.device)
    return parts.logits(parts.response_hidden(ids_BT, mask_BT, index_N)).float(), expected_NV


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compare_logits(name: str, found_NV: Tensor, expected_NV: Tensor, dtype: torch.dtype) -> None:
    """Compare the logits of head and hidden states with the model's own.

    Args:
        name: Place and family of the model for the message.
        found_NV: Logits of head and hidden states.
        expected_NV: The model's own logits.
        dtype: Dtype of the model's weights.

    Raises:
        ModelError: The model's logits are not finite, or the others differ from them by more than rounding.
    """
    if not bool(torch.isfinite(expected_NV).all()):
        raise ModelError(
            f"{name}: its own logits are not finite in {_plain(dtype)}; load it in bfloat16 or "
            "float32 (teacher.dtype, student.dtype), or look at its weights"
        )
    scale = max(1.0, float(expected_NV.abs().max()))
    if not torch.allclose(found_NV, expected_NV, atol=1e-2 * scale, rtol=0.0):
        raise ModelError(f"{name}: its logits are not head(hidden states); this family cannot be split")


@dataclass(frozen=True)
class HeadSample:
    """A few tokens of a model: final hidden states, and the logits of the whole model for the same input.

    Attributes:
        hidden_NH: Final hidden states.
        logits_NV: Logits of the model at these tokens.
    """

    hidden_NH: Tensor
    logits_NV: Tensor

    @staticmethod
    @torch.no_grad()
    def of(model: PreTrainedModel, ids_BT: Tensor, index_N: Tensor) -> HeadSample:
        """Run a model on one row of tokens, and keep hidden states and logits at some positions."""
        mask_BT = torch.ones_like(ids_BT)
        logits_TV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits[0]
        hidden_NH = split_model(model).response_hidden(ids_BT, mask_BT, index_N)
        return HeadSample(hidden_NH.cpu(), logits_TV[index_N].cpu())

    def to_bytes(self) -> bytes:
        """Return the content of a safetensors file."""
        return save({"hidden": self.hidden_NH.contiguous(), "logits": self.logits_NV.contiguous()})

    @staticmethod
    def from_bytes(data: bytes) -> HeadSample:
        """Read what `to_bytes` returned."""
        tensors = load(data)
        return HeadSample(tensors["hidden"], tensors["logits"])

    def check(self, head: HeadWeights, place: str) -> None:
        """Check that a head turns the hidden states into the same logits.

        Args:
            head: Head, such as one that was read from a model's files.
            place: Name of the head in the message.

        Raises:
            ModelError: The head gives other logits.
        """
        remedy = "set distill.teacher_cache to none, which runs the teacher itself"
        if not bool(torch.isfinite(self.logits_NV).all()):
            raise ModelError(
                f"{place}: the logits stored in its cache are not finite; set teacher.dtype to bfloat16 or float32, "
                "and score again"
            )
        found_NV = head.logits(self.hidden_NH.to(head.weight_VH.device)).float().cpu()
        if found_NV.shape != self.logits_NV.shape:
            sizes = f"{found_NV.shape[-1]} logits, and the teacher that was scored {self.logits_NV.shape[-1]}"
            raise ModelError(f"{place}: the LM head read from its files gives {sizes}; {remedy}")
        scale = max(1.0, float(self.logits_NV.abs().max()))
        off = float((found_NV - self.logits_NV.float()).abs().max())
        if not off <= 1e-2 * scale:
            raise ModelError(
                f"{place}: the LM head read from its files gives other logits than the teacher that was scored (off by "
                f"{off:.2g}); {remedy}"
            )
