"""The divergences against the figures of the POCL authors' code (averages over response tokens)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pocl_ray.distill.losses import resolve_loss

# What the authors leave out of the average, as it has no gradient: the teacher's negative entropy.
WITHOUT_TEACHER_ENTROPY = {"forward_kl", "skewed_forward_kl"}
NAMES = ("forward_kl", "reverse_kl", "js_distance", "tv_distance", "skewed_forward_kl", "skewed_reverse_kl")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", ["1.0", "1.33", "1.67", "2.0"])
def test_divergence_equals_the_authors_figure(shared: Path, name: str, temperature: str) -> None:
    arrays = np.load(shared / "parity" / "divergences.npz")
    published = json.loads((shared / "parity" / "divergences.json").read_text())[temperature][name]
    # Their labels are already the next tokens: position and label correspond without a shift.
    response = torch.from_numpy(arrays["labels"] != -100)
    student_logits_NV = torch.from_numpy(arrays["student_logits"])[response]
    teacher_logits_NV = torch.from_numpy(arrays["teacher_logits"])[response]

    loss = resolve_loss(name)
    value = loss(student_logits_NV, teacher_logits_NV, float(temperature)).double().mean()

    if name in WITHOUT_TEACHER_ENTROPY:
        logp_NV = torch.log_softmax(teacher_logits_NV.double() / float(temperature), dim=-1)
        factor = float(temperature) ** 2 if loss.scale_by_t_squared else 1.0
        value = value - factor * (logp_NV.exp() * logp_NV).sum(-1).mean()
    assert float(value) == pytest.approx(published, rel=1e-5)
