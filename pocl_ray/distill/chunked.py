"""LM head and loss together, a chunk of tokens at a time, without ever holding the logits of all tokens.

For each chunk the logits are made, the loss taken, and its gradient carried through the head into the gradients of
the hidden states and of the weight, all within forward. The logits then go; backward only scales what is already
there. The head is therefore applied once: chunks that are recomputed in backward would apply it twice.

What stays between forward and backward is one (N, H) gradient and one of the weight's size, neither of which grows
with N x V.

Legend: N response tokens in one flat axis, C those of one chunk, V vocabulary, H hidden of the student.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

KdFunction = Callable[[Tensor, Tensor, float], Tensor]
LogitsFunction = Callable[[Tensor], Tensor]


class TeacherTargets(Protocol):
    """The teachers' targets for a chunk of tokens, if they are not the logits of one teacher."""

    def divergence(self, kd: KdFunction, student_logits_CV: Tensor, temperature: float) -> Tensor:
        """Return the divergence of each token, shape (C,)."""

    def entropy(self) -> Tensor:
        """Return the entropy of the teachers' plain distribution at each token, shape (C,), in nats."""


TeacherLogits = Callable[[slice], "Tensor | TeacherTargets"]


class GapMeter(Protocol):
    """Measures the gap between student and teacher at each token, from the same logits as the loss."""

    def measure(self, rows: slice, chunk: ChunkValues, teacher: Tensor | TeacherTargets, loss: HeadLoss) -> None:
        """Take the tokens of a chunk: what the loss has made of them, and the teacher's side of it."""


@dataclass(frozen=True)
class ChunkValues:
    """The values of a chunk in the loss, without gradients.

    Attributes:
        student_logits_CV: Logits of the student.
        ce_C: Cross-entropy of each token.
        kd_C: Divergence of each token in the loss; a single sum where a fused kernel made it.
        targets_C: Ids of the tokens to predict.
    """

    student_logits_CV: Tensor
    ce_C: Tensor
    kd_C: Tensor
    targets_C: Tensor

    def log_norms(self) -> Tensor:
        """Return the student's logarithm Z of the sum of exponentials, shape (C,): ce = Z - s[target]."""
        return self.ce_C + self.student_logits_CV.gather(-1, self.targets_C[:, None]).squeeze(-1)


DEFAULT_CHUNK_BYTES = 64 * 2**20
# Probabilities of a large vocabulary underflow in float16. Its gradients are held times this factor until backward,
# where the loss scale of the engine takes over; more would overflow the products over the tokens of a chunk.
_FLOAT16_SCALE = 16.0
# Rows of the weight's gradient that are multiplied in low precision and then added in float32.
_SLICE_ROWS = 8192


