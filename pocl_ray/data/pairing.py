"""Which response tokens of two tokenizers belong together: of each response the k-th with the k-th.

The longer one's rest has no counterpart (arXiv 2402.12030 cuts it). Only lengths count, so pairs are found for a whole
batch at once.

Axes: R rows, N response tokens of the student in one flat axis, M those of the teacher, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pocl_ray.data.row_store import RowStore

IntArray = npt.NDArray[np.integer]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Pairs:
    """The tokens of a batch that have a counterpart; the p-th of one model belongs to the p-th of the other.

    Attributes:
        student_N: Which of the student's tokens.
        teacher_M: Which of the teacher's tokens; equally many.
    """

    student_N: BoolArray
    teacher_M: BoolArray

    @classmethod
    def of(cls, student_lengths_R: IntArray, teacher_lengths_R: IntArray) -> Pairs:
        """Pair the tokens of responses of these lengths, at least 1, row after row."""
        shared_R = np.minimum(student_lengths_R, teacher_lengths_R)
        return cls(_first_of_each(student_lengths_R, shared_R), _first_of_each(teacher_lengths_R, shared_R))


def pairing_figures(student: RowStore, teacher: RowStore, max_prompt_tokens: int, max_tokens: int) -> dict[str, int]:
    """Return what becomes of a set in two tokenizers.

    Args:
        student: Its rows in the student's tokens.
        teacher: And in the teacher's.
        max_prompt_tokens: `data.max_prompt_tokens`.
        max_tokens: `data.max_tokens`.

    Returns:
        `num_unpaired_tokens`, the student's response tokens without a counterpart, of `num_response_tokens`; and of the
        teacher's rows `num_full_prompts` and `num_full_rows`, which reach the limits at which they are cut.
    """
    ours, theirs = student.response_lengths, teacher.response_lengths
    return {
        "num_response_tokens": int(ours.sum(dtype=np.int64)),
        "num_unpaired_tokens": int(np.maximum(ours - theirs, 0).sum(dtype=np.int64)),
        "num_full_prompts": int((teacher.prompt_lengths >= max_prompt_tokens).sum()),
        "num_full_rows": int((teacher.prompt_lengths + theirs >= max_tokens).sum()),
    }


def told_pairing(figures: dict[str, int]) -> str:
    """Return one line on what `pairing_figures` found, with the limits that are worth raising."""
    share = figures["num_unpaired_tokens"] / max(1, figures["num_response_tokens"])
    line = f"{share:.1%} of the student's response tokens have no counterpart in the teacher's"
    if figures["num_full_prompts"]:
        line += f"; {figures['num_full_prompts']} of its prompts fill data.max_prompt_tokens, where prompts are cut"
    if figures["num_full_rows"]:
        line += f"; {figures['num_full_rows']} of its rows fill data.max_tokens, where responses are cut"
    return line


def _first_of_each(lengths_R: IntArray, counts_R: IntArray) -> BoolArray:
    """Mark the first `counts_R` tokens of each row, shape (sum of lengths,)."""
    lengths_R = lengths_R.astype(np.int64)
    starts_R = np.cumsum(lengths_R) - lengths_R
    place_N = np.arange(int(lengths_R.sum())) - np.repeat(starts_R, lengths_R)
    return place_N < np.repeat(counts_R, lengths_R)
