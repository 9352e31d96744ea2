"""What stands between the last hidden states and the logits: the frozen head of the teacher, and scales and caps.

Legend: N response tokens in one flat axis, V vocabulary, K hidden of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LogitsFunction = Callable[[Tensor], Tensor]
TeacherLogits = Callable[[slice], Tensor]


@dataclass(frozen=True)
class LogitsTransform:
    """What some families do to the logits after the LM head: `softcap * tanh(scale * logits / softcap)`."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitsTransform | None:
        """Read it from a model's config: Gemma's soft cap, Cohere's and Granite's scale; None where there is none."""
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(scale, softcap) if softcap or scale != 1.0 else None

    def __call__(self, logits_NV: Tensor) -> Tensor:
        """Apply it, differentiably; the shape (N, V) stays."""
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        return torch.tanh(logits_NV / self.softcap) * self.softcap if self.softcap else logits_NV


@dataclass(frozen=True)
class TeacherHead:
    """The teacher's frozen LM head, all that training needs of it when its hidden states are given.

    Attributes:
        weight_VK: In the dtype in which the teacher's logits are to be computed.
        bias_V: The bias, where the head has one.
        transform: What the teacher's family does to its logits.
    """

    weight_VK: Tensor
    bias_V: Tensor | None = None
    transform: LogitsFunction | None = None

    def to(self, device: torch.device | str) -> TeacherHead:
        """A copy on another device."""
        bias_V = None if self.bias_V is None else self.bias_V.to(device)
        return TeacherHead(self.weight_VK.to(device), bias_V, self.transform)

    def logits(self, hidden_NK: Tensor) -> Tensor:
        """The teacher's logits, shape (N, V)."""
        logits_NV = F.linear(hidden_NK.to(self.weight_VK.dtype), self.weight_VK, self.bias_V)
        return logits_NV if self.transform is None else self.transform(logits_NV)

    def by_chunk(self, hidden_NK: Tensor) -> TeacherLogits:
        """A function from a slice of the tokens to their logits, as `chunked_head_loss` asks for."""
        return lambda rows: self.logits(hidden_NK[rows])