@dataclass(frozen=True)
class HeadLoss:
    """The loss on the logits, and the values that it needs.

    Attributes:
        targets_N: Ids of the tokens to predict.
        kd_ratio: Weight of the distillation loss; 1 - kd_ratio is that of the cross-entropy.
        kd: The divergence, of (student logits, teacher logits, temperature); not called where kd_ratio is 0.
        kd_temperature: Softens both distributions in the divergence; the cross-entropy is at 1.
        teacher_logits: Function from a slice of the tokens to the teacher's logits or targets; not called
            where kd_ratio is 0.
        transform: Transform of the student's family after the head.
        chunk_bytes: Size of the float32 logits of one chunk; the loss holds a few such arrays at once.
        token_weight: Function from the result of `teacher_logits` and the student's logits to each token's weight in
            the divergence; None: all weigh 1.
        gap_meter: Meter that is called with every chunk if the teacher is used; None: no gaps are measured.
    """

    targets_N: Tensor
    kd_ratio: float
    kd: KdFunction | None = None
    kd_temperature: float = 1.0
    teacher_logits: TeacherLogits | None = None
    transform: LogitsFunction | None = None
    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    token_weight: Callable[[Tensor | TeacherTargets, Tensor], Tensor] | None = None
    gap_meter: GapMeter | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.kd_ratio <= 1.0:
            raise ValueError(f"kd_ratio must lie in [0, 1], not {self.kd_ratio}")
        if self.kd_ratio > 0.0 and (self.kd is None or self.teacher_logits is None):
            raise ValueError("a kd_ratio above 0 needs a divergence and the teacher's logits")

    def chunks(self, vocabulary: int) -> list[slice]:
        """Slices of nearly equal length that cover all tokens."""
        return token_chunks(self.targets_N.shape[0], vocabulary, self.chunk_bytes)

    def sums(self, logits_CV: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, ce, kd), each summed over the tokens of a chunk; only the first has a gradient that counts."""
        if self.transform is not None:
            logits_CV = self.transform(logits_CV)
        # float32 at least: a log-softmax over a large vocabulary in 16 bits would lose the unlikely tokens.
        logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
        # At kd_ratio 1 the cross-entropy is logged but not trained on: its gradient would be an array of (C, V) for 0.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.kd_ratio < 1.0):
            ce_C = F.cross_entropy(logits_CV, self.targets_N[rows], reduction="none")
            # A sum: the engine divides by the response tokens of the whole step, which no chunk knows.
            ce = ce_C.sum()
        if self.kd is None or self.teacher_logits is None or self.kd_ratio == 0.0:
            return ce, ce, torch.zeros_like(ce)
        with torch.no_grad():
            teacher = self.teacher_logits(rows)
        if isinstance(teacher, Tensor):
            kd_C = self.kd(logits_CV, teacher, self.kd_temperature)
        else:
            kd_C = teacher.divergence(self.kd, logits_CV, self.kd_temperature)
        if self.gap_meter is not None:
            with torch.no_grad():
                chunk = ChunkValues(logits_CV.detach(), ce_C.detach(), kd_C.detach(), self.targets_N[rows])
                self.gap_meter.measure(rows, chunk, teacher, self)
        kd = (kd_C if self.token_weight is None else kd_C * self.token_weight(teacher, logits_CV.detach())).sum()
        # Not 0 * ce: a target that the student masks has an infinite ce, and 0 * inf is no number.
        return (kd if self.kd_ratio == 1.0 else (1.0 - self.kd_ratio) * ce + self.kd_ratio * kd), ce, kd


def token_chunks(num_tokens: int, vocabulary: int, chunk_bytes: int) -> list[slice]:
    """Cut tokens into slices of nearly equal length whose float32 logits take `chunk_bytes` at most."""
    most = max(1, chunk_bytes // (4 * vocabulary))
    # Nearly equal ones: a short last chunk would cost a whole round of kernels.
    num_chunks = -(-num_tokens // most)
    bounds = [num_tokens * index // num_chunks for index in range(num_chunks + 1)] if num_chunks else [0]
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


def chunked_head_loss(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, loss: HeadLoss
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the tokens of ((1 - kd_ratio) ce + kd_ratio kd, ce, kd), scalars; only the first carries a gradient.

    The value does not depend on the chunks. Under autocast the head runs in autocast's dtype, else in the weight's.
    With kd_ratio 0 the teacher is not computed and the third sum is 0. The gradient can be taken once, and not twice
    differentiated.
    """
    return ChunkedHeadLoss.apply(hidden_NH, weight_VH, bias_V, loss, torch.is_grad_enabled())


class ChunkedHeadLoss(torch.autograd.Function):
    """The autograd side of `chunked_head_loss`: forward makes the gradients, backward scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, loss: HeadLoss, with_grad: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the chunks; `with_grad` comes from the caller, since grad mode is always off in here."""
        # The gradient is made here because the logits are here. Autograd would keep those of every chunk until
        # backward, or recompute them there: (N, V) memory, or the head's product twice. The price is that forward must
        # know which gradients are wanted, and that the gradient of the loss itself is a factor that comes later.
        dtype = _compute_dtype(hidden_NH.device.type, weight_VH.dtype)
        needed = [with_grad and bool(needs) for needs in ctx.needs_input_grad[:3]]
        chunks = loss.chunks(weight_VH.shape[0])
        totals = torch.zeros(3, dtype=torch.float64, device=hidden_NH.device)
        # Off within: dtype is autocast's already, and the loss must stay in float32.
        with torch.autocast(hidden_NH.device.type, enabled=False):
            head = _Head.of(hidden_NH, weight_VH, bias_V, dtype, needed, len(chunks))
            for rows in chunks:
                totals += head.run_chunk(rows, loss)
        ctx.gradients, ctx.gradient_scale = head.gradients, head.gradient_scale
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden_NH, weight_VH, bias_V)]
        # Copies, not views of one tensor: callers add to them and reduce them over ranks in place.
        sum_dtype = torch.promote_types(dtype, torch.float32)
        loss_sum, ce_sum, kd_sum = (total.to(sum_dtype, copy=True) for total in totals)
        ctx.mark_non_differentiable(ce_sum, kd_sum)
        return loss_sum, ce_sum, kd_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """Scale the gradients that forward left, in place: they are as large as the weight."""
        if ctx.gradients is None:
            raise RuntimeError("the gradients of a chunked head loss can be taken only once")
        gradients, ctx.gradients = ctx.gradients, None
        scale = grad_loss / ctx.gradient_scale
        scaled = [
            None if gradient is None else gradient.mul_(scale).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None)


