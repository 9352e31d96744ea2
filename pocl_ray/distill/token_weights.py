"""Weights of response tokens in the distillation loss, by how sure the teacher is of them.

With s_n the score of token n and mean(s) its mean over all response tokens of the optimizer step,

    w_n = 1 - strength + strength * s_n / mean(s)      kd_loss = 1/N sum_n w_n kd_n

so the weights have mean 1 whatever the teacher is like, and kd_ratio keeps its meaning. The mean is over all workers
and micro-batches, hence taken before the step (`Engine.train_step`): weights that were normalised within a micro-batch
would make training depend on how the batch is cut. The entropy is that of the teacher's plain distribution, at
temperature 1: a row's weights do not move with the stage's kd_temperature. Of several teachers it is the weighted mean.

Legend: N response tokens in one flat axis, V vocabulary of the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pocl_ray.config import DistillConfig
from pocl_ray.config.training import TokenScore
from pocl_ray.distill.chunked import Teaching
from pocl_ray.distill.targets import entropy_of


@dataclass(frozen=True)
class TokenWeight:
    """How tokens are weighted; picklable.

    Attributes:
        score: `teacher_entropy`, H(p), favours tokens that the teacher leaves open (arXiv 2605.01732 turns to these as
            training goes on); `teacher_certainty`, exp(-H(p)), one over its perplexity, those that it is sure of.
        strength: Share of the weight that follows the score; the rest is the same for all tokens.
        mean_score: Over the optimizer step; None until it is known.
    """

    score: TokenScore
    strength: float = 1.0
    mean_score: float | None = None

    @staticmethod
    def of(distill: DistillConfig) -> TokenWeight | None:
        """Return what the config asks for; None where all tokens count alike."""
        if distill.token_weight == "none":
            return None
        return TokenWeight(distill.token_weight, distill.token_weight_strength)

    def with_mean(self, mean_score: float) -> TokenWeight:
        """Return the weighting of a step whose mean score is known."""
        return replace(self, mean_score=mean_score)

    @torch.no_grad()
    def scores(self, teacher: Tensor | Teaching) -> Tensor:
        """Return the score of each token, shape (N,), float32, without gradient.

        Args:
            teacher: Its logits (N, V), or what takes their place: its top k, or several teachers.
        """
        entropy_N = entropy_of(teacher)
        return entropy_N if self.score == "teacher_entropy" else (-entropy_N).exp()

    def __call__(self, teacher: Tensor | Teaching) -> Tensor:
        """Return the weight of each token, shape (N,), float32."""
        assert self.mean_score is not None, "the mean score of the step is taken before its losses"
        scores_N = self.scores(teacher)
        if self.mean_score <= 0.0:  # no token has any score: there is nothing to tell them apart by
            return torch.ones_like(scores_N)
        return 1.0 - self.strength + self.strength * scores_N / self.mean_score
