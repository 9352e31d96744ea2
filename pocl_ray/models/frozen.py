"""The teacher in memory: for scoring, which fills the cache, and for runs without a cache.

Legend: B batch, T tokens, N response tokens in one flat axis, K the teacher's hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pocl_ray.models.heads import HeadWeights, check_split, head_of, split_model
from pocl_ray.models.loading import load_model
from pocl_ray.models.places import ModelRef


class LiveTeacher:
    """A frozen teacher on one device.

    Load it before any `HfDeepSpeedConfig` lives: while one does, transformers partitions every model that it loads,
    the teacher too, over the ranks of ZeRO-3.

    Attributes:
        head: its LM head, for logits of the hidden states.
        model: the model itself, in eval mode and without gradients, for generation.
    """

    def __init__(self, ref: ModelRef, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> None:
        self.model = load_model(ref, device=device, dtype=dtype).requires_grad_(False)
        check_split(self.model)
        self._parts = split_model(self.model)
        self.head: HeadWeights = head_of(self.model)

    def hidden(self, input_ids_BT: Tensor, attention_mask_BT: Tensor, response_index_N: Tensor) -> Tensor:
        """Return the final hidden states of response positions.

        Args:
            input_ids_BT: token ids, padded on the right, on any device.
            attention_mask_BT: 1 for tokens, 0 for padding.
            response_index_N: flat positions `b * T + t`.

        Returns:
            teacher_hidden_NK, on the teacher's device and in its dtype, without gradient.
        """
        parts = [tensor.to(self.model.device) for tensor in (input_ids_BT, attention_mask_BT, response_index_N)]
        with torch.inference_mode():
            hidden_NK = self._parts.response_hidden(*parts)
        return hidden_NK.clone()  # made outside: autograd refuses to save an inference tensor, and losses may want to
