"""The teachers' targets for a chunk of tokens, in the form that the loss takes.

One teacher's hidden states become logits through its LM head, and nothing else happens. Three cases differ:

- *Top k.* The divergence is taken over k + 1 events: the teacher's k likeliest tokens, and one bucket for all others,
  which holds the student's mass of them too. So it is a divergence still, zero if and only if the events agree, and
  never more than the one over the whole vocabulary (data processing inequality of f-divergences).
- *Several teachers.* The loss is the weighted sum of the divergences from each of them, not the divergence from their
  mixture: the sum keeps the mode of each teacher apart, and teachers need not share a vocabulary's padding.
- *Another tokenizer.* The teacher says nothing of the student's tokens that have no counterpart among its own: their
  divergence is 0. They count among the response tokens that losses are divided by all the same.

Legend: N response tokens in one flat axis, C those of a chunk, P those of a chunk with a counterpart, V vocabulary,
W the teacher's, K tokens kept, E = K + 1 events.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pocl_ray.data.batching import TeacherOutput
from pocl_ray.distill.chunked import KdFunction, TeacherLogits, TeacherTargets
from pocl_ray.distill.losses import LOG_ZERO
from pocl_ray.models.heads import HeadWeights
from pocl_ray.teacher_cache.top_k import TopK


@dataclass(frozen=True)
class TopKTargets:
    """The teacher's likeliest tokens at a chunk of tokens."""

    top_k: TopK

    def divergence(self, kd: KdFunction, student_logits_CV: Tensor, temperature: float) -> Tensor:
        """Return the divergence over the events of each token, shape (C,).

        Both distributions are softened already. Any divergence softens logits; those given to it are the events'
        log-probabilities times the temperature, which softened by it are the events again.
        """
        student_CE = student_events(student_logits_CV, self.top_k, temperature)
        return kd(temperature * student_CE, temperature * self.top_k.log_probs(temperature), temperature)

    def entropy(self) -> Tensor:
        """Return the entropy of each token's whole distribution, shape (C,): the tail's curve holds its part."""
        return self.top_k.entropy()


@dataclass(frozen=True)
class PairedTargets:
    """The targets of a teacher with another tokenizer: logits at the counterparts of some of a chunk's C tokens."""

    logits_PW: Tensor
    index_P: Tensor
    num_tokens: int

    def divergence(self, kd: KdFunction, student_logits_CV: Tensor, temperature: float) -> Tensor:
        """Return the divergence of each token, shape (C,), 0 where it has no counterpart."""
        kd_P = kd(student_logits_CV.index_select(0, self.index_P), self.logits_PW, temperature)
        return self._placed(kd_P)

    def entropy(self) -> Tensor:
        """Return the entropy at each token's counterpart, shape (C,), 0 where it has none."""
        return self._placed(entropy_of(self.logits_PW))

    def _placed(self, value_P: Tensor) -> Tensor:
        return value_P.new_zeros(self.num_tokens).index_copy(0, self.index_P, value_P)


@dataclass(frozen=True)
class WeightedTargets:
    """The targets of several teachers, each with the weight of its divergence."""

    parts: Sequence[tuple[float, Tensor | TeacherTargets]]

    def divergence(self, kd: KdFunction, student_logits_CV: Tensor, temperature: float) -> Tensor:
        """Return the weighted sum of the divergences from each teacher, shape (C,)."""
        total_C = torch.zeros((), device=student_logits_CV.device)
        for weight, part in self.parts:
            if isinstance(part, Tensor):
                total_C = total_C + weight * kd(student_logits_CV, part, temperature)
            else:
                total_C = total_C + weight * part.divergence(kd, student_logits_CV, temperature)
        return total_C

    def entropy(self) -> Tensor:
        """Return the weighted mean of the teachers' entropies of each token, shape (C,)."""
        parts = [weight * entropy_of(part) for weight, part in self.parts]
        return torch.stack(parts).sum(0)


def entropy_of(teacher: Tensor | TeacherTargets) -> Tensor:
    """Return the entropy of the plain distribution (temperature 1) at each token, shape (C,), in nats, float32."""
    if not isinstance(teacher, Tensor):
        return teacher.entropy()
    dtype = torch.promote_types(teacher.dtype, torch.float32)
    # entr is 0 at 0: masked tokens count for nothing.
    return torch.special.entr(torch.softmax(teacher, dim=-1, dtype=dtype)).sum(-1).float()


def teacher_logits(teacher_outputs: Sequence[TeacherOutput], heads: Sequence[HeadWeights | None]) -> TeacherLogits:
    """Return the function from a slice of the tokens to the teachers' targets.

    Args:
        teacher_outputs: Outputs of each teacher in a batch.
        heads: LM heads in the order of the run's teachers; None if the top k are cached.
    """

    def part(one: TeacherOutput, rows: slice) -> Tensor | TeacherTargets:
        if isinstance(one.tokens, TopK):
            return TopKTargets(one.tokens[rows])
        head = heads[one.teacher] if one.teacher < len(heads) else None
        if head is None:
            raise ValueError("there are hidden states, but no teacher head to make logits of them")
        if one.paired_N is None:
            return head.logits(one.tokens[rows])
        # `tokens` holds counterparts alone: a chunk's are found by how many come before it, counted on the CPU, since
        # a look at the device would make it wait.
        num_before = int(one.paired_N[: rows.start].sum())
        index_P = one.paired_N[rows].nonzero().squeeze(-1)
        logits_PW = head.logits(one.tokens[num_before : num_before + len(index_P)])
        return PairedTargets(logits_PW, index_P.to(logits_PW.device), len(one.paired_N[rows]))

    # The usual case goes without a sum over one teacher.
    if len(teacher_outputs) == 1 and teacher_outputs[0].weight == 1.0:
        return lambda rows: part(teacher_outputs[0], rows)
    return lambda rows: WeightedTargets([(one.weight, part(one, rows)) for one in teacher_outputs])


def student_events(logits_CV: Tensor, top_k: TopK, temperature: float) -> Tensor:
    """Return the student's log-probabilities of the teacher's events, shape (C, E), float32 at least.

    Args:
        logits_CV: Student's logits; V is at least the teacher's, and the rest is padding.
        top_k: Events of each token.
        temperature: Temperature that softens the student's distribution before its tail is merged.
    """
    if logits_CV.shape[-1] < top_k.vocab_size:
        raise ValueError(f"the student has {logits_CV.shape[-1]} logits, the cached teacher {top_k.vocab_size}")
    if not temperature > 0.0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    # Cut before the softmax: what the student's padding would take is no event of the teacher's.
    logits_CV = logits_CV[:, : top_k.vocab_size].to(torch.promote_types(logits_CV.dtype, torch.float32))
    logq_CV = torch.log_softmax(logits_CV / temperature, dim=-1).nan_to_num(nan=math.nan, neginf=LOG_ZERO)
    ids_CK = top_k.ids_NK.long()
    events_CK = logq_CV.gather(-1, ids_CK)
    if not top_k.has_tail:
        return events_CK
    # Summed over the tail itself: 1 minus the mass of the k would be rounding noise where they hold nearly all.
    tail_C1 = logq_CV.scatter(-1, ids_CK, LOG_ZERO).logsumexp(-1, keepdim=True)
    return torch.cat([events_CK, tail_C1], dim=-1)
