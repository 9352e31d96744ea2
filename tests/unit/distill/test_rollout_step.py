"""The loss on rollouts: which tokens it is taken of, and DistiLLM-2's sum against its float64 formula."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_step import batch, model, response_hidden, with_teacher
from torch import Tensor

from pocl_ray.data.batching import collate
from pocl_ray.distill.losses import resolve_loss
from pocl_ray.distill.step import DistillationModule, RolloutSettings, StepSettings
from pocl_ray.models.heads import head_of

EOS = 2
ALPHA = 0.1


@pytest.mark.parametrize("pad_id", [0, EOS])
def test_labels_of_a_rollout_are_its_own_tokens_one_place_on_and_its_end(pad_id: int) -> None:
    prompts = [np.array([5, 6, 7], np.int32), np.array([8], np.int32)]
    responses = [np.array([9, 10, EOS], np.int32), np.array([11, 12, 13, 14], np.int32)]  # the second never stopped
    x = collate(prompts, responses, pad_id)
    assert x.targets_N.tolist() == [9, 10, EOS, 11, 12, 13, 14]
    predicting_N = x.input_ids_BT.flatten()[x.response_index_N]
    assert predicting_N.tolist() == [7, 9, 10, 8, 11, 12, 13]


def log_probs(module: DistillationModule, x: object) -> Tensor:
    return torch.log_softmax(head_of(module.student).logits(response_hidden(module.student, x)).double(), -1)


def test_the_step_of_distillm_2_is_the_sum_of_its_two_divergences_over_all_tokens() -> None:
    student, teacher = model("llama_tied"), model("llama_tied", seed=1)
    module = DistillationModule(student)
    module.attach_teacher_heads(head_of(teacher))
    given = with_teacher(batch(((3, 5), (6, 2))), teacher)
    written = replace(with_teacher(batch(((3, 4), (6, 7))), teacher), is_rollout=True)
    forward, reverse = (resolve_loss(f"skewed_{side}_kl", {"alpha": ALPHA}) for side in ("forward", "reverse"))
    settings = StepSettings(1.0, 0.7, forward, on_rollouts=RolloutSettings(1.0, reverse))

    with torch.no_grad():
        q, logq = [(lq := log_probs(module, given)).exp(), lq]
        p = torch.softmax(head_of(teacher).logits(given.teacher_outputs[0].tokens).double(), -1)
        forward_sum = (p * (p.log() - (ALPHA * p + (1 - ALPHA) * q).log())).sum()
        ce_sum = -logq.gather(-1, given.targets_N[:, None]).sum()
        q = log_probs(module, written).exp()
        p = torch.softmax(head_of(teacher).logits(written.teacher_outputs[0].tokens).double(), -1)
        reverse_sum = (q * (q.log() - ((1 - ALPHA) * p + ALPHA * q).log())).sum()
        found = [module(x, settings)[0].double() for x in (given, written)]
    torch.testing.assert_close(found[0], 0.3 * ce_sum + 0.7 * forward_sum, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], reverse_sum, rtol=1e-5, atol=1e-5)


def test_without_settings_of_their_own_rollouts_are_trained_on_as_rows_are() -> None:
    settings = StepSettings(1.0, 0.7, resolve_loss("forward_kl"))
    assert settings.of(replace(batch(), is_rollout=True)) is settings


def test_moving_a_batch_keeps_who_wrote_it() -> None:
    assert replace(batch(), is_rollout=True).to("cpu").is_rollout
    assert not batch().to("cpu").is_rollout
