"""What a task family is: a small function that invents one question and its answer.

A family is registered with its grade, 1 for what can be read off the page to 4 for what must be worked out.
Everything that makes one question differ from another stands in `input` (and so in the answer); the instruction
is only one of a few ways to say the same task. Rows are told apart by input and answer, so that the question
"2, 7" of the training split cannot come back in the test split in other words.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One question. `answers` holds every accepted wording, the one to train on first."""

    instruction: str
    input: str
    answers: tuple[str, ...]

    @property
    def question(self) -> tuple[str, tuple[str, ...]]:
        """What makes this row distinct within its family, however the task is phrased."""
        return self.input, self.answers


@dataclass(frozen=True)
class Family:
    """A kind of task: its name, its grade of difficulty (1 easy to 4 hard) and the function that invents rows."""

    name: str
    grade: int
    invent: Callable[[random.Random], Row]


FAMILIES: dict[str, Family] = {}


def family(grade: int) -> Callable[[Callable[[random.Random], Row]], Callable[[random.Random], Row]]:
    """Register the decorated function as a family under its own name.

    Args:
        grade: difficulty as a person would see it, 1 (copying) to 4 (several steps of thought).
    """

    def register(invent: Callable[[random.Random], Row]) -> Callable[[random.Random], Row]:
        name = invent.__name__
        assert name not in FAMILIES, f"two families are called {name}"
        assert 1 <= grade <= 4, f"{name}: grade {grade}"
        FAMILIES[name] = Family(name, grade, invent)
        return invent

    return register


def row(instruction: str, text: str, *answers: str) -> Row:
    """Put a row together; the first answer is the one to train on."""
    return Row(instruction, text, answers)
