"""Difficulty signals from the hidden states of response tokens: per-token values, averaged by row.

With p the teacher's next-token distribution, q the student's and y the reference's tokens, a row's signals are means
over its response tokens of

    ce_loss              -log q(y)
    student_confidence   max q
    teacher_ce_loss      -log p(y)
    teacher_entropy      -sum p log p
    teacher_student_kl   sum p log(p / q), over the vocabulary that both models share

Logits exist for one chunk of tokens at a time. Axes: N the response tokens of a batch in one flat axis, C those of a
chunk, V vocabulary, H hidden, R rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from pocl_ray import plugins
from pocl_ray.config import DifficultyConfig
from pocl_ray.data.row_store import RowStore
from pocl_ray.difficulty.ranking import SIGNALS, TEACHER_SIGNALS, Easy, rank_rows, unknown_signal
from pocl_ray.errors import UserError
from pocl_ray.records import COLUMN, ID, RANK, RRF_SCORE

# The signals that a config chooses: those of `SIGNALS`, columns of the rows, and plug-ins of other packages.
#
# A plug-in stands in the entry-point group `pocl_ray.signals`. It is a function of the two models' logits at the
# response tokens and of these tokens, which returns one value a token; a row's signal is their mean. It is called
# once on made-up logits before anything is scored, so that a mistake shows early and under the plug-in's own name.
#
# Legend: N response tokens in one flat axis, V vocabulary.

GROUP = "pocl_ray.signals"
_TAKEN = (ID, RANK, RRF_SCORE, "answer_stopped")

TokenFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`f(student_logits_NV, teacher_logits_NV, targets_N)` -> one float a token, shape (N,). Logits are float32 and cut to
the vocabulary that both models share."""


@dataclass(frozen=True)
class TokenSignal:
    """A plug-in's signal; a bare function counts as one of which low values are easy.

    Attributes:
        function: What it measures at each token.
        easy: Whether a high or a low mean over the tokens is an easy row.
    """

    function: TokenFunction
    easy: Easy = "low"


@dataclass(frozen=True)
class Choice:
    """What the ranking is made of.

    Attributes:
        easy: Of each chosen signal that is not in `SIGNALS`, which values are easy.
        plugins: The names of those that plug-ins measure.
        origins: Where these come from, with the version; scores depend on it.
        reads_teacher: Whether any of the chosen signals needs the teacher.
        compares: Whether any of them needs both models at once.
    """

    easy: dict[str, Easy]
    plugins: tuple[str, ...]
    origins: tuple[str, ...]
    reads_teacher: bool = True
    compares: bool = True


def choose_signals(difficulty: DifficultyConfig) -> Choice:
    """Look up the signals of a config, and try the plug-ins among them.

    Raises:
        ConfigError: A name is unknown; the nearest one is named.
        UserError: A plug-in cannot be loaded or breaks the contract of a signal.
    """
    easy: dict[str, Easy] = {f"{COLUMN}{name}": direction for name, direction in difficulty.columns.items()}
    names = tuple(name for name in difficulty.signals if name not in SIGNALS and name not in easy)
    easy.update({name: signal.easy for name, signal in load_signals(names).items()})
    found = [plugins.installed(GROUP)[name] for name in names]
    origins = tuple(f"{one.value} {one.dist.version if one.dist is not None else ''}" for one in found)
    return Choice(
        easy,
        names,
        origins,
        reads_teacher=bool(names) or not set(TEACHER_SIGNALS).isdisjoint(difficulty.signals),
        compares=bool(names) or "teacher_student_kl" in difficulty.signals,
    )


def rank_table(table: pa.Table, rows: RowStore, difficulty: DifficultyConfig, seed: int) -> pa.Table:
    """Rank rows by the signals of a config.

    Args:
        table: The measured signals, one row a training row, in their order.
        rows: The training rows, for columns of the user's.
        difficulty: Which signals, their weights, and how ties are broken.
        seed: Of a seeded tie-break.

    Returns:
        The table with the user's columns, `rrf_score` and `rank` appended.
    """
    for name in difficulty.columns:
        table = table.append_column(f"{COLUMN}{name}", pa.array(rows.numbers(name)))
    rrf_score, rank = rank_rows(
        {name: table[name].to_numpy() for name in difficulty.signals},
        difficulty.rrf_k,
        difficulty.tie_break,
        seed,
        weights=difficulty.signals,
        easy=choose_signals(difficulty).easy,
    )
    return table.append_column(RRF_SCORE, pa.array(rrf_score)).append_column(RANK, pa.array(rank))


