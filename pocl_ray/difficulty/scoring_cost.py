"""The work of a scoring before it is done: what each model reads and writes, its FLOPs, and its time if it is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pocl_ray.config import Config
from pocl_ray.difficulty.measured import Passes
from pocl_ray.models.shapes import ModelSize, size_on_this_machine, sizes_of
from pocl_ray.records import RowsSummary

FLOPS = "num_flops"
"""The FLOPs of a scoring, counted before it, among the manifest's counts; with its seconds they give its rate."""

ANSWERED = "num_unstopped_answers"  # a count of scorings with answers alone


@dataclass(frozen=True)
class ScoringFlops:
    """The FLOPs of a scoring: `answers` and `student` of the student, `teacher` of all teachers.

    `answers` is the most that they can be, since answers may end early.
    """

    answers: float
    student: float
    teacher: float

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return self.answers + self.student + self.teacher


def scoring_flops(
    config: Config, passes: Passes, sets: Mapping[str, RowsSummary], fills_cache: bool
) -> ScoringFlops | None:
    """Return the FLOPs of a scoring; None if the rows are not prepared or a model that is asked is not known.

    Args:
        config: Config of the run.
        passes: Passes of its scoring.
        sets: Prepared sets by name; without `train` nothing is known.
        fills_cache: Whether the teacher's outputs are cached. It then reads the dev rows too, and further teachers read
            both for caches of their own.

    Raises:
        ModelError: A config.json on this machine is no config of a model.
    """
    train = sets.get("train")
    sizes = sizes_of(config.teacher, config.student, config.tokenizer.train_vocab_size)
    student, teacher = sizes["student"], sizes["teacher"]
    asks_student = passes.answers or passes.student
    others = [size_on_this_machine("teacher", other) for other in config.other_teachers] if fills_cache else []
    if train is None or (asks_student and student is None) or (passes.teacher and teacher is None) or None in others:
        return None
    answers = reads = teaches = 0.0
    if student is not None and passes.answers:
        answers = _answers(config, student, train)
    if student is not None and passes.student:
        reads = _read(student, train) + (student.head(train.num_response_tokens) if passes.compares else 0.0)
    read = [train, *([sets["dev"]] if fills_cache and "dev" in sets else [])]
    for model in ([teacher] if passes.teacher else []) + others:
        teaches += sum(_read(model, rows) for rows in read) if model is not None else 0.0
    return ScoringFlops(answers, reads, teaches)


def _read(model: ModelSize, rows: RowsSummary) -> float:
    num_tokens = rows.num_prompt_tokens + rows.num_response_tokens
    return model.forward(num_tokens, rows.num_response_tokens, num_tokens / max(1, rows.num_rows))


def _answers(config: Config, model: ModelSize, rows: RowsSummary) -> float:
    num_new = rows.num_rows * longest_answer(config, rows.num_prompt_tokens / max(1, rows.num_rows))
    num_tokens = rows.num_prompt_tokens + num_new
    return model.forward(num_tokens, num_new, num_tokens / max(1, rows.num_rows))


def longest_answer(config: Config, prompt_tokens: float = 0.0) -> float:
    """Return the most tokens of an answer to a prompt of this length."""
    room = config.data.max_tokens - prompt_tokens
    most = config.difficulty.generation.max_new_tokens
    return room if most is None else min(room, most)


def scoring_lines(
    config: Config,
    passes: Passes,
    num_rows: int,
    sets: Mapping[str, RowsSummary],
    fills_cache: bool,
    earlier: Mapping[str, Any] | None,
) -> list[str]:
    """Return what a scoring will compute, in lines.

    Args:
        config: Config of the run.
        passes: Passes of its scoring.
        num_rows: Training rows.
        sets: Prepared sets by name; empty before they are prepared.
        fills_cache: Whether the teacher's outputs are cached.
        earlier: Entry of a finished scoring in the manifest of the run directory; None if there is none.
    """
    work = _work(config, passes, num_rows, fills_cache)
    if not work:
        return ["scoring: asks no model, since all signals are lengths or columns of the rows"]
    lines = [f"scoring: {'; '.join(work)}"]
    flops = scoring_flops(config, passes, sets, fills_cache)
    if flops is None:
        missing = "a model's config can be read and is of a known family" if sets else "the rows are prepared"
        return [*lines, f"its FLOPs are known once {missing}"]
    teachers = "the teachers" if fills_cache and config.other_teachers else "the teacher"
    parts = {"answers at most": flops.answers, "the student": flops.student, teachers: flops.teacher}
    shares = ", ".join(f"{name} {part:.2g}" for name, part in parts.items() if part)
    lines.append(f"it takes about {flops.total:.2g} FLOPs ({shares}); {_time(flops, passes, earlier)}")
    return lines


def _work(config: Config, passes: Passes, num_rows: int, fills_cache: bool) -> list[str]:
    work = []
    if passes.answers:
        most = int(longest_answer(config))
        work.append(f"the student answers {num_rows:,} prompts, at most {most:,} tokens each")
    if passes.student:
        work.append(f"the student reads {num_rows:,} rows")
    if passes.teacher:
        dev = ", and those of dev for its cache" if fills_cache else ""
        work.append(f"the teacher reads {num_rows:,} rows{dev}")
    if fills_cache and config.other_teachers:
        others = len(config.other_teachers)
        work.append(f"{others} further {'teachers read' if others > 1 else 'teacher reads'} the same, for a cache each")
    if passes.compares:
        work.append("both are compared token by token")
    return work


def _time(flops: ScoringFlops, passes: Passes, earlier: Mapping[str, Any] | None) -> str:
    """The time at the rate of an earlier scoring of the same kind, since answers take longer for their FLOPs."""
    counts = (earlier or {}).get("counts") or {}
    seconds, done = (earlier or {}).get("seconds") or 0.0, counts.get(FLOPS) or 0
    if not done or not seconds or (ANSWERED in counts) != passes.answers:
        return "how long that is, only a scoring of this kind in the run directory can say"
    rate = done / seconds
    return f"at the {rate:.2g} FLOPs a second of the scoring in the run directory, {flops.total / rate:,.0f} s"
