"""Losses from other packages, found through the entry-point group `pocl_ray.losses`.

A plug-in is a function with the signature of those in `losses.py`, or a `Loss` that also names its parameters and
its habit about T^2. It is called once on a few made-up logits before it may train anything, so that a mistake shows
while the run is set up and under the plug-in's own name.

Legend: N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pocl_ray.errors import UserError
from pocl_ray.plugins import reason

GROUP = "pocl_ray.losses"


def probe(name: str, function: Callable[..., Any], params: Mapping[str, Any]) -> None:
    """Call a plug-in on three tokens and hold it to the contract of a loss.

    Raises:
        UserError: It raises, returns no float tensor of shape (N,), is not finite, or has no gradient for the student.
    """
    generator = torch.Generator().manual_seed(0)
    student_logits_NV = torch.randn(3, 7, generator=generator).requires_grad_()
    teacher_logits_NV = torch.randn(3, 7, generator=generator)
    try:
        with torch.enable_grad():
            loss_N = function(student_logits_NV, teacher_logits_NV, 2.0, **params)
    except Exception as error:  # code of others: every failure is reported under the plug-in's name
        raise UserError(f"loss plug-in '{name}' fails when called: {reason(error)}; check its parameters") from error
    wrong = _what_is_wrong(loss_N)
    if wrong:
        raise UserError(f"loss plug-in '{name}' {wrong}; a loss returns one finite float per token, shape (N,)")


def _what_is_wrong(loss_N: object) -> str:
    if not isinstance(loss_N, Tensor):
        return f"returns {type(loss_N).__name__}, not a tensor"
    if loss_N.shape != (3,):
        return f"returns shape {tuple(loss_N.shape)} for 3 tokens"
    if not loss_N.is_floating_point() or not bool(torch.isfinite(loss_N).all()):
        return "returns values that are not finite floats"
    return "" if loss_N.requires_grad else "has no gradient for the student"
