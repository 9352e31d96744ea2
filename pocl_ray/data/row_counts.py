"""Counts of tokens that rows lose when they are cut to length, of rows with special tokens, and of rows left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from pocl_ray.records import RowsSummary

WARNED_SHARE = 0.05  # of cut rows in all, and of rows that are left out


@dataclass
class RowCounts:
    """Counts of one pass of a tokenizer over rows.

    Attributes:
        num_cut_prompts: Rows whose prompt lost tokens, or turns, or a part of its document.
        num_cut_responses: Rows whose response lost its end.
        num_lost_tokens: Tokens that both lost.
        num_special: Rows in whose data special tokens are written, which were read as text.
    """

    num_cut_prompts: int = 0
    num_cut_responses: int = 0
    num_lost_tokens: int = 0
    num_special: int = 0

    def add(self, *parts: Sequence[Sequence[int]]) -> None:
        """Count a batch: its prompts before and after they were cut, and its responses likewise."""
        bare_prompts, prompts, whole, responses = parts
        for before, after in zip(bare_prompts, prompts, strict=True):
            self.num_cut_prompts += len(before) > len(after)
            self.num_lost_tokens += max(0, len(before) - len(after))
        for before, after in zip(whole, responses, strict=True):
            self.num_cut_responses += len(before) > len(after)
            self.num_lost_tokens += len(before) - len(after)


COUNTS = tuple(one.name for one in fields(RowCounts))


def told_cuts(sets: Iterable[RowsSummary]) -> list[tuple[bool, str]]:
    """Return a line about each set that lost tokens or has special tokens in its text, and whether it is a warning."""
    told = []
    for rows in sets:
        num_read = max(1, rows.num_rows)
        if rows.num_lost_tokens:
            worst = max(rows.num_cut_prompts, rows.num_cut_responses) / num_read
            line = (
                f"{rows.name}: {rows.num_cut_prompts:,} prompts ({rows.num_cut_prompts / num_read:.1%}) and "
                f"{rows.num_cut_responses:,} responses ({rows.num_cut_responses / num_read:.1%}) were cut to fit, "
                f"{rows.num_lost_tokens:,} tokens lost; data.max_prompt_tokens and data.max_tokens set the lengths"
            )
            told.append((worst >= WARNED_SHARE, line))
        if rows.num_special:
            line = (
                f"{rows.name}: {rows.num_special:,} rows have special tokens written in their text, which are read as "
                "text; data.special_tokens: keep reads them as the tokens"
            )
            told.append((False, line))
    return told


def told_rejects(sets: Iterable[RowsSummary]) -> list[tuple[bool, str]]:
    """Return a line about each set of which rows were left out, and whether it is a warning."""
    told = []
    for rows in sets:
        if rows.num_rejected:
            share = rows.num_rejected / (rows.num_rejected + rows.num_rows)
            line = f"{rows.name}: {rows.num_rejected:,} rows were left out; rejects.jsonl gives the reasons"
            told.append((share >= WARNED_SHARE, line))
    return told