def _compute_dtype(device_type: str, weight_dtype: torch.dtype) -> torch.dtype:
    if torch.is_autocast_enabled(device_type) and weight_dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return weight_dtype


@dataclass
class _Head:
    """The student's head in the dtype of the computation, and the gradients that grow chunk by chunk."""

    hidden_NH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None
    gradients: list[Tensor | None]  # of hidden, weight, bias; None where not needed
    gradient_scale: float

    @classmethod
    def of(
        cls,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        dtype: torch.dtype,
        needed: list[bool],
        num_chunks: int,
    ) -> _Head:
        # Added up in bfloat16, the error grows with the chunks (0.24 % of the norm at 1, 0.49 % at 16, 0.73 % at 256);
        # added in float32 it stays at 0.24 % for two more bytes a weight. One chunk is one product, rounded once.
        exact = num_chunks <= 1 or dtype not in (torch.bfloat16, torch.float16)
        weight_grad_dtype = weight_VH.dtype if exact else torch.float32
        gradients = [
            # Empty, as each token is in one chunk, which writes its row; all chunks add to those of weight and bias.
            torch.empty_like(hidden_NH, dtype=dtype) if needed[0] else None,
            torch.zeros_like(weight_VH, dtype=weight_grad_dtype) if needed[1] else None,
            torch.zeros_like(bias_V, dtype=weight_grad_dtype) if bias_V is not None and needed[2] else None,
        ]
        scale = _FLOAT16_SCALE if dtype == torch.float16 else 1.0
        bias_V = None if bias_V is None else bias_V.to(dtype)
        return cls(hidden_NH.to(dtype), weight_VH.to(dtype), bias_V, gradients, scale)

    def run_chunk(self, rows: slice, loss: HeadLoss) -> Tensor:
        """The three sums of a chunk, shape (3,), after adding its part to the gradients."""
        logits_CV = F.linear(self.hidden_NH[rows], self.weight_VH, self.bias_V)
        if all(gradient is None for gradient in self.gradients):  # evaluation
            return torch.stack(loss.sums(logits_CV, rows)).double()
        # Autograd runs from the loss to the logits only, whose formula is any divergence's; from the logits on the
        # head is a product, whose gradients `_add` writes into buffers that stand already.
        with torch.enable_grad():
            sums = loss.sums(logits_CV.requires_grad_(), rows)
            (grad_logits_CV,) = torch.autograd.grad(sums[0], logits_CV, torch.full_like(sums[0], self.gradient_scale))
        del logits_CV  # before the products below, which need room of their own
        self._add(rows, grad_logits_CV)
        return torch.stack([total.detach() for total in sums]).double()

    def _add(self, rows: slice, grad_logits_CV: Tensor) -> None:
        grad_hidden_NH, grad_weight_VH, grad_bias_V = self.gradients
        if grad_hidden_NH is not None:
            torch.mm(grad_logits_CV, self.weight_VH, out=grad_hidden_NH[rows])
        if grad_bias_V is not None:
            grad_bias_V += grad_logits_CV.sum(0, dtype=grad_bias_V.dtype)
        if grad_weight_VH is None:
            return
        hidden_CH = self.hidden_NH[rows]
        if grad_weight_VH.dtype == grad_logits_CV.dtype:
            grad_weight_VH.addmm_(grad_logits_CV.t(), hidden_CH)
            return
        # In slices: the product in low precision is a temporary, which would be as large as the whole weight.
        parts = zip(grad_weight_VH.split(_SLICE_ROWS), grad_logits_CV.t().split(_SLICE_ROWS), strict=True)
        for part_VH, grad_logits_VC in parts:
            part_VH += grad_logits_VC @ hidden_CH
