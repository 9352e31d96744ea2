from __future__ import annotations

import numpy as np
import pytest
import torch

from pocl_ray.difficulty import signals
from pocl_ray.difficulty.signals import forward_kl, student_signals, teacher_signals

LENGTHS = np.array([3, 1, 5])


class Case:
    """Random hidden states and heads of a student and of a wider teacher with padded vocabulary."""

    def __init__(self, vocab: int = 11, teacher_vocab: int = 13) -> None:
        generator = torch.Generator().manual_seed(0)
        num_tokens = int(LENGTHS.sum())
        self.targets_N = torch.randint(vocab, (num_tokens,), generator=generator)
        self.student_hidden_NH = torch.randn(num_tokens, 4, generator=generator)
        self.teacher_hidden_NH = torch.randn(num_tokens, 6, generator=generator)
        self.student_weight_VH = torch.randn(vocab, 4, generator=generator)
        self.teacher_weight_VH = torch.randn(teacher_vocab, 6, generator=generator)

    def student_head(self, hidden_CH: torch.Tensor) -> torch.Tensor:
        return hidden_CH @ self.student_weight_VH.T

    def teacher_head(self, hidden_CH: torch.Tensor) -> torch.Tensor:
        return hidden_CH @ self.teacher_weight_VH.T

    def all(self) -> dict[str, np.ndarray]:
        student = (self.student_hidden_NH, self.student_head)
        return {
            **student_signals(*student, self.targets_N, LENGTHS),
            **teacher_signals(self.teacher_hidden_NH, self.teacher_head, self.targets_N, LENGTHS, student),
        }


def softmax(logits: np.ndarray) -> np.ndarray:
    exp = np.exp(logits - logits.max())
    return exp / exp.sum()


def test_signals_are_the_row_means_of_their_definitions() -> None:
    case = Case()
    q_logits = case.student_head(case.student_hidden_NH).double().numpy()
    p_logits = case.teacher_head(case.teacher_hidden_NH).double().numpy()
    values: dict[str, list[float]] = {}
    for p_row, q_row, target in zip(p_logits, q_logits, case.targets_N.tolist(), strict=True):
        p, q, p_cut = softmax(p_row), softmax(q_row), softmax(p_row[:11])
        token = {
            "ce_loss": -np.log(q[target]),
            "student_confidence": q.max(),
            "teacher_ce_loss": -np.log(p[target]),
            "teacher_entropy": -(p * np.log(p)).sum(),
            "teacher_student_kl": (p_cut * np.log(p_cut / q)).sum(),
        }
        for name, value in token.items():
            values.setdefault(name, []).append(float(value))
    found = case.all()
    assert found.keys() == values.keys()
    for name, per_token in values.items():
        expected = [part.mean() for part in np.split(np.array(per_token), np.cumsum(LENGTHS)[:-1])]
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, err_msg=name)


def test_signals_do_not_depend_on_the_size_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Case().all()
    monkeypatch.setattr(signals, "CHUNK_MIB", 0)  # one token a chunk
    for name, values in Case().all().items():
        np.testing.assert_allclose(values, whole[name], rtol=1e-6, err_msg=name)


def test_no_more_logits_than_the_budget_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "CHUNK_MIB", 1)
    vocab, seen = 65_536, []

    def head(hidden_CH: torch.Tensor) -> torch.Tensor:
        seen.append(hidden_CH.shape[0])
        return torch.zeros(1, vocab).expand(hidden_CH.shape[0], vocab)

    targets_N = torch.zeros(9, dtype=torch.int64)
    found = student_signals(torch.zeros(9, 2), head, targets_N, LENGTHS)
    assert max(seen) * vocab * 4 <= 2**20
    np.testing.assert_allclose(found["ce_loss"], np.log(vocab), rtol=1e-6)


def test_teacher_alone_gives_no_divergence() -> None:
    case = Case()
    found = teacher_signals(case.teacher_hidden_NH, case.teacher_head, case.targets_N, LENGTHS)
    assert set(found) == {"teacher_ce_loss", "teacher_entropy"}


def test_kl_of_equal_logits_is_zero_and_tokens_without_teacher_probability_do_not_count() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf], [2.0, -1.0, 0.5]])
    assert forward_kl(logits, logits).tolist() == [0.0, 0.0]
    without = forward_kl(torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([[0.0, 0.0, 0.0]]))
    assert without.item() == pytest.approx(np.log(1.5), abs=1e-6)
