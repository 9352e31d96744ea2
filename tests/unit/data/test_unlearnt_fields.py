"""A chat with fields that would be left out is rejected with the reason."""

from __future__ import annotations

from typing import Any

import pytest

from pocl_ray.data.columns import UnusableRowError, read_request, wanted_columns

ASK = {"role": "user", "content": "What is the weather?"}
SAY = {"role": "assistant", "content": "It rains."}
CALL = [{"function": {"name": "look", "arguments": {}}}]


def read(*turns: dict[str, Any], **columns: Any) -> Any:
    return read_request({"messages": list(turns), **columns}, {"messages": "messages"})


@pytest.mark.parametrize(
    ("turns", "columns", "reason"),
    [
        ((ASK, {**SAY, "tool_calls": CALL}), {}, r"messages\[1\].tool_calls would be left out"),
        ((ASK, {**SAY, "tool_calls": CALL}, ASK, SAY), {}, r"messages\[1\].tool_calls would be left out"),
        ((ASK, {**SAY, "reasoning_content": "Clouds."}), {}, r"messages\[1\].reasoning_content would be left out"),
        (({**ASK, "name": "Ada"}, SAY), {}, r"messages\[0\].name would be left out"),
        ((ASK, {**SAY, "weight": 0}), {}, "the last turn of the assistant weight 0, not 1"),
        ((ASK, {**SAY, "weight": 0.5}), {}, "weight 0.5, not 1"),
        ((ASK, SAY), {"tools": CALL}, "tools would be left out of the prompt"),
        (
            (ASK, SAY),
            {"chat_template_kwargs": {"enable_thinking": True}},
            r"chat_template_kwargs .* data.template_args",
        ),
    ],
)
def test_a_field_that_would_vanish_rejects_the_row(turns: Any, columns: Any, reason: str) -> None:
    with pytest.raises(UnusableRowError, match=reason):
        read(*turns, **columns)


def test_empty_fields_and_weights_of_the_history_change_nothing() -> None:
    plain = read(ASK, SAY, ASK, SAY)
    empty = {"tool_calls": None, "reasoning_content": "", "name": None}
    assert read(ASK, {**SAY, "weight": 0}, ASK, {**SAY, **empty, "weight": 1}, tools=[]) == plain
    assert read({**ASK, "tool_calls": []}, SAY, ASK, SAY, tools="[]") == plain
    assert read({"role": "system", "content": ""}, ASK, SAY, ASK, {**SAY, "weight": 1}) == plain


@pytest.mark.parametrize("name", ["tools", "chat_template_kwargs"])
def test_the_column_of_tools_or_switches_is_read_with_chats_alone(name: str) -> None:
    assert wanted_columns({}, "instruction")(["messages", name, "other"]) == {"messages", name}
    assert wanted_columns({}, "instruction")(["prompt", "response", name]) == {"prompt", "response"}
