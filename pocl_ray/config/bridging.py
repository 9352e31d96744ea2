"""What a config may ask for when teacher and student have different tokenizers (`teacher.cross_tokenizer: uld`).

Then tokens of the two are paired by their places and probabilities by their order alone. What compares token by token,
or hands one model's tokens to the other, cannot be had, and is refused while the config is read. Each function returns
what is wrong, with the remedy, or None.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pocl_ray.config.rollout import RolloutConfig
from pocl_ray.config.sources import StudentConfig, TeacherConfig, TokenizerConfig
from pocl_ray.config.training import CurriculumConfig, DistillConfig

ULD = "uld"
KEY = "teacher.cross_tokenizer"


def with_bridging_loss(data: dict[str, Any]) -> dict[str, Any]:
    """Return the config's tree with `distill.loss: uld` where two tokenizers are bridged and no loss is named."""
    teacher, distill = data.get("teacher"), data.get("distill", {})
    if isinstance(teacher, (list, tuple)) and teacher:
        teacher = teacher[0]
    if not isinstance(teacher, dict) or teacher.get("cross_tokenizer") != ULD or not isinstance(distill, dict):
        return data
    return {**data, "distill": {"loss": ULD, **distill}}


def uld_problem(
    distill: DistillConfig, rollout: RolloutConfig, curriculum: CurriculumConfig, control_kd_ratio: float | None
) -> str | None:
    """Say where the loss `uld` would stand alone.

    It is the same for every renaming of the tokens: which of them is right only the cross-entropy says.
    """
    on_rollouts = rollout.is_on and (rollout.loss or distill.loss) == ULD
    ratios = {
        "curriculum.kd_ratio": curriculum.kd_ratio.bounds()[1] if distill.loss == ULD else None,
        "control.kd_ratio": control_kd_ratio if distill.loss == ULD else None,
        "rollout.kd_ratio": rollout.kd_ratio if on_rollouts else None,
    }
    for key, ratio in ratios.items():
        if ratio is not None and ratio >= 1:
            remedy = "set it lower, such as 0.6, the paper's weight"
            return f"{key} reaches 1, and loss uld alone does not say which token is right; {remedy}"
    return None


def model_problem(
    teacher: TeacherConfig, others: Sequence[TeacherConfig], student: StudentConfig, tokenizer: TokenizerConfig
) -> str | None:
    """Say which models cannot be bridged: those that have one tokenizer by their making, or none."""
    if any(other.cross_tokenizer is not None for other in others) or (teacher.cross_tokenizer and others):
        return f"{KEY} {ULD} bridges a teacher that is alone; remove it, or the other teachers"
    if teacher.cross_tokenizer is None:
        return None
    if teacher.path is None:
        return f"{KEY} {ULD}: a teacher made from an architecture has no tokenizer of its own; give teacher.path"
    if student.num_layers is not None:
        return (
            f"{KEY} {ULD}: a student cut from its teacher (student.num_layers) has its tokenizer; give student.path "
            f"or student.architecture, or remove {KEY}"
        )
    if student.path is None and tokenizer == TokenizerConfig():
        return (
            f"{KEY} {ULD}: a student made from an architecture brings no tokenizer; set tokenizer.path or "
            "tokenizer.train_vocab_size"
        )
    return None


def method_problem(distill: DistillConfig, rollout: RolloutConfig, task: str, signals: Iterable[str]) -> str | None:
    """Say what cannot be had over two tokenizers."""
    if distill.loss != ULD:
        return (
            f"{KEY} {ULD} takes the place of the divergence, and distill.loss {distill.loss} compares token by token; "
            "leave distill.loss out"
        )
    if distill.token_weight != "none":
        return f"{KEY} {ULD}: distill.token_weight weighs tokens that the two do not share; set it to none"
    if rollout.is_on:
        return f"{KEY} {ULD}: rollouts are the student's tokens, which the teacher cannot read; set rollout.mode to off"
    if task == "text":
        return f"{KEY} {ULD}: rows of plain text are cut by tokens, elsewhere for each model; set another data.task"
    if "teacher_student_kl" in signals:
        return (
            f"{KEY} {ULD}: teacher_student_kl has no meaning over two vocabularies; give difficulty.signals others, "
            "such as ce_loss or teacher_ce_loss, each on its model's own tokens"
        )
    return None