def load_signals(names: Iterable[str]) -> dict[str, TokenSignal]:
    """Import the plug-ins of these names.

    Raises:
        ConfigError: There is none of that name.
        UserError: A plug-in cannot be loaded or breaks the contract of a signal.
    """
    installed = plugins.installed(GROUP)
    signals = {}
    for name in names:
        if name not in installed or name in _TAKEN:
            raise unknown_signal(name, [*SIGNALS, *installed])
        found = plugins.load("signal", installed[name])
        if not isinstance(found, TokenSignal) and not callable(found):
            raise UserError(
                f"signal plug-in '{name}' is {type(found).__name__}; it must be a function or a TokenSignal"
            )
        signals[name] = found if isinstance(found, TokenSignal) else TokenSignal(found)
        _probe(name, signals[name].function)
    return signals


def measure(name: str, function: TokenFunction, student_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Call a plug-in and hold it to the contract of a signal.

    Returns:
        One finite value a token, shape (N,).

    Raises:
        UserError: It raises, or returns anything else.
    """
    try:
        value_N = function(student_NV, teacher_NV, targets_N)
    except Exception as error:  # code of others: every failure is reported under the plug-in's name
        raise UserError(f"signal plug-in '{name}' fails when called: {plugins.reason(error)}") from error
    wrong = _what_is_wrong(value_N, len(targets_N))
    if wrong:
        raise UserError(f"signal plug-in '{name}' {wrong}; a signal returns one finite float a token, shape (N,)")
    return value_N


def _what_is_wrong(value_N: object, num_tokens: int) -> str:
    if not isinstance(value_N, Tensor):
        return f"returns {type(value_N).__name__}, not a tensor"
    if value_N.shape != (num_tokens,):
        return f"returns shape {tuple(value_N.shape)} for {num_tokens} tokens"
    if not value_N.is_floating_point() or not bool(torch.isfinite(value_N).all()):
        return "returns values that are not finite floats"
    return ""


def _probe(name: str, function: TokenFunction) -> None:
    generator = torch.Generator().manual_seed(0)
    student_NV, teacher_NV = torch.randn(2, 3, 7, generator=generator)
    measure(name, function, student_NV, teacher_NV, torch.tensor([0, 3, 6]))


CHUNK_MIB = 64

Signals = dict[str, npt.NDArray[np.float64]]
LmHead = Callable[[torch.Tensor], torch.Tensor]
"""From hidden states of shape (C, H) to logits of shape (C, V)."""


@torch.no_grad()
def student_signals(
    hidden_NH: torch.Tensor, head: LmHead, targets_N: torch.Tensor, lengths_R: npt.NDArray[np.int64]
) -> Signals:
    """Return `ce_loss` and `student_confidence` of each row.

    Args:
        hidden_NH: The student's final hidden states at the positions that predict `targets_N`.
        head: The student's LM head.
        targets_N: The response's token ids, row after row, the end-of-sequence token included.
        lengths_R: Response tokens of each row, at least 1; they sum to N.

    Returns:
        Signal name -> means, each of shape (R,), in nats (`student_confidence`: a probability).
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
    """Return `teacher_ce_loss` and `teacher_entropy` of each row, and `teacher_student_kl` where the student is given.

    Args:
        hidden_NH: The teacher's final hidden states at the positions that predict `targets_N`.
        head: The teacher's LM head.
        targets_N: As in `student_signals`.
        lengths_R: As in `student_signals`.
        student: The student's hidden states at the same positions, of its own width, and its LM head.
        extra: Signals of plug-ins, which need the student.
        watch: Called with the teacher's logits of each chunk, float32, in the order of the tokens.

    Returns:
        Signal name -> means, each of shape (R,), in nats.
    """
    assert student is not None or not extra, "a plug-in's signal compares the two models"
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
    """Return `teacher_student_kl` of each row, and the signals of plug-ins: what changes as the student learns.

    Args:
        teacher: Its hidden states at the positions that predict `targets_N`, and its LM head.
        student: The same of the student.
        targets_N: As in `student_signals`.
        lengths_R: As in `student_signals`.
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

    Vocabularies padded to different sizes are cut to the shared part. Where the teacher's probability is 0 the term
    is 0, whatever the student says.

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
    vocab_size = head(hidden_NH[:1]).shape[-1]
    size = max(1, budget_mib * 2**20 // (4 * vocab_size))
    for start in range(0, num_tokens, size):
        yield slice(start, start + size)


def _nll(log_probs_CV: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
    return -log_probs_CV.gather(-1, targets_C[:, None]).squeeze(-1)


def _row_means(values: list[torch.Tensor], lengths_R: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Means over each row's tokens; on the CPU, where the order of summation is fixed."""
    assert (lengths_R > 0).all(), "a row has no response tokens"
    lengths = torch.from_numpy(np.asarray(lengths_R, dtype=np.int64))
    rows_N = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    sums_R = torch.zeros(len(lengths), dtype=torch.float64)
    if values:
        sums_R.index_add_(0, rows_N, torch.cat(values).double().cpu())
    return (sums_R / lengths).numpy()
