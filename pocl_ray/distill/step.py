"""The module that DeepSpeed wraps: student, LM head and loss in one forward that returns sums over response tokens.

Only the hidden states of positions whose next token is a response token reach the LM head; prompt and padding do not.
Sums, not means: the caller divides by the number of response tokens of the whole optimizer step, over all workers and
micro-batches, so that neither how a batch is split nor how many workers share it changes the loss.

Legend: B batch, T tokens, N response tokens in one flat axis, V vocabulary, H hidden of the student, K of the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pocl_ray.distill.chunked import DEFAULT_CHUNK_BYTES, HeadLoss, KdFunction, chunked_head_loss
from pocl_ray.distill.heads import LogitsTransform, TeacherHead, TeacherLogits
from pocl_ray.errors import ModelError


@dataclass(frozen=True)
class MicroBatch:
    """The rows that one worker passes through the student at once, padded on the right to their longest.

    Attributes:
        input_ids_BT: Token ids of prompt and response.
        attention_mask_BT: 1 on tokens, 0 on padding.
        response_index_N: Positions whose next token is a response token, as indices into the flat (B*T), ascending.
        targets_N: Those next tokens.
        teacher_hidden_NK: The teacher's last hidden states at the same positions; None where no teacher is needed.
    """

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    response_index_N: Tensor
    targets_N: Tensor
    teacher_hidden_NK: Tensor | None = None

    def to(self, device: torch.device | str) -> MicroBatch:
        """A copy on another device; asynchronous from pinned memory."""
        hidden_NK = self.teacher_hidden_NK
        return MicroBatch(
            self.input_ids_BT.to(device, non_blocking=True),
            self.attention_mask_BT.to(device, non_blocking=True),
            self.response_index_N.to(device, non_blocking=True),
            self.targets_N.to(device, non_blocking=True),
            None if hidden_NK is None else hidden_NK.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class StepSettings:
    """What a stage sets: the divergence (of `resolve_loss`), its temperature and its weight in the loss."""

    kd_temperature: float
    kd_ratio: float
    kd: KdFunction | None = None


class LossHead(nn.Module):
    """The LM head with the loss behind it.

    It owns the head's parameters directly, shared with the student (and with the embedding, where they are tied):
    ZeRO-3 gathers the parameters of the module that is called, and this is the one.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, head: nn.Module, transform: LogitsTransform | None) -> None:
        super().__init__()
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
        """Sums of loss, cross-entropy and divergence over the N tokens; only the first carries a gradient."""
        loss = HeadLoss(
            targets_N,
            kd_ratio=settings.kd_ratio,
            kd=settings.kd,
            kd_temperature=settings.kd_temperature,
            teacher_logits=teacher_logits,
            transform=self.transform,
            chunk_bytes=chunk_bytes,
        )
        return chunked_head_loss(hidden_NH, self.weight, self.bias, loss)


class DistillationModule(nn.Module):
    """A student and its loss.

    Parameters are named `student.<name in the student>`; the head's appear once more, shared, under `loss_head`.
    """

    def __init__(self, student: PreTrainedModel, chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> None:
        super().__init__()
        head = student.get_output_embeddings()
        if head is None or student.base_model is student:
            raise ModelError(f"{type(student).__name__} has no LM head over a body; use a causal language model")
        self.student = student
        self.loss_head = LossHead(head, LogitsTransform.of(student.config.get_text_config()))
        self.chunk_bytes = chunk_bytes
        # A plain dataclass: as a parameter or buffer the frozen head would be partitioned, cast and saved by DeepSpeed.
        self._teacher_head: TeacherHead | None = None

    def attach_teacher_head(self, head: TeacherHead | None) -> None:
        """Set the teacher's LM head, on the device of the batches; None for training without a teacher."""
        self._teacher_head = head

    def hidden(self, batch: MicroBatch) -> Tensor:
        """The student's last hidden states at the response positions, shape (N, H)."""
        return response_hidden(self.student, batch)

    def forward(self, batch: MicroBatch, settings: StepSettings) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over the response tokens of the batch.

        Returns:
            (sum of (1 - kd_ratio) ce + kd_ratio kd, sum of ce, sum of kd), float32 scalars; the first carries the
            gradient. With kd_ratio 0 the teacher is left alone and the third is 0.
        """
        return self.loss_head(
            self.hidden(batch), batch.targets_N, self._teacher_logits(batch, settings), settings, self.chunk_bytes
        )

    def _teacher_logits(self, batch: MicroBatch, settings: StepSettings) -> TeacherLogits | None:
        if settings.kd_ratio == 0.0:
            return None
        if self._teacher_head is None or batch.teacher_hidden_NK is None:
            raise ValueError(
                "kd_ratio is above 0, but there is no teacher head, or the batch has no teacher hidden states"
            )
        return self._teacher_head.by_chunk(batch.teacher_hidden_NK)


def response_hidden(model: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """Run a model's body and return its last hidden states at the response positions, shape (N, H)."""
    body = model.base_model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False)
    return body.last_hidden_state.flatten(0, 1).index_select(0, batch.response_index_N)


def teacher_head(teacher: PreTrainedModel) -> TeacherHead:
    """The frozen LM head of a teacher, sharing its memory."""
    head = teacher.get_output_embeddings()
    if head is None:
        raise ModelError(f"teacher {type(teacher).__name__} has no LM head; use a causal language model")
    bias_V = getattr(head, "bias", None)
    return TeacherHead(
        head.weight.detach(),
        None if bias_V is None else bias_V.detach(),
        LogitsTransform.of(teacher.config.get_text_config()),
    )


@torch.no_grad()
def check_head_split(model: PreTrainedModel) -> None:
    """Hold body and LM head, run apart as here, against the model's own logits on a few tokens.

    Families differ in what they do between the two; one that is not known here must not train on wrong logits.
    Call it before ZeRO-3 partitions the weights.

    Raises:
        ModelError: The two disagree.
    """
    head, was_training = teacher_head(model), model.training
    length = 6
    ids_BT = torch.arange(length, device=model.device).remainder(model.config.get_text_config().vocab_size)[None]
    batch = MicroBatch(ids_BT, torch.ones_like(ids_BT), torch.arange(length, device=model.device), ids_BT[0])
    model.eval()
    own_NV = model(input_ids=ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False).logits[0].float()
    split_NV = head.logits(response_hidden(model, batch)).float()
    model.train(was_training)
    tolerance = 0.05 if model.dtype in (torch.bfloat16, torch.float16) else 1e-3
    if not torch.allclose(split_NV, own_NV, rtol=tolerance, atol=tolerance * float(own_NV.abs().max())):
        raise ModelError(
            f"{type(model).__name__} changes its logits in a way not known here: its head does not give "
            "them back; use another model family"
        )
