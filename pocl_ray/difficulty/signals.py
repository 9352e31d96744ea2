"""Difficulty signals from the hidden states of response tokens: values of each token, averaged over each row.

Let p be the teacher's next-token distribution, q the student's, and y the reference's tokens. A row's signals are means
over its response tokens of

    ce_loss              -log q(y)
    student_confidence   max q
    teacher_ce_loss      -log p(y)
    teacher_entropy      -sum p log p
    teacher_student_kl   sum p log(p / q), over the vocabulary that both models share

Logits exist for one chunk of tokens at a time. Rows on which a model overflows are refused: they would be ranked,
cached and learnt wrongly without a word.

Axes: N the response tokens of a batch in one flat axis, C those of a chunk, V vocabulary, H hidden, R rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch

from pocl_ray.data.row_store import RowStore
from pocl_ray.difficulty.choice import TokenSignal, measure
from pocl_ray.difficulty.ranking import TEACHER_SIGNALS
from pocl_ray.errors import ModelError
from pocl_ray.teacher_cache.top_k import TopK
from pocl_ray.teacher_cache.writer import is_finite, listed

CHUNK_MIB = 64

CHECKED = {"ce_loss", "student_confidence", *TEACHER_SIGNALS}  # plug-ins' signals are checked where they are measured

Signals = dict[str, npt.NDArray[np.float64]]
LmHead = Callable[[torch.Tensor], torch.Tensor]
"""A function from hidden states of shape (C, H) to logits of shape (C, V)."""


@torch.no_grad()
def student_signals(
    hidden_NH: torch.Tensor, head: LmHead, targets_N: torch.Tensor, lengths_R: npt.NDArray[np.int64]
) -> Signals:
    """Return `ce_loss` and `student_confidence` of each row.

    Args:
        hidden_NH: The student's final hidden states at the positions that predict `targets_N`.
        head: The student's LM head.
        targets_N: Token ids of the responses, row after row, with the end-of-sequence tokens.
        lengths_R: Number of response tokens of each row, at least 1; the sum is N.

    Returns:
        Mapping of signal names to means, each of shape (R,), in nats (`student_confidence`: a probability).
    """
    ce_loss, confidence = [], []
    for part in _chunks(hidden_NH, head, CHUNK_MIB):
        logq_CV = head(hidden_NH[part]).float().log_softmax(dim=-1)
        ce_loss.append(_nll(logq_CV, targets_N[part]))
        confidence.append(logq_CV.amax(dim=-1).exp())
    return {"ce_loss": _row_means(ce_loss, lengths_R), "student_confidence": _row_means(confidence, lengths_R)}


@torch.no_grad()
def teacher_signals(
    hidden_NH: torch.Tensor,
    head: LmHead,
    targets_N: torch.Tensor,
    lengths_R: npt.NDArray[np.int64],
    student: tuple[torch.Tensor, LmHead] | None = None,
    extra: Mapping[str, TokenSignal] = MappingProxyType({}),
    watch: Callable[[torch.Tensor], object] | None = None,
) -> Signals:
    """Return `teacher_ce_loss` and `teacher_entropy` of each row, and `teacher_student_kl` if the student is given.

    Args:
        hidden_NH: The teacher's final hidden states at the positions that predict `targets_N`.
        head: The teacher's LM head.
        targets_N: Token ids, as in `student_signals`.
        lengths_R: Number of response tokens, as in `student_signals`.
        student: Student's hidden states at the same positions, in its own width, and its LM head.
        extra: Signals of plug-ins, which need the student.
        watch: Function that is called with the teacher's logits of each chunk, float32, in the order of the tokens.

    Returns:
        Mapping of signal names to means, each of shape (R,), in nats.
    """
    assert student is not None or not extra, "a plug-in's signal compares the two models"
    # Half of the budget each where both models' logits are in memory.
    ce_loss, entropy = [], []
    compared: dict[str, list[torch.Tensor]] = defaultdict(list)
    budget_mib = CHUNK_MIB if student is None else CHUNK_MIB // 2
    for part in _chunks(hidden_NH, head, budget_mib):
        logits_CV = head(hidden_NH[part]).float()
        if watch is not None:
            watch(logits_CV)
        logp_CV = logits_CV.log_softmax(dim=-1)
        ce_loss.append(_nll(logp_CV, targets_N[part]))
        entropy.append(torch.special.entr(logp_CV.exp()).sum(dim=-1))
        if student is not None:
            student_hidden_NH, student_head = student
            student_CV = student_head(student_hidden_NH[part]).float()
            for name, values_C in _compare(logits_CV, student_CV, targets_N[part], extra):
                compared[name].append(values_C)
    signals = {"teacher_ce_loss": _row_means(ce_loss, lengths_R), "teacher_entropy": _row_means(entropy, lengths_R)}
    return {**signals, **{name: _row_means(values, lengths_R) for name, values in compared.items()}}


@torch.no_grad()
def comparison_signals(
    teacher: tuple[torch.Tensor, LmHead],
    student: tuple[torch.Tensor, LmHead],
    targets_N: torch.Tensor,
    lengths_R: npt.NDArray[np.int64],
    extra: Mapping[str, TokenSignal] = MappingProxyType({}),
) -> Signals:
    """Return `teacher_student_kl` of each row and the signals of plug-ins, which change as the student learns.

    Args:
        teacher: Teacher's hidden states at the positions that predict `targets_N`, and its LM head.
        student: Student's hidden states at these positions, and its LM head.
        targets_N: Token ids, as in `student_signals`.
        lengths_R: Number of response tokens, as in `student_signals`.
        extra: Signals of plug-ins.
    """
    compared: dict[str, list[torch.Tensor]] = defaultdict(list)
    (teacher_NH, teacher_head), (student_NH, student_head) = teacher, student
    for part in _chunks(student_NH, student_head, CHUNK_MIB // 2):
        teacher_CV, student_CV = teacher_head(teacher_NH[part]).float(), student_head(student_NH[part]).float()
        for name, values_C in _compare(teacher_CV, student_CV, targets_N[part], extra):
            compared[name].append(values_C)
    return {name: _row_means(values, lengths_R) for name, values in compared.items()}


def _compare(
    teacher_CV: torch.Tensor, student_CV: torch.Tensor, targets_C: torch.Tensor, extra: Mapping[str, TokenSignal]
) -> Iterator[tuple[str, torch.Tensor]]:
    yield "teacher_student_kl", forward_kl(teacher_CV, student_CV)
    shared = min(teacher_CV.shape[-1], student_CV.shape[-1])
    for name, signal in extra.items():
        yield name, measure(name, signal.function, student_CV[:, :shared], teacher_CV[:, :shared], targets_C)


def forward_kl(teacher_logits_CV: torch.Tensor, student_logits_CV: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher || student) of each token, shape (C,), in nats.

    Vocabularies padded to different sizes are cut to the shared part. A term is 0 if the teacher's probability is 0,
    whatever the student's is.

    Args:
        teacher_logits_CV: Float32 logits.
        student_logits_CV: Float32 logits; V may differ from the teacher's.
    """
    shared = min(teacher_logits_CV.shape[-1], student_logits_CV.shape[-1])
    logp_CV = teacher_logits_CV[:, :shared].log_softmax(dim=-1)
    logq_CV = student_logits_CV[:, :shared].log_softmax(dim=-1)
    p_CV = logp_CV.exp()
    return torch.where(p_CV > 0, p_CV * (logp_CV - logq_CV), 0.0).sum(dim=-1)


