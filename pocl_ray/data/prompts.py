"""Prompt templates: they turn a request into the text that a model continues.

`alpaca` is the text of the papers (MiniLLM, DistiLLM, POCL), `chat` the tokenizer's own chat template, `plain` the
request alone. Any other text is a template of the user with `{instruction}` and `{input}`, or with `{document}` for
summaries. Braces in the data have no meaning, since a template is cut once and filled by joining. `{{` and `}}` are
braces of the template itself.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from jinja2 import TemplateError

from pocl_ray.config.sources import ColumnRole, SourceConfig, Task
from pocl_ray.data.chat_turns import assistant_turn
from pocl_ray.data.columns import (
    Columns,
    Message,
    Request,
    UnusableRowError,
    check_numbers,
    read_numbers,
    read_request,
    read_text,
    resolve_columns,
    wanted_columns,
)
from pocl_ray.data.readers import Reject, SourceRow
from pocl_ray.data.sources import read_source
from pocl_ray.errors import ConfigError, DataError

_PARAGRAPH = "\n\n"  # between parts (system message, instruction, input) for which a template has no place
_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_PLAIN = "{instruction}"
_NAMED = ("alpaca", "chat", "plain")
_PLACES = ("{instruction}", "{input}", "{document}")
_PLACEHOLDER = re.compile(r"(\{\{|\}\}|\{[A-Za-z_][A-Za-z_0-9]*\})")


Fit = Callable[[Request], Request]
"""A function that shortens a request, so that its prompt is not too long."""


@dataclass(frozen=True)
class Example:
    """A row after its columns are read and its prompt is made.

    Attributes:
        prompt: Text that the model continues, from the template; empty for plain text.
        references: Accepted answers; training uses the first, evaluation uses all.
        topic: Family of the task, if the source names it.
        source_row: Number of the row in its source, from 1.
        numbers: Values of the row's columns that are difficulty signals.
        response: Response as the chat template writes it, without the token that ends it; None: the first reference.
    """

    prompt: str
    references: tuple[str, ...]
    topic: str | None
    source_row: int
    numbers: tuple[float, ...] = ()
    response: str | None = None


class PromptTemplate:
    """Turns a request into one text.

    Args:
        template: `alpaca`, `chat`, `plain`, or a text with `{instruction}` and, if wanted, `{input}`; for summaries
            `{document}` is another name of the input, and the instruction may be left out.
        tokenizer: Hugging Face tokenizer, whose chat template `chat` uses.
        template_args: Further arguments of the chat template.

    Raises:
        ConfigError: A placeholder or the name is unknown, or the tokenizer has no chat template that can be used.
    """

    def __init__(self, template: str, tokenizer: Any, template_args: Mapping[str, Any] | None = None) -> None:
        self.is_chat = template == "chat"
        self._tokenizer = tokenizer
        if self.is_chat:
            if not getattr(tokenizer, "chat_template", None):
                raise ConfigError("data.prompt_template: chat, but the tokenizer has no chat template; use alpaca")
            self._args = dict(template_args or {})
            self._turn = assistant_turn(tokenizer, self._args)
            return
        self._bare = _cut({"alpaca": _ALPACA, "plain": _PLAIN}.get(template, template))
        self._with_input = _cut(_ALPACA_WITH_INPUT) if template == "alpaca" else self._bare

    def render(self, request: Request) -> str:
        """Return the prompt's text.

        If the template has no place for them, a system message is put before the instruction and an input after it.

        Raises:
            UnusableRowError: The request is a conversation of several turns, but the template is not `chat`; or the
                chat template refuses it.
        """
        if self.is_chat:
            return self._render_chat(request)
        if request.history:
            raise UnusableRowError("a conversation of several turns needs data.prompt_template: chat")
        parts = self._with_input if request.input else self._bare
        has_place = "{input}" in parts or "{document}" in parts
        says_what = "{instruction}" in parts  # a template for documents may contain its own instruction
        system = request.system if says_what else ""
        texts = (system, request.instruction, "" if has_place else request.input)
        fields = dict.fromkeys(("{input}", "{document}"), request.input)
        fields["{instruction}"] = _PARAGRAPH.join(filter(None, texts))
        # Odd places are placeholders. Even places are the template's own text, which may look like a placeholder.
        filled = "".join(fields.get(part, part[0]) if place % 2 else part for place, part in enumerate(parts))
        return filled if says_what else _PARAGRAPH.join(filter(None, (request.system, filled)))

    def render_response(self, request: Request, prompt: str) -> str | None:
        """Return the response as the chat template writes it, up to the token that ends it; None without a chat.

        Raises:
            UnusableRowError: The chat template refuses the response, or does not continue the prompt with it.
        """
        if not self.is_chat:
            return None
        answer = {"role": "assistant", "content": request.references[0]}
        whole = self._apply([*_messages(request), answer], add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise UnusableRowError("the tokenizer's chat template does not continue the prompt with the response")
        response, end = whole[len(prompt) :], self._turn.end
        return response.removesuffix(self._turn.closing) if end is None else response[: response.rfind(end)]

    def _render_chat(self, request: Request) -> str:
        return self._apply(_messages(request), add_generation_prompt=True)

    def _apply(self, messages: list[Message], add_generation_prompt: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **self._args
            )
        except TemplateError as error:
            raise UnusableRowError(f"the tokenizer's chat template refuses it ({error})") from None


def _messages(request: Request) -> list[Message]:
    """The turns of a request, as a chat template reads them."""
    system = [{"role": "system", "content": request.system}] if request.system else []
    content = _PARAGRAPH.join(filter(None, (request.instruction, request.input)))
    return [*system, *request.history, {"role": "user", "content": content}]


def read_example(
    row: SourceRow,
    columns: Columns,
    template: PromptTemplate,
    numbers: Sequence[str] = (),
    fit: Fit | None = None,
    mark: Fit | None = None,
) -> Example:
    """Return the example of one row; its prompt comes from the template, unless the row is plain text.

    Args:
        row: As the source has it.
        columns: Columns of the roles.
        template: Makes the prompt.
        numbers: Columns that are carried along.
        fit: Shortens requests that are too long.
        mark: Marks the special tokens of the data, before the template writes its own.

    Raises:
        UnusableRowError: The row cannot be used; the message says why.
    """
    if "text" in columns:
        text, topic = read_text(row.values, columns)
        return Example("", (text,), topic, row.row, read_numbers(row.values, numbers))
    request = read_request(row.values, columns)
    if fit is not None:
        request = fit(request)
    marked = request if mark is None else mark(request)
    prompt = template.render(marked)
    return Example(
        prompt,
        request.references,
        request.topic,
        row.row,
        read_numbers(row.values, numbers),
        template.render_response(marked, prompt),
    )


def _cut(template: str) -> list[str]:
    """The parts of a template: its own text (even places), and placeholders or doubled braces (odd places)."""
    parts = _PLACEHOLDER.split(template)
    names = [part for part in parts[1::2] if part not in ("{{", "}}")]
    unknown = sorted(set(names) - set(_PLACES))
    if unknown:
        raise ConfigError(
            f"data.prompt_template: unknown placeholder {', '.join(unknown)}; there are {{instruction}} and {{input}}, "
            "for summaries {document} (write {{ and }} for braces)"
        )
    if "{instruction}" not in names and "{document}" not in names:
        near = difflib.get_close_matches(template, _NAMED, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"give {', '.join(_NAMED)}, or a text with {{instruction}}"
        raise ConfigError(f"data.prompt_template: {template!r} holds no {{instruction}}; {hint}")
    return parts


CHUNK_ROWS = 2048


def read_examples(
    source: SourceConfig, template: PromptTemplate, default_split: str, task: Task = "instruction"
) -> Iterator[Example | Reject]:
    """Yield the rows of a source as examples.

    Args:
        source: Place of the rows, and the meaning of their columns.
        template: Template of the prompts.
        default_split: Split of the shipped samples, if the source names none.
        task: Kind of rows.

    Yields:
        An `Example` for each usable row and a `Reject` for each other row, in order.

    Raises:
        DataError: The source is missing or empty, or lacks a column.
    """
    stream = read_source(source, default_split, wanted_columns(source.columns, task))
    reader = ExampleReader(source.columns, template, task=task)
    while chunk := list(islice(stream, CHUNK_ROWS)):
        yield from reader.read(chunk)


class ExampleReader:
    """Turns chunks of a source into examples; the first chunk with columns decides their roles.

    Args:
        mapping: Role to column, as far as the user gave it.
        template: Makes the prompts.
        numbers: Numeric columns that are carried along.
        task: Kind of rows, which decides the columns to look for.
        fit: Shortens a request whose prompt would be too long; None: requests stay as they are.
        mark: Marks the special tokens of the data; None: they are the tokens themselves.
    """

    def __init__(
        self,
        mapping: Columns,
        template: PromptTemplate,
        numbers: Sequence[str] = (),
        task: Task = "instruction",
        fit: Fit | None = None,
        mark: Fit | None = None,
    ) -> None:
        self._mark = mark
        self._task: Task = task
        self._fit = fit
        self._mapping = mapping
        self._numbers = numbers
        self._template = template
        self._columns: dict[ColumnRole, str] | None = None

    def read(self, chunk: Sequence[SourceRow | Reject]) -> list[Example | Reject]:
        """Return an example or a reject for each row of the chunk.

        Raises:
            DataError: Needed columns are missing.
        """
        if self._columns is None:
            found = {column for item in chunk if isinstance(item, SourceRow) for column in item.columns}
            if not found:  # only unreadable rows so far
                return [_reject(item, "has no columns") for item in chunk]
            try:
                self._columns = resolve_columns(found, self._mapping, self._task)
                check_numbers(found, self._numbers)
            except DataError as error:
                raise DataError(
                    f"{next(item.source for item in chunk if isinstance(item, SourceRow))}: {error}"
                ) from None
        columns = self._columns
        return [item if isinstance(item, Reject) else self._read_row(item, columns) for item in chunk]

    def _read_row(self, row: SourceRow, columns: Columns) -> Example | Reject:
        try:
            return read_example(row, columns, self._template, self._numbers, self._fit, self._mark)
        except UnusableRowError as unusable:
            return _reject(row, str(unusable))


def _reject(row: SourceRow | Reject, reason: str) -> Reject:
    return row if isinstance(row, Reject) else Reject(row.source, row.row, reason)
