from __future__ import annotations

from typing import Any

import pytest

from pocl_ray.data.columns import Request, UnusableRowError, read_request, resolve_columns
from pocl_ray.errors import DataError

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}
ALPACA = {"instruction": "instruction", "input": "input", "output": "output"}
CHAT = {"messages": "messages"}


@pytest.mark.parametrize(
    ("found", "mapping", "expected"),
    [
        (["instruction", "input", "output", "topic", "x"], {}, {**ALPACA, "topic": "topic"}),
        (["instruction", "output"], {}, {"instruction": "instruction", "output": "output"}),
        (
            ["instruction", "context", "response", "category"],
            {},
            {"instruction": "instruction", "input": "context", "output": "response", "topic": "category"},
        ),
        (["prompt", "response", "system"], {}, {"prompt": "prompt", "output": "response", "system": "system"}),
        (["prompt", "completion"], {}, {"prompt": "prompt", "output": "completion"}),
        (["prompt", "output"], {}, {"prompt": "prompt", "output": "output"}),
        (["question", "answer"], {}, {"prompt": "question", "output": "answer"}),
        (["prompt", "prompt_id", "messages"], {}, CHAT),
        (["conversations"], {}, {"messages": "conversations"}),
        (["q", "a", "prompt", "response"], {"prompt": "q", "output": "a"}, {"prompt": "q", "output": "a"}),
        (["prompt", "response", "messages"], {"prompt": "prompt"}, {"prompt": "prompt", "output": "response"}),
        (["instruction", "input", "gold"], {"output": "gold"}, {**ALPACA, "output": "gold"}),
        (["task", "context", "response"], {"instruction": "task", "input": "context"}, None),
        (["turns", "prompt", "response"], {"messages": "turns"}, {"messages": "turns"}),
    ],
)
def test_layouts_are_known_and_an_explicit_mapping_wins(found: list, mapping: dict, expected: dict | None) -> None:
    expected = expected or {"instruction": "task", "input": "context", "output": "response"}
    resolved = resolve_columns(found, mapping)
    assert expected.items() <= resolved.items()
    assert not {"messages", "prompt", "instruction"} & (resolved.keys() - expected.keys())


def test_an_optional_column_may_appear_in_later_rows_only() -> None:
    columns = resolve_columns(["instruction", "output"], {})
    assert read_request({"instruction": "a", "input": "b", "output": "c"}, columns).input == "b"


@pytest.mark.parametrize(
    ("found", "mapping", "message"),
    [
        (["instruction", "input"], {}, "cannot tell which columns .*; found: input, instruction; expected messages"),
        (["prompt;response"], {}, "; that is one column: a .csv is separated by commas, and this one by ';'"),
        (["a\tb"], {"prompt": "a"}, "found: a\tb; that is one column: "),
        ([], {}, "found: none"),
        (["prompt", "response"], {"output": "respones"}, r"no column 'respones', which `columns.output` .*'response'"),
        (["prompt", "response"], {"topic": "kind"}, "found: prompt, response"),
        (["messages", "output"], {"messages": "messages", "output": "output"}, "roles that do not go together"),
        (["prompt", "input", "output"], {"prompt": "prompt", "input": "input"}, "roles that do not go together"),
    ],
)
def test_columns_that_are_missing_or_do_not_go_together_are_refused(found: list, mapping: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        resolve_columns(found, mapping)


def test_a_row_gives_instruction_input_references_and_topic() -> None:
    values = {"instruction": "add", "input": " 1 2", "output": ["3", "three"], "topic": 7, "system": "be brief"}
    columns = {**ALPACA, "topic": "topic", "system": "system"}
    assert read_request(values, columns) == Request("add", " 1 2", "be brief", (), ("3", "three"), "7")
    bare = {"instruction": "add", "input": None, "output": "3", "topic": " ", "system": ""}
    assert read_request(bare, columns) == Request("add", "", "", (), ("3",), None)
    assert read_request({"instruction": "add", "output": "3"}, columns).input == ""


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"output": "x"}, "instruction is missing"),
        ({"instruction": None, "output": "x"}, "instruction is empty"),
        ({"instruction": " \n", "output": "x"}, "instruction is empty"),
        ({"instruction": 3, "output": "x"}, "instruction is int, not text"),
        ({"instruction": "a", "input": ["b"], "output": "x"}, "input is list, not text"),
        ({"instruction": "a"}, "output is missing"),
        ({"instruction": "a", "output": ""}, "output is empty"),
        ({"instruction": "a", "output": []}, "output is empty"),
        ({"instruction": "a", "output": {"text": "x"}}, "output is dict, not text"),
        ({"instruction": "a", "output": ["x", ""]}, r"output\[1\] is empty"),
        ({"instruction": "a", "output": ["x", 2]}, r"output\[1\] is int, not text"),
        ({"instruction": "a\ud800", "output": "x"}, "instruction holds half a surrogate pair"),
    ],
)
def test_unusable_fields_are_told_by_name(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnusableRowError, match=reason):
        read_request(values, ALPACA)


def test_the_last_turn_of_the_assistant_is_the_response() -> None:
    system = {"role": "system", "content": "be brief"}
    again = {"role": "user", "content": "and now?"}
    last = {"role": "assistant", "content": "bye"}
    request = read_request({"messages": [system, USER, ANSWER, again, last, USER]}, CHAT)
    assert request == Request("and now?", "", "be brief", (USER, ANSWER), ("bye",), None)
    assert read_request({"messages": [USER, ANSWER]}, CHAT) == Request("hi", "", "", (), ("hello",), None)


def test_turns_may_be_written_as_from_and_value() -> None:
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    assert read_request({"messages": turns}, CHAT) == read_request({"messages": [USER, ANSWER]}, CHAT)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ("hi", "messages is str, not a list of turns"),
        ([], "has no turn of the assistant"),
        ([USER], "has no turn of the assistant"),
        ([ANSWER], "has no turn of the user before the last one of the assistant"),
        ([USER, ANSWER, ANSWER], "has no turn of the user before the last one"),
        ([{"role": "system", "content": "s"}, ANSWER], "has no turn of the user before the last one"),
        (["hi", ANSWER], r"messages\[0\] is str, not an object"),
        ([{"role": "poet", "content": "hi"}, ANSWER], r"messages\[0\]\.role is 'poet', not one of system"),
        ([{"content": "hi"}, ANSWER], r"messages\[0\]\.from is empty"),
        ([USER, {"role": "assistant"}], r"content is missing"),
        ([USER, {"role": "assistant", "content": None}], r"content is empty"),
        ([{"role": "user", "content": [{"type": "image"}]}, ANSWER], r"messages\[0\]\.content is list, not text"),
    ],
)
def test_conversations_without_sense_are_told(turns: Any, reason: str) -> None:
    with pytest.raises(UnusableRowError, match=reason):
        read_request({"messages": turns}, CHAT)
