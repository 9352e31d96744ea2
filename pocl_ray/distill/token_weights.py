"""Weights of response tokens in the distillation loss, by the teacher, by the student, or by how far they are apart.

Legend: N response tokens in one flat axis, C those of a chunk, M those of a step, V vocabulary, P parts of a score.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pocl_ray.config import DistillConfig
from pocl_ray.config.training import STUDENT_SCORES, TokenScore
from pocl_ray.distill.chunked import ChunkValues, HeadLoss, TeacherTargets
from pocl_ray.distill.gaps import plain_kl
from pocl_ray.distill.losses import log_probs
from pocl_ray.distill.targets import entropy_of

ENTROPY_CAP = 0.98
"""The percentile above which TIP takes all entropies of the student as equal."""


@torch.no_grad()
def hellinger(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """sqrt(1/2 sum (sqrt p - sqrt q)^2), the difficulty of a token in AdaKD (arXiv 2510.11615); shape (N,), float32."""
    logq_NV, logp_NV = log_probs(student_logits_NV, teacher_logits_NV, temperature)
    apart_NV = (0.5 * logp_NV).exp_().sub_((0.5 * logq_NV).exp_())
    return (torch.linalg.vecdot(apart_NV, apart_NV) / 2).sqrt().float()


def no_divergence(student_logits_NV: Tensor, teacher_logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """Zeros, shape (N,), in place of a divergence where scores alone are wanted."""
    return student_logits_NV.new_zeros(len(student_logits_NV))


def _apart(
    measure: Callable[[Tensor, Tensor, float], Tensor], student_logits_CV: Tensor, teacher: Tensor | TeacherTargets
) -> Tensor:
    if isinstance(teacher, Tensor):
        return measure(student_logits_CV, teacher, 1.0)
    return teacher.divergence(measure, student_logits_CV, 1.0)


@dataclass(frozen=True)
class TokenWeight:
    """The weights of response tokens in the distillation loss; picklable.

    With s_n the score of token n and mean(s) its mean over all response tokens of the optimizer step,

        w_n = 1 - strength + strength * s_n / mean(s)      kd_loss = 1/N sum_n w_n kd_n

    so the weights have mean 1 whatever the models are like, and kd_ratio keeps its meaning. With `keep` the score
    becomes 1 for that share of the step's tokens which has the highest scores, and 0 for the others. Mean, order and
    range are those of the tokens of all workers and micro-batches, so they are taken before the step
    (`Engine.train_step`): weights that were normalised within a micro-batch would make training depend on how the batch
    is cut. Scores are of the plain distributions, at temperature 1: a row's weights do not move with the stage's
    kd_temperature. Of several teachers an entropy is the weighted mean, a divergence the weighted sum.

    Attributes:
        score: The score. Of the teacher: `teacher_entropy`, H(p), favours tokens that it leaves open (arXiv 2605.01732
            turns to these as training goes on); `teacher_certainty`, exp(-H(p)), one over its perplexity, those that
            it is sure of. Of the student: `student_entropy`, H(q), the first axis of TIP (arXiv 2604.14084). Of both:
            `divergence`, KL(p||q), its second axis; `hellinger`, the difficulty in AdaKD; `tip`, TIP's soft OR
            h + d - h d of H(q) and KL(p||q), each scaled to 0..1 over the step, entropies cut at a percentile first.
        strength: Share of the weight that follows the score; the rest is the same for all tokens.
        keep: Share of a step's tokens that count, those of the highest scores; None: every token, by its score.
        mean_score: Mean score over the optimizer step; None until it is known.
        ranges: Smallest and largest value of each part of a `tip` score over the step.
        threshold: Score from which on a token counts, if `keep` is given.
    """

    score: TokenScore
    strength: float = 1.0
    keep: float | None = None
    mean_score: float | None = None
    ranges: tuple[tuple[float, float], ...] = ()
    threshold: float | None = None

    @staticmethod
    def of(distill: DistillConfig) -> TokenWeight | None:
        """Return the weighting of a config; None if all tokens have the same weight."""
        if distill.token_weight == "none":
            return None
        return TokenWeight(distill.token_weight, distill.token_weight_strength, distill.token_keep)

    @property
    def needs_student(self) -> bool:
        """Whether the score depends on the student, which then reads the rows of a step once more."""
        return self.score in STUDENT_SCORES

    @property
    def num_parts(self) -> int:
        """The number of values that a score is made of."""
        return 2 if self.score == "tip" else 1

    @torch.no_grad()
    def parts(self, teacher: Tensor | TeacherTargets, student_logits_CV: Tensor | None = None) -> Tensor:
        """Return the values that the score of each token is made of, shape (C, P), float32, without gradient.

        Args:
            teacher: Logits (C, V) of the teacher, or the targets in their place: top k, or several teachers.
            student_logits_CV: Logits of the student, if the score needs them.
        """
        if not self.needs_student:
            entropy_C = entropy_of(teacher)
            return (entropy_C if self.score == "teacher_entropy" else (-entropy_C).exp())[:, None]
        assert student_logits_CV is not None, "the score is one of the student"
        if self.score == "hellinger":
            return _apart(hellinger, student_logits_CV, teacher)[:, None]
        found = []
        if self.score != "divergence":
            found.append(entropy_of(student_logits_CV))
        if self.score != "student_entropy":
            found.append(_apart(plain_kl, student_logits_CV, teacher).clamp(min=0.0))
        return torch.stack(found, dim=-1)

    def fitted(self, parts_MP: Tensor) -> TokenWeight:
        """Return the weighting of a step, from the parts of the scores of all its tokens on all workers."""
        made = self
        if self.score == "tip":
            entropy_M, divergence_M = parts_MP.unbind(-1)
            cap = entropy_M.kthvalue(math.ceil(ENTROPY_CAP * len(entropy_M))).values
            ends = ((float(x.min()), float(x.max())) for x in (entropy_M.clamp(max=cap), divergence_M))
            made = replace(made, ranges=tuple(ends))
        scores_M = made.scores(parts_MP)
        if self.keep is not None:
            num_kept = max(1, round(self.keep * len(scores_M)))
            made = replace(made, threshold=float(scores_M.topk(num_kept).values[-1]))
            scores_M = made.scores(parts_MP)
        return replace(made, mean_score=float(scores_M.double().mean()))

    def scores(self, parts_CP: Tensor) -> Tensor:
        """Return the score of each token, shape (C,), float32; tokens at the threshold count all."""
        score_C = parts_CP[:, 0]
        if self.score == "tip":
            scaled = [
                ((part_C - low) / max(high - low, 1e-12)).clamp(0.0, 1.0)
                for part_C, (low, high) in zip(parts_CP.unbind(-1), self.ranges, strict=True)
            ]
            score_C = scaled[0] + scaled[1] - scaled[0] * scaled[1]
        return score_C if self.threshold is None else (score_C >= self.threshold).float()

    def __call__(self, teacher: Tensor | TeacherTargets, student_logits_CV: Tensor | None = None) -> Tensor:
        """Return the weight of each token, shape (C,), float32."""
        assert self.mean_score is not None, "the mean score of the step is taken before its losses"
        scores_C = self.scores(self.parts(teacher, student_logits_CV))
        if self.mean_score <= 0.0:  # no token has any score: there is nothing to tell them apart by
            return torch.ones_like(scores_C)
        return 1.0 - self.strength + self.strength * scores_C / self.mean_score


@dataclass(frozen=True)
class ScoreMeter:
    """Takes the parts of the scores of one micro-batch's tokens, chunk by chunk; a `GapMeter`."""

    weight: TokenWeight
    parts_NP: Tensor

    def measure(self, rows: slice, chunk: ChunkValues, teacher: Tensor | TeacherTargets, loss: HeadLoss) -> None:
        """Take the tokens of a chunk."""
        self.parts_NP[rows] = self.weight.parts(teacher, chunk.student_logits_CV)
