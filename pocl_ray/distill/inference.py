"""The student as it stands, to generate with: itself, or under ZeRO-3 a whole copy of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pocl_ray.distill.engine import Engine
from pocl_ray.models.lora import add_same_adapters


class InferenceStudent:
    """Gives the engine's student for generation; one for dev answers and rollouts together, as it may hold a copy."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._copy: PreTrainedModel | None = None

    def current(self) -> PreTrainedModel:
        """Return a model with the weights of now, in eval mode; collective under ZeRO-3.

        A partitioned student would gather every weight for every token; the copy is filled once a call.
        """
        student = self.engine.module.student
        if self.engine.train.zero_stage < 3:
            student.eval()
            return student
        import deepspeed

        if self._copy is None:
            with torch.device(self.engine.device):
                self._copy = type(student)._from_config(student.config, dtype=next(student.parameters()).dtype)
            add_same_adapters(self._copy, student)
            nn.Module.to(self._copy, self.engine.device, next(student.parameters()).dtype)
            self._copy.eval()
        targets: dict[str, Any] = dict(self._copy.named_parameters())
        for name, parameter in student.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]), torch.no_grad():
                targets[name].copy_(parameter)
        return self._copy
