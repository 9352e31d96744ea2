"""The meaning of a source's columns: from a row of the file to a request and its reference answers.

Without a mapping (`columns` of the source), these layouts are tried in this order. `system` and `topic` are always
optional:

    messages                             chat turns, {"role", "content"} or ShareGPT's {"from", "value"}
    conversations                        the same
    instruction, [input], output         Alpaca
    instruction, [context], response     Dolly; `category` is the topic
    prompt, response                     also `completion` or `output` for the response
    question, answer

An explicit mapping has priority: its columns must exist, and only layouts with its roles are tried for the other roles.

`data.task` chooses other layouts. For summaries: document and summary, article and highlights (CNN/DailyMail), dialogue
and summary (SAMSum), text and summary. For plain text: text.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pocl_ray.config.sources import ColumnRole, Task
from pocl_ray.errors import DataError

Columns = Mapping[ColumnRole, str]
Message = dict[str, str]

_EVERYWHERE: dict[ColumnRole, str] = {"system": "system", "topic": "topic"}
_LAYOUTS: dict[Task, tuple[dict[ColumnRole, str], ...]] = {
    "summarization": (
        {"document": "document", "summary": "summary"},
        {"document": "article", "summary": "highlights"},
        {"document": "dialogue", "summary": "summary"},
        {"document": "text", "summary": "summary"},
    ),
    "text": ({"text": "text"},),
}
_LAYOUTS["instruction"] = (
    {"messages": "messages"},
    {"messages": "conversations"},
    {"instruction": "instruction", "input": "input", "output": "output"},
    {"instruction": "instruction", "input": "context", "output": "response", "topic": "category"},
    {"prompt": "prompt", "output": "response"},
    {"prompt": "prompt", "output": "completion"},
    {"prompt": "prompt", "output": "output"},
    {"prompt": "question", "output": "answer"},
)
_ROLES_OF_TASK: dict[Task, tuple[str, str]] = {
    "instruction": (
        "messages alone, or instruction (input) and output, or prompt and output",
        "cannot tell which columns hold the prompt and the response; found: {found}; expected messages, "
        "instruction and output, or prompt and response, or a mapping such as `columns: {{prompt: ..., output: ...}}`",
    ),
    "summarization": (
        "document and summary",
        "cannot tell which columns hold the document and its summary; found: {found}; expected document and summary, "
        "article and highlights, or dialogue and summary, or a mapping such as "
        "`columns: {{document: ..., summary: ...}}`",
    ),
    "text": (
        "text alone",
        "cannot tell which column holds the text; found: {found}; expected text, or a mapping such as "
        "`columns: {{text: ...}}`",
    ),
}
SUMMARIZE = "Summarize the following text."
_OPTIONAL: frozenset[ColumnRole] = frozenset({"input", "system", "topic"})
_ROLES_OF_CHAT = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}


_UNLEARNT_COLUMNS = {
    **dict.fromkeys(("tools", "functions"), "chats with tools are not supported"),
    "chat_template_kwargs": "switches of the template are set for all rows, in data.template_args",
}
_UNLEARNT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "name")
"""Fields of a turn that the template would have to write. A chat would be another one without them."""


class UnusableRowError(Exception):
    """A row that cannot be trained on; the message is the reason in rejects.jsonl."""


@dataclass(frozen=True)
class Request:
    """The request of a row, before a template turns it into one text.

    Attributes:
        instruction: Task, or the last turn of the user.
        input: Text that the task is about; it may be empty.
        system: System message; it may be empty.
        history: Chat turns before the last turn of the user, as {"role", "content"}.
        references: Accepted answers; training uses the first, evaluation uses all.
        topic: Family of the task, if the source names it.
    """

    instruction: str
    input: str
    system: str
    history: tuple[Message, ...]
    references: tuple[str, ...]
    topic: str | None


def resolve_columns(found: Collection[str], mapping: Columns, task: Task = "instruction") -> dict[ColumnRole, str]:
    """Return the column of each role.

    Args:
        found: Columns of the source, or of its first rows.
        mapping: Roles that the user gave.
        task: Kind of rows.

    Returns:
        Mapping of roles to columns. Columns of optional roles may be missing, since a later row may have them.

    Raises:
        DataError: A mapped column is missing, roles cannot be combined, or no known layout fits.
    """
    for role, column in mapping.items():
        if column not in found:
            near = difflib.get_close_matches(column, found, n=1, cutoff=0.5)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise DataError(
                f"no column {column!r}, which `columns.{role}` names{hint}; found: {_names(found)}"
                f"{separator_hint(found)}"
            )
    fitting = [layout for layout in _LAYOUTS[task] if mapping.keys() <= {*layout, *_EVERYWHERE}]
    if not fitting:
        raise DataError(
            f"`columns` gives roles that do not go together ({_names(mapping)}) in data.task {task}; give "
            f"{_ROLES_OF_TASK[task][0]}"
        )
    for layout in fitting:
        columns: dict[ColumnRole, str] = {**_EVERYWHERE, **layout, **mapping}
        if all(columns[role] in found for role in layout if role not in _OPTIONAL):
            return columns
    raise DataError(_ROLES_OF_TASK[task][1].format(found=_names(found)) + separator_hint(found))


def separator_hint(found: Collection[str]) -> str:
    """Return the end of a message for a CSV file that is read as one column; empty for other columns."""
    signs = [sign for sign in (";", "\t", "|") if len(found) == 1 and sign in next(iter(found))]
    return f"; that is one column: a .csv is separated by commas, and this one by {signs[0]!r}" if signs else ""


def wanted_columns(mapping: Columns, task: Task, numbers: Sequence[str] = ()) -> Callable[[Collection[str]], set[str]]:
    """Return a function from the columns of a source to the columns to read; other columns are never decoded.

    Args:
        mapping: Roles that the user gave.
        task: Kind of rows.
        numbers: Columns that serve as difficulty signals.
    """

    def wanted(found: Collection[str]) -> set[str]:
        try:
            roles = resolve_columns(found, mapping, task)
            chosen = {*roles.values(), *(_UNLEARNT_COLUMNS if "messages" in roles else ())}
        except DataError:  # another file of the source may have what is missing here; if none has, that is the error
            layouts = [layout for layout in _LAYOUTS[task] if mapping.keys() <= {*layout, *_EVERYWHERE}]
            chosen = {column for layout in layouts for column in {**_EVERYWHERE, **layout, **mapping}.values()}
            chosen |= {*_UNLEARNT_COLUMNS} if any("messages" in layout for layout in layouts) else set()
        return {*chosen, *numbers} & {*found}

    return wanted


def read_request(values: Mapping[str, Any], columns: Columns) -> Request:
    """Return the request of one row.

    Args:
        values: Mapping of columns to values.
        columns: Columns of the roles, as `resolve_columns` returns them.

    Raises:
        UnusableRowError: A field is missing, empty, of the wrong type or not Unicode text, or the chat turns make no
            sense.
    """
    system = _optional_text(values, columns.get("system"))
    topic = _topic(values, columns.get("topic"))
    if "messages" in columns:
        return _read_chat(values, columns["messages"], system, topic)
    if "document" in columns:
        document = _text(_field(values, columns["document"]), columns["document"])
        summaries = _references(_field(values, columns["summary"]), columns["summary"])
        return Request(SUMMARIZE, document, system, (), summaries, topic)
    role: ColumnRole = "instruction" if "instruction" in columns else "prompt"
    instruction = _text(_field(values, columns[role]), columns[role])
    references = _references(_field(values, columns["output"]), columns["output"])
    return Request(instruction, _optional_text(values, columns.get("input")), system, (), references, topic)


def read_text(values: Mapping[str, Any], columns: Columns) -> tuple[str, str | None]:
    """Return the text and the topic of one row of plain text.

    Raises:
        UnusableRowError: The text is missing, empty, of the wrong type or not Unicode text.
    """
    return _text(_field(values, columns["text"]), columns["text"]), _topic(values, columns.get("topic"))


def check_numbers(found: Collection[str], columns: Sequence[str]) -> None:
    """Check that the columns that serve as signals exist.

    Raises:
        DataError: A column is missing.
    """
    for name in columns:
        if name not in found:
            near = difflib.get_close_matches(name, found, n=1, cutoff=0.5)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise DataError(f"no column {name!r}, which difficulty.signals names{hint}; found: {_names(found)}")


def read_numbers(values: Mapping[str, Any], columns: Sequence[str]) -> tuple[float, ...]:
    """Return the values of numeric columns in one row.

    Raises:
        UnusableRowError: A value is missing or is not a finite number.
    """
    return tuple(_number(_field(values, column), column) for column in columns)


def _number(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UnusableRowError(f"{place} is {type(value).__name__}, not a number")
    if not math.isfinite(value):
        raise UnusableRowError(f"{place} is {value}, not a finite number")
    return float(value)


def _names(names: Collection[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _field(values: Mapping[str, Any], column: str) -> Any:
    if values.get(column) is None:
        raise UnusableRowError(f"{column} is {'empty' if column in values else 'missing'}")
    return values[column]


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise UnusableRowError(f"{place} is {type(value).__name__}, not text")
    if not value.strip():
        raise UnusableRowError(f"{place} is empty")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise UnusableRowError(f"{place} holds half a surrogate pair, which is no Unicode text") from None
    return value


def _optional_text(values: Mapping[str, Any], column: str | None) -> str:
    value = None if column is None else values.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    return _text(value, str(column))


def _topic(values: Mapping[str, Any], column: str | None) -> str | None:
    value = None if column is None else values.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return _text(value if isinstance(value, str) else str(value), str(column))


def _references(value: Any, column: str) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        return (_text(value, column),)
    if not value:
        raise UnusableRowError(f"{column} is empty")
    return tuple(_text(answer, f"{column}[{position}]") for position, answer in enumerate(value))


def _read_chat(values: Mapping[str, Any], column: str, system: str, topic: str | None) -> Request:
    """The request of a chat: the last turn of the assistant is the response, the turns before it are the prompt."""
    turns = _field(values, column)
    if not isinstance(turns, (list, tuple)):
        raise UnusableRowError(f"{column} is {type(turns).__name__}, not a list of turns")
    for name, reason in _UNLEARNT_COLUMNS.items():
        if column != name and not _is_nothing(values.get(name)):
            raise UnusableRowError(f"{name} would be left out of the prompt: {reason}")
    messages = [
        _read_turn(turn, f"{column}[{position}]") for position, turn in enumerate(turns) if not _says_nothing(turn)
    ]
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is None:
        raise UnusableRowError(f"{column} has no turn of the assistant")
    before = messages[:last]
    if before and before[0]["role"] in ("system", "developer"):
        system = before.pop(0)["content"]
    weights = [turn.get("weight") for turn in turns if not _says_nothing(turn)]
    if weights[last] is not None and weights[last] != 1:
        raise UnusableRowError(f"{column} gives the last turn of the assistant weight {weights[last]}, not 1")
    if not before or before[-1]["role"] != "user":
        raise UnusableRowError(f"{column} has no turn of the user before the last one of the assistant")
    instruction = before[-1]["content"]
    return Request(instruction, "", system, tuple(before[:-1]), (messages[last]["content"],), topic)


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, (str, list, tuple, Mapping)) and len(value) == 0) or value == "[]"


def _says_nothing(turn: Any) -> bool:
    """Whether a turn is an empty system message, which is as good as none, as in a `system` column."""
    if not isinstance(turn, Mapping):
        return False
    role, content = ("role", "content") if "role" in turn else ("from", "value")
    said = turn.get(content)
    return turn.get(role) in ("system", "developer") and (said is None or (isinstance(said, str) and not said.strip()))


def _read_turn(turn: Any, place: str) -> Message:
    if not isinstance(turn, Mapping):
        raise UnusableRowError(f"{place} is {type(turn).__name__}, not an object")
    role, content = ("role", "content") if "role" in turn else ("from", "value")
    for field in _UNLEARNT:
        if not _is_nothing(turn.get(field)):
            raise UnusableRowError(f"{place}.{field} would be left out: such turns are not supported")
    name = _text(turn.get(role, ""), f"{place}.{role}")
    if name not in _ROLES_OF_CHAT:
        raise UnusableRowError(f"{place}.{role} is {name!r}, not one of {', '.join(_ROLES_OF_CHAT)}")
    return {"role": _ROLES_OF_CHAT[name], "content": _text(_field(turn, content), f"{place}.{content}")}
