"""The error of training on the top k: the loss and its gradient over k + 1 events against all logits.

For teachers of several shapes over a large vocabulary, with a student that is the teacher and noise on its logits; and,
where directories of two models are given, for these on the project's README:

- loss: the divergence over the events, relative to the one over the whole vocabulary (1 is exact; it cannot be more);
- cosine: between the two gradients with respect to the student's logits, the mean over tokens;
- tail: the largest error of the bucket's share at temperatures between the stored ones (at these it is exact).

    python benchmarks/top_k_bias.py [--teacher DIR --student DIR]

Legend: N tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from pocl_ray.distill.losses import resolve_loss
from pocl_ray.distill.targets import TopKTargets
from pocl_ray.models.loading import load_model, load_tokenizer
from pocl_ray.models.places import ModelRef
from pocl_ray.teacher_cache.top_k import TopK, top_k_of

KEPT = (1, 8, 64, 512)
LOSSES = ("forward_kl", "reverse_kl", "skewed_reverse_kl")


def shapes(num_tokens: int, vocab_size: int) -> dict[str, Tensor]:
    """Teacher logits (N, V): unstructured ones, and ones as sharp as those of a trained model."""
    generator = torch.Generator().manual_seed(0)
    noise_NV = torch.randn(num_tokens, vocab_size, generator=generator)
    zipf_V = -1.2 * torch.arange(1, vocab_size + 1).log()
    order_NV = torch.rand(num_tokens, vocab_size, generator=generator).argsort(-1)
    peaked_NV = 2.0 * noise_NV
    peaked_NV[:, :5] += torch.tensor([18.0, 16.0, 15.0, 14.0, 13.0])
    return {
        "random, sd 1": noise_NV,
        "random, sd 3": 3.0 * noise_NV,
        "Zipf 1.2": zipf_V.expand_as(noise_NV).gather(-1, order_NV),
        "peaked": peaked_NV,
    }


def compare(student_NV: Tensor, teacher_NV: Tensor, kept: TopK, loss: str, temperature: float) -> tuple[float, float]:
    """Ratio of the losses and cosine of the gradients, over the events against over all logits."""
    kd = resolve_loss(loss, scale_by_t_squared=False)
    values, gradients = [], []
    for merged in (True, False):
        logits_NV = student_NV.clone().requires_grad_()
        loss_N = (
            TopKTargets(kept).divergence(kd, logits_NV, temperature)
            if merged
            else kd(logits_NV, teacher_NV, temperature)
        )
        gradients.append(torch.autograd.grad(loss_N.sum(), logits_NV)[0])
        values.append(float(loss_N.detach().mean()))
    return values[0] / values[1], float(torch.cosine_similarity(*gradients, dim=-1).mean())


def tail_error(teacher_NV: Tensor, kept: TopK) -> float:
    """The largest error of the bucket's share at temperatures of a curriculum."""
    errors = []
    for temperature in (1.1, 1.2, 1.5, 1.67, 1.8, 2.5, 3.0):
        p_NV = (teacher_NV.double() / temperature).softmax(-1)
        true_N = 1.0 - p_NV.gather(-1, kept.ids_NK.long()).sum(-1)
        errors.append(float((kept.log_probs(temperature)[:, -1].exp() - true_N).abs().max()))
    return max(errors)


@torch.no_grad()
def of_models(teacher: str, student: str, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Logits (N, V) of two models at the same tokens, spread over the text."""
    text = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    ids_BT = torch.tensor([load_tokenizer(teacher)(text)["input_ids"][:512]])
    places = torch.linspace(20, ids_BT.shape[1] - 1, num_tokens).long()
    teacher_NV, student_NV = (
        load_model(ModelRef(path))(ids_BT).logits[0, places].float() for path in (teacher, student)
    )
    return teacher_NV, student_NV


def main() -> None:
    """Print one Markdown table a loss."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--vocab-size", type=int, default=50_000)
    parser.add_argument("--teacher", help="directory of a model")
    parser.add_argument("--student", help="directory of a model with the same tokenizer")
    given = parser.parse_args()
    torch.manual_seed(1)
    pairs = {
        name: (logits_NV, logits_NV + torch.randn_like(logits_NV))
        for name, logits_NV in shapes(given.tokens, given.vocab_size).items()
    }
    if given.teacher and given.student:
        pairs = {"models": of_models(given.teacher, given.student, 64)}
    print("| teacher | k | share of the k | tail, error |", *(f" {loss} T={t:g} |" for loss in LOSSES for t in (1, 2)))
    for name, (teacher_NV, student_NV) in pairs.items():
        for num_kept in KEPT:
            kept = top_k_of(teacher_NV, num_kept, torch.float16)
            share = 1.0 - float(kept.log_probs()[:, -1].exp().mean())
            cells = [compare(student_NV, teacher_NV, kept, loss, t) for loss in LOSSES for t in (1.0, 2.0)]
            row = " | ".join(f"{ratio:.3f}, {cosine:.3f}" for ratio, cosine in cells)
            print(f"| {name} | {num_kept} | {share:.3f} | {tail_error(teacher_NV, kept):.4f} | {row} |", flush=True)


if __name__ == "__main__":
    main()
