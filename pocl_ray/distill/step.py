"""The module that DeepSpeed wraps: student, LM head and loss in one forward that returns sums over response tokens.

Only the hidden states of positions whose next token is a response token reach the LM head; prompt and padding do not.
Sums, not means: the caller divides by the number of response tokens of the whole optimizer step, over all workers and
micro-batches, so that neither how a batch is split nor how many workers share it changes the loss.

Legend: B batch, T tokens, N response tokens in one flat axis, V vocabulary, H hidden of the student.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pocl_ray.data.batching import MicroBatch
from pocl_ray.distill.chunked import (
    DEFAULT_CHUNK_BYTES,
    GapMeter,
    HeadLoss,
    KdFunction,
    TeacherLogits,
    chunked_head_loss,
    token_chunks,
)
from pocl_ray.distill.targets import teacher_logits
from pocl_ray.distill.token_weights import TokenWeight
from pocl_ray.models.heads import HeadWeights, LogitTransform, split_model


@dataclass(frozen=True)
class RolloutSettings:
    """The weight of the divergence, and the divergence, on responses that the student wrote."""

    kd_ratio: float
    kd: KdFunction | None = None


@dataclass(frozen=True)
class StepSettings:
    """The settings of a step: the divergence (of `resolve_loss`), its temperature, its weight, and token weights.

    `on_rollouts` takes the place of divergence and weight for micro-batches whose responses the student wrote.
    `gap_meter` is for one micro-batch: it is shown the logits of each chunk of it.
    """

    kd_temperature: float
    kd_ratio: float
    kd: KdFunction | None = None
    token_weight: TokenWeight | None = None
    on_rollouts: RolloutSettings | None = None
    gap_meter: GapMeter | None = None

    def of(self, batch: MicroBatch) -> StepSettings:
        """Return the settings for a micro-batch."""
        own = self.on_rollouts
        return replace(self, kd_ratio=own.kd_ratio, kd=own.kd) if batch.is_rollout and own is not None else self


class LossHead(nn.Module):
    """The LM head together with the loss.

    It owns the head's parameters directly, shared with the student (and with the embedding, where they are tied):
    ZeRO-3 gathers the parameters of the module that is called, and this is the one.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, head: nn.Module, transform: LogitTransform) -> None:
        super().__init__()
        # The same object as in the student, not a copy: tied weights collect the gradients of head and embedding.
        self.weight = cast(nn.Parameter, head.weight)
        self.register_parameter("bias", getattr(head, "bias", None))
        self.transform = transform

    def forward(
        self,
        hidden_NH: Tensor,
        targets_N: Tensor,
        teacher_logits: TeacherLogits | None,
        settings: StepSettings,
        chunk_bytes: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums of loss, cross-entropy and divergence over the N tokens; only the first has a gradient."""
        loss = HeadLoss(
            targets_N,
            kd_ratio=settings.kd_ratio,
            kd=settings.kd,
            kd_temperature=settings.kd_temperature,
            teacher_logits=teacher_logits,
            transform=self.transform,
            chunk_bytes=chunk_bytes,
            token_weight=settings.token_weight,
            gap_meter=settings.gap_meter,
        )
        return chunked_head_loss(hidden_NH, self.weight, self.bias, loss)


class DistillationModule(nn.Module):
    """A student and its loss.

    Parameters are named `student.<name in the student>`; the head's appear once more, shared, under `loss_head`.
    """

    def __init__(self, student: PreTrainedModel, chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> None:
        super().__init__()
        parts = split_model(student)
        self.student = student
        self.loss_head = LossHead(parts.head, parts.transform)
        self.chunk_bytes = chunk_bytes
        # Plain dataclasses: as parameters or buffers frozen heads would be partitioned, cast and saved by DeepSpeed.
        self._teacher_heads: tuple[HeadWeights | None, ...] = ()

    def attach_teacher_heads(self, *heads: HeadWeights | None) -> None:
        """Set the LM head of each teacher, on the device of the batches; None for one whose top k are cached."""
        self._teacher_heads = heads

    def hidden(self, batch: MicroBatch) -> Tensor:
        """Return the student's last hidden states at the response positions, shape (N, H)."""
        # (B, T, V) logits would be most of a step's memory, and those of prompt and padding have no part in the loss.
        return split_model(self.student).response_hidden(*batch.rows_input)

    def forward(self, batch: MicroBatch, settings: StepSettings) -> tuple[Tensor, Tensor, Tensor]:
        """Return sums over the response tokens of the batch.

        Returns:
            (sum of (1 - kd_ratio) ce + kd_ratio kd, sum of ce, sum of kd), float32 scalars; the first carries the
            gradient. With kd_ratio 0 the teacher is left alone and the third is 0.
        """
        # The loss is taken in here and not by the caller: under ZeRO-3 a head's weight is there only while the forward
        # of the module that owns it runs.
        settings = settings.of(batch)
        return self.loss_head(
            self.hidden(batch),
            batch.targets_N,
            self._teacher_logits(batch, settings),  # a function: a chunk's logits are made when the chunk is
            settings,
            self._chunk_bytes(batch),
        )

    @torch.no_grad()
    def teacher_scores(self, batch: MicroBatch, settings: StepSettings) -> Tensor:
        """Return the parts of the teacher's scores that weigh the response tokens of the batch, shape (N, P)."""
        teacher = self._teacher_logits(batch, settings.of(batch))
        weight = settings.token_weight
        assert weight is not None and teacher is not None
        parts_NP = torch.empty(batch.num_response_tokens, weight.num_parts, device=batch.targets_N.device)
        # In chunks, as in the loss: the teacher's logits of all tokens are never held.
        for rows in token_chunks(
            batch.num_response_tokens, self.student.config.get_text_config().vocab_size, self.chunk_bytes
        ):
            parts_NP[rows] = weight.parts(teacher(rows))
        return parts_NP

    def _chunk_bytes(self, batch: MicroBatch) -> int:
        """Size of the student's logits of a chunk; less where those of a teacher with another tokenizer are larger."""
        own = [self._teacher_heads[one.teacher] for one in batch.teacher_outputs if one.paired_N is not None]
        widest = max((head.vocab_size for head in own if head is not None), default=0)
        vocab_size = self.student.config.get_text_config().vocab_size
        return self.chunk_bytes * vocab_size // max(vocab_size, widest)

    def _teacher_logits(self, batch: MicroBatch, settings: StepSettings) -> TeacherLogits | None:
        if settings.kd_ratio == 0.0:  # a teacher that weighs nothing is not computed
            return None
        if not batch.teacher_outputs:
            raise ValueError("kd_ratio is above 0, but there is no teacher: the batch says nothing of one")
        return teacher_logits(batch.teacher_outputs, self._teacher_heads)
