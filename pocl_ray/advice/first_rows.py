"""A look at the first rows of a source: what its columns mean, and how many tokens its rows have."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from pocl_ray.config import DataConfig, SourceConfig
from pocl_ray.config.sources import ColumnRole, Task
from pocl_ray.data.columns import UnusableRowError, read_request, read_text, resolve_columns, separator_hint
from pocl_ray.data.readers import Reject, SourceRow
from pocl_ray.data.rows import Preparation
from pocl_ray.data.sources import count_rows, default_split, read_source
from pocl_ray.errors import DataError
from pocl_ray.records import PROMPT, PROMPT_IDS, REFERENCES, RESPONSE_IDS

NUM_LOOKED = 512
"""The rows that are looked at: enough for the 99th percentile of their lengths, and few enough to tokenize at once."""

UNCUT_TOKENS = 5_000_000
"""A limit that no row reaches, so that lengths are those of whole rows."""

CHARS_PER_TOKEN = 3.5
"""The assumption for a tokenizer that is not at hand; English text has about 4, code and other languages fewer."""

TASKS: tuple[Task, ...] = ("instruction", "summarization", "text")

# Names that no known layout has, but that leave little doubt. What is found by them is written to the config.
_SYNONYMS: tuple[tuple[Task, dict[ColumnRole, tuple[str, ...]]], ...] = (
    ("instruction", {"messages": ("conversation", "chat", "dialog", "turns")}),
    (
        "instruction",
        {
            "prompt": ("prompt", "query", "question", "request", "instruction", "input", "source", "user"),
            "output": ("output", "response", "completion", "answer", "reply", "target", "assistant", "chosen"),
        },
    ),
    (
        "summarization",
        {
            "document": ("document", "article", "dialogue", "text", "body", "content"),
            "summary": ("summary", "highlights", "abstract", "tldr", "headline"),
        },
    ),
    ("text", {"text": ("content", "body", "document")}),
)


@dataclass(frozen=True)
class Meaning:
    """The meaning of a source's columns.

    Attributes:
        task: Kind of rows.
        mapping: Role to column, for the config; empty if the columns have names that a run knows.
        roles: Role to column, of all columns that are read.
        found: All columns of the source.
    """

    task: Task
    mapping: dict[ColumnRole, str]
    roles: dict[ColumnRole, str]
    found: tuple[str, ...]


@dataclass(frozen=True)
class Lengths:
    """The lengths of the first rows, in tokens.

    Attributes:
        prompts: Tokens of each prompt.
        responses: Tokens of each response, with the one that ends it.
        num_rejected: Number of rows that cannot be used.
        reason: Why the first of them cannot be used; empty if all can.
        example: Prompt and response of the first usable row.
        is_counted: Whether a tokenizer counted, and not the assumption of `CHARS_PER_TOKEN`.
    """

    prompts: np.ndarray
    responses: np.ndarray
    num_rejected: int
    reason: str
    example: tuple[str, str]
    is_counted: bool

    def quantile(self, share: float) -> tuple[int, int, int]:
        """Return the length of prompts, of responses and of whole rows that so many rows do not exceed."""
        kinds = (self.prompts, self.responses, self.prompts + self.responses)
        prompt, response, whole = (int(np.quantile(kind, share, method="higher")) for kind in kinds)
        return prompt, response, whole


def read_first(source: SourceConfig, name: str) -> list[SourceRow | Reject]:
    """Return the first rows of a source.

    Args:
        source: Place of the rows.
        name: `train` or `dev`, which chooses the split of the shipped samples.

    Raises:
        DataError: The source is missing or empty, or none of its first rows can be read.
    """
    rows = list(islice(read_source(source, default_split(name)), NUM_LOOKED))
    if not any(isinstance(row, SourceRow) for row in rows):
        first = next(row for row in rows if isinstance(row, Reject))
        raise DataError(
            f"{source.path}: none of its first {len(rows)} rows can be read (row {first.row}: {first.reason})"
        )
    return rows


def recognise(place: str, rows: Sequence[SourceRow | Reject], given: Mapping[ColumnRole, str]) -> Meaning:
    """Return the meaning of the columns of some rows.

    Args:
        place: Source of the rows, for the message.
        rows: First rows.
        given: Role to column, as far as the user said.

    Raises:
        DataError: A column that was given is missing, or the columns cannot be recognised; the message names those
            that were found and says how to map them.
    """
    found = tuple(dict.fromkeys(column for row in rows if isinstance(row, SourceRow) for column in row.columns))
    if given:
        task: Task = (
            "summarization" if {"document", "summary"} & {*given} else "text" if "text" in given else "instruction"
        )
        try:
            return Meaning(task, dict(given), resolve_columns(found, given, task), found)
        except DataError as error:
            raise DataError(f"{place}: {error}") from None
    for task in TASKS:
        with suppress(DataError):
            return Meaning(task, {}, resolve_columns(found, {}, task), found)
    by_lower_case = {name.lower(): name for name in reversed(found)}
    for task, mapping in _guesses(by_lower_case):
        with suppress(DataError):
            return Meaning(task, mapping, resolve_columns(found, mapping, task), found)
    raise DataError(
        f"{place}: cannot tell what its columns mean; found: {', '.join(found) or 'none'}; say which is which with "
        "--columns prompt=NAME,output=NAME (or instruction=,input=,output= or messages=NAME for chats, "
        f"document=,summary= for summaries, text=NAME for plain text){separator_hint(found)}"
    )


def _guesses(names: Mapping[str, str]) -> list[tuple[Task, dict[ColumnRole, str]]]:
    """The mappings that are worth a try: known layouts in other letters, then synonyms."""
    guesses: list[tuple[Task, dict[ColumnRole, str]]] = []
    for task in TASKS:
        with suppress(DataError):
            roles = resolve_columns(names, {}, task)
            guesses.append((task, {role: names[column] for role, column in roles.items() if column in names}))
    for task, synonyms in _SYNONYMS:
        mapping: dict[ColumnRole, str] = {}
        for role, candidates in synonyms.items():
            column = next((names[name] for name in candidates if name in names), None)
            if column is not None and column not in mapping.values():
                mapping[role] = column
        if len(mapping) == len(synonyms):
            guesses.append((task, mapping))
    return guesses


def count_all(data: DataConfig) -> int:
    """Return the number of training rows without those that are held out; this reads the whole source."""
    return count_rows(data)


def has_turns(rows: Sequence[SourceRow | Reject], meaning: Meaning) -> bool:
    """Return whether any of the rows is a conversation of several turns, which only a chat template can write."""
    if "messages" not in meaning.roles:
        return False
    for row in rows:
        with suppress(UnusableRowError):
            if isinstance(row, SourceRow) and read_request(row.values, meaning.roles).history:
                return True
    return False


def measure(rows: Sequence[SourceRow | Reject], data: DataConfig, tokenizer: Any) -> Lengths:
    """Return the lengths of some rows, as a run would read them if it cut nothing.

    Args:
        rows: First rows of the training set.
        data: Section of the config, with task and template.
        tokenizer: Tokenizer of the run; None if it is not at hand.

    Raises:
        DataError: None of the rows can be used.
        ConfigError: The template does not work.
    """
    lengths = _estimated(rows, data) if tokenizer is None else _counted(rows, data, tokenizer)
    if not lengths.prompts.size:
        raise DataError(f"{data.train.path}: none of its first {len(rows)} rows can be used ({lengths.reason})")
    return lengths


def _counted(rows: Sequence[SourceRow | Reject], data: DataConfig, tokenizer: Any) -> Lengths:
    uncut = data.model_copy(update={"max_prompt_tokens": UNCUT_TOKENS, "max_tokens": 2 * UNCUT_TOKENS})
    preparation = Preparation(data.train, uncut, [tokenizer], [])
    (batch,) = preparation.prepare(rows)
    prompts, responses = (
        np.array([len(ids) for ids in batch[name]], dtype=np.int64) for name in (PROMPT_IDS, RESPONSE_IDS)
    )
    first = (batch[PROMPT][0].as_py(), batch[REFERENCES][0].as_py()[0]) if batch.num_rows else ("", "")
    rejects = preparation.rejects
    return Lengths(prompts, responses, len(rejects), _first_reason(rejects), first, is_counted=True)


def _estimated(rows: Sequence[SourceRow | Reject], data: DataConfig) -> Lengths:
    roles = resolve_columns(
        {name for row in rows if isinstance(row, SourceRow) for name in row.columns}, data.train.columns, data.task
    )
    texts: list[tuple[str, str]] = []
    rejects: list[Reject] = []
    for row in rows:
        try:
            if isinstance(row, Reject):
                rejects.append(row)
            elif data.task == "text":
                texts.append(("", read_text(row.values, roles)[0]))
            else:
                request = read_request(row.values, roles)
                turns = [turn["content"] for turn in request.history]
                prompt = "\n".join([request.system, *turns, request.instruction, request.input])
                texts.append((prompt, request.references[0]))
        except UnusableRowError as error:
            rejects.append(Reject(row.source, row.row, str(error)))
    counts = [np.array([len(pair[side]) / CHARS_PER_TOKEN for pair in texts]).astype(np.int64) for side in (0, 1)]
    template_tokens = 0 if data.task == "text" else 40  # what the papers' text and most chat templates add
    first = texts[0] if texts else ("", "")
    return Lengths(
        counts[0] + template_tokens, counts[1] + 1, len(rejects), _first_reason(rejects), first, is_counted=False
    )


def _first_reason(rejects: Collection[Reject]) -> str:
    first = next(iter(rejects), None)
    return "" if first is None else f"row {first.row}: {first.reason}"
