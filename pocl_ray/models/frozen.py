"""The teacher in memory, for scoring, which fills the cache, and for training without a cache.

Legend: B batch, T tokens, N response tokens in one flat axis, K the teacher's hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from pocl_ray.errors import ModelError
from pocl_ray.models.heads import HeadWeights, check_split, compare_logits, head_of, split_model
from pocl_ray.models.loading import load_model
from pocl_ray.models.packing import find_packing_obstacle
from pocl_ray.models.places import ModelRef, read_config


class LiveTeacher:
    """A frozen teacher on one device.

    Load it before an `HfDeepSpeedConfig` object exists. While one exists, transformers partitions every model that it
    loads over the ranks of ZeRO-3, including the teacher.

    Attributes:
        head: LM head, which turns hidden states into logits.
        model: Model in eval mode and without gradients, for generation.
        reads_packed: Whether it reads packed rows; see `try_packing`.
    """

    reads_packed = False

    def __init__(self, ref: ModelRef, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> None:
        self.model = load_model(ref, device=device, dtype=dtype).requires_grad_(False)
        check_split(self.model, ref.path)
        self._parts = split_model(self.model)
        self.head: HeadWeights = head_of(self.model)

    def hidden(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        response_index_N: Tensor,
        row_lengths: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Return the final hidden states of response positions.

        Args:
            input_ids_BT: Token ids, padded on the right, on any device.
            attention_mask_BT: Mask with 1 for tokens and 0 for padding.
            response_index_N: Flat positions `b * T + t`.
            row_lengths: Number of tokens of each row, if the rows are packed.

        Returns:
            teacher_hidden_NK, on the teacher's device, in its dtype, without gradient.
        """
        device = self.model.device
        ids_BT, mask_BT, index_N = input_ids_BT.to(device), attention_mask_BT.to(device), response_index_N.to(device)
        with torch.inference_mode():
            hidden_NK = self._parts.response_hidden(ids_BT, mask_BT, index_N, row_lengths)
        return (
            hidden_NK.clone()
        )  # cloned outside inference mode: autograd cannot save an inference tensor, and a loss may need to

    def try_packing(self, max_tokens: int) -> str | None:
        """Read packed rows from now on; return the reason if it cannot.

        Args:
            max_tokens: Tokens of the longest row.
        """
        obstacle = find_packing_obstacle(self.model, self.hidden, self.head.logits, max_tokens)
        self.reads_packed = obstacle is None
        return obstacle


class _Body(nn.Module):
    """The module that DeepSpeed wraps: DeepSpeed learns the order of the layers from calls of this module alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        index_N: Tensor,
        row_lengths: tuple[int, ...] | None = None,
        whole: bool = False,
    ) -> Tensor:
        """Return the hidden states at the positions, or with `whole` the model's own logits there."""
        if not whole:
            return split_model(self.model).response_hidden(input_ids_BT, attention_mask_BT, index_N, row_lengths)
        output = self.model(input_ids=input_ids_BT, attention_mask=attention_mask_BT, use_cache=False)
        return output.logits.flatten(0, 1).index_select(0, index_N)


class ShardedTeacher:
    """A frozen teacher of which each worker holds a part: ZeRO stage 3 without an optimizer.

    The weights of a layer are gathered when the layer runs, and released after it. So a worker needs memory for its
    part of the teacher and for one layer. The price is that construction and calls are collective: all workers must
    make them together, equally often.

    Attributes:
        head: LM head, complete on every worker.
        reads_packed: Whether it reads packed rows; see `try_packing`.
    """

    reads_packed = False

    def __init__(self, ref: ModelRef, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Load the teacher in parts. DeepSpeed must be imported and use the process group.

        Raises:
            ModelError: The model cannot be loaded, or not in this dtype on this device, or it cannot be split into body
                and head.
        """
        import deepspeed

        dtype = dtype or _dtype_of(ref)
        config = _inference_config(ref, dtype, deepspeed.get_accelerator())
        partitions = HfDeepSpeedConfig(
            config
        )  # while this object exists, from_pretrained partitions the model that it loads
        model = load_model(ref, device=device, dtype=dtype).requires_grad_(False)
        del partitions
        parts = split_model(model)
        bias: Any = getattr(parts.head, "bias", None)
        with deepspeed.zero.GatheredParameters([parts.head.weight, *([] if bias is None else [bias])]):
            whole = head_of(model)
            self.head = HeadWeights(
                whole.weight_VH.clone(), None if whole.bias_V is None else whole.bias_V.clone(), whole.transform
            ).to(device)
        self._engine, *_ = deepspeed.initialize(model=_Body(model), config=config, dist_init_required=False)
        self._engine.eval()
        self.device = device
        self._check_split(f"{ref.path}: {type(model).__name__}", model.config.get_text_config().vocab_size)

    @torch.no_grad()
    def hidden(
        self,
        input_ids_BT: Tensor,
        attention_mask_BT: Tensor,
        response_index_N: Tensor,
        row_lengths: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Return the final hidden states of response positions; all workers must call this together.

        Args:
            input_ids_BT: Token ids, padded on the right; each worker has another batch.
            attention_mask_BT: Mask with 1 for tokens and 0 for padding.
            response_index_N: Flat positions `b * T + t`.
            row_lengths: Number of tokens of each row, if the rows are packed.

        Returns:
            teacher_hidden_NK, on the teacher's device, in its dtype, without gradient.
        """
        inputs = (part.to(self.device) for part in (input_ids_BT, attention_mask_BT, response_index_N))
        hidden_NK: Tensor = self._engine(*inputs, row_lengths)
        return hidden_NK

    def try_packing(self, max_tokens: int) -> str | None:
        """Read packed rows from now on, or return the reason why it cannot; all workers must call this together.

        Args:
            max_tokens: Tokens of the longest row.
        """
        obstacle = find_packing_obstacle(self._engine.module.model, self.hidden, self.head.logits, max_tokens)
        self.reads_packed = obstacle is None
        return obstacle

    @torch.no_grad()
    def _check_split(self, name: str, vocab_size: int) -> None:
        ids_BT = torch.arange(4).unsqueeze(0) % vocab_size
        ids_BT, index_N = ids_BT.to(self.device), torch.arange(4, device=self.device)
        mask_BT = torch.ones_like(ids_BT)
        expected_NV = self._engine(ids_BT, mask_BT, index_N, whole=True).float()
        found_NV = self.head.logits(self.hidden(ids_BT, mask_BT, index_N)).float()
        compare_logits(name, found_NV, expected_NV, self.head.weight_VH.dtype)


def _dtype_of(ref: ModelRef) -> torch.dtype:
    """The dtype to load in, which DeepSpeed must know beforehand; float32 if the model names none."""
    config = read_config(ref)
    name = ref.dtype if ref.dtype != "auto" else config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise ModelError(f"{ref.path}: config.json names the dtype {name!r}; set teacher.dtype")
    return dtype


def _inference_config(ref: ModelRef, dtype: torch.dtype, accelerator: Any) -> dict[str, Any]:
    if dtype == torch.float16 and not accelerator.is_fp16_supported():
        raise ModelError(
            f"{ref.path}: cannot be sharded in float16 on {accelerator.device_name()}; set teacher.dtype to bfloat16 "
            "or float32"
        )
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "steps_per_print": 1 << 30,
    }
