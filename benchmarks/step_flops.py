"""FLOPs of a training step: those that its rows need, and those that are done, counted while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from step_sides import Row
from torch.utils.flop_counter import FlopCounterMode

from pocl_ray.distill.task import TrainTask
from pocl_ray.experiments.flops import model_size
from pocl_ray.models.shapes import ModelSize

ATEN = torch.ops.aten


def rows_forward(size: ModelSize, rows: Sequence[Row]) -> float:
    """Return the FLOPs of a forward pass over rows without padding, with logits of response tokens alone."""
    return sum(size.forward(len(row.ids_T), len(row.ids_T) - row.num_prompt_tokens, len(row.ids_T)) for row in rows)


def training_flops(task: TrainTask, steps: Sequence[Sequence[Row]], is_live: bool) -> list[float]:
    """Return the FLOPs that each step needs.

    They are the student's forward and backward pass, and the teacher's head, or its whole forward pass if it is live.
    """
    student, teacher = model_size(task.student), model_size(task.teachers[0].ref)
    flops = []
    for rows in steps:
        num_response_tokens = sum(len(row.ids_T) - row.num_prompt_tokens for row in rows)
        asked = rows_forward(teacher, rows) if is_live else teacher.head(num_response_tokens)
        flops.append(3 * rows_forward(student, rows) + asked)
    return flops


def _accumulated(_: Any, left: Any, right: Any, **__: Any) -> int:
    """FLOPs of `addmm_`, with which our loss adds up the gradient of the head: torch's counter knows `addmm` alone."""
    return 2 * left[0] * left[1] * right[1]


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """FLOPs of attention on a CPU, which torch's counter does not know: two products."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[-2] * (width + value[-1])


def _attention_backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    """FLOPs of its backward pass: twice as many, as `ModelSize` counts them."""
    return 2 * _attention(query, key, value)


class StepCounter:
    """Counts the FLOPs of the matrix products between `begin` and `end`, in the thread that calls them."""

    def __init__(self) -> None:
        self._mode = FlopCounterMode(
            display=False,
            custom_mapping={
                ATEN.addmm_: _accumulated,
                ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
                ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
            },
        )

    def begin(self) -> None:
        """Start to count."""
        self._mode.__enter__()

    def end(self) -> None:
        """Stop counting."""
        self._mode.__exit__(None, None, None)

    @property
    def flops(self) -> float:
        """The FLOPs that were counted."""
        return float(self._mode.get_total_flops())
