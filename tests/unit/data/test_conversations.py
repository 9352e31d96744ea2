"""Chats: what is learnt of them, and what of them is left out where they are too long."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from data_tokenizers import tiny_tokenizer

from pocl_ray.config.sources import DataConfig
from pocl_ray.data.columns import Request
from pocl_ray.data.documents import ConversationFitter
from pocl_ray.data.prompts import PromptTemplate
from pocl_ray.data.row_store import RowStore
from pocl_ray.data.rows import prepare_rows

ROLES = ("user", "assistant")
TURNS = tuple({"role": ROLES[place % 2], "content": f"turn {place}"} for place in range(6))


def request_of(num_turns: int, instruction: str = "Last?") -> Request:
    return Request(instruction, "", "Be kind.", TURNS[:num_turns], ("Yes",), None)


def prompt_of(request: Request, limit: int) -> tuple[str, int]:
    """The prompt of a request that is fitted into so many tokens, and how many it has."""
    tokenizer = tiny_tokenizer(chat=True)
    template = PromptTemplate("chat", tokenizer)
    prompt = template.render(ConversationFitter(tokenizer, template, limit).fit(request))
    return prompt, len(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def test_a_chat_that_fits_is_left_alone() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    fitter = ConversationFitter(tokenizer, PromptTemplate("chat", tokenizer), 1000)
    assert fitter.fit(request_of(6)) == request_of(6)


@pytest.mark.parametrize("limit", range(50, 150, 10))
def test_a_long_chat_loses_its_oldest_turns_whole_and_keeps_its_system_message(limit: int) -> None:
    prompt, num_tokens = prompt_of(request_of(6), limit)
    assert num_tokens <= limit
    lines = prompt.splitlines()
    assert lines[0] == "<s>[system] Be kind." and lines[-2:] == ["[user] Last?", "[assistant] "]
    kept = lines[1:-2]
    assert kept == [f"[{turn['role']}] {turn['content']}" for turn in TURNS[len(TURNS) - len(kept) :]]
    assert not kept or kept[0].startswith("[user]")
    if len(kept) < len(TURNS):  # the next two turns would have been too many
        longer = replace(request_of(0), history=TURNS[len(TURNS) - len(kept) - 2 :])
        assert prompt_of(longer, 1000)[1] > limit


def test_a_last_turn_that_is_too_long_is_left_to_lose_its_beginning() -> None:
    prompt, num_tokens = prompt_of(request_of(6, "Last? " * 40), 60)
    assert num_tokens > 60
    assert "turn" not in prompt


def test_of_a_chat_the_last_answer_alone_is_a_response_whatever_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    turns = [{"role": "system", "content": "Be kind."}, *TURNS]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    lengths = {"max_prompt_tokens": 60, "max_tokens": 80, "prompt_template": "chat"}
    config = DataConfig.model_validate({"train": {"path": str(path)}, "holdout_rows": 1, **lengths})
    tokenizer = tiny_tokenizer(chat=True)
    prepare_rows("train", config.train, config, tokenizer, tmp_path / "train.arrow")
    (prompt,), (response,) = RowStore.open(tmp_path / "train.arrow").tokens([0])
    assert tokenizer.decode(prompt).startswith("<s>[system] Be kind.\n[user] turn")
    assert "turn 0" not in tokenizer.decode(prompt)
    assert tokenizer.decode(response) == "turn 5</s>"