def _chunks(hidden_NH: torch.Tensor, head: LmHead, budget_mib: int) -> Iterator[slice]:
    num_tokens = hidden_NH.shape[0]
    if num_tokens == 0:
        return
    vocab_size = head(hidden_NH[:1]).shape[-1]  # known to the head alone, which is a function here
    size = max(1, budget_mib * 2**20 // (4 * vocab_size))
    for start in range(0, num_tokens, size):
        yield slice(start, start + size)


def _nll(log_probs_CV: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
    return -log_probs_CV.gather(-1, targets_C[:, None]).squeeze(-1)


def _row_means(values: list[torch.Tensor], lengths_R: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The means over each row's tokens, computed on the CPU, where the order of summation is fixed."""
    assert (lengths_R > 0).all(), "a row has no response tokens"
    lengths = torch.from_numpy(np.asarray(lengths_R, dtype=np.int64))
    rows_N = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    sums_R = torch.zeros(len(lengths), dtype=torch.float64)
    if values:
        sums_R.index_add_(0, rows_N, torch.cat(values).double().cpu())
    return (sums_R / lengths).numpy()


def check_finite(
    role: str,
    name: str,
    rows: RowStore,
    ids: npt.NDArray[np.int64],
    hidden_NH: torch.Tensor,
    lengths_R: npt.NDArray[np.int64],
    signals: Signals,
    outputs: Sequence[torch.Tensor | TopK] = (),
) -> None:
    """Refuse rows of a micro-batch with a hidden state, a signal or a cached output that is not finite.

    Args:
        role: `teacher` or `student`.
        name: Name of the set.
        rows: Rows of the set.
        ids: Row ids of the micro-batch, shape (R,).
        hidden_NH: Hidden states of the N response tokens.
        lengths_R: Number of response tokens of each row.
        signals: Signals of the rows.
        outputs: Outputs of each row that go to the cache, in its dtype.

    Raises:
        ModelError: Some are not finite; it names their source rows and the dtype.
    """
    own = np.array([is_finite(part) for part in hidden_NH.split(lengths_R.tolist())])
    own &= np.all([np.isfinite(values_R) for key, values_R in signals.items() if key in CHECKED], axis=0)
    stored = np.array([is_finite(output) for output in outputs]) if outputs else own
    if (own & stored).all():
        return
    found = f"{listed(sorted(rows.source_rows(ids[~(own & stored)])))} of {name}"
    if own.all():
        raise ModelError(
            f"distill.cache_dtype: the teacher's outputs for {found} overflow in it; set it to auto or float32"
        )
    dtype = str(hidden_NH.dtype).removeprefix("torch.")
    raise ModelError(
        f"{role}: its outputs for {found} are not finite in {dtype}; set {role}.dtype to bfloat16 or float32, or look "
        "at its weights"
    )
