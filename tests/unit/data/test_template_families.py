"""Chat templates of families, in short: prompt and response are the template's own tokens, to the end of the turn."""

from __future__ import annotations

from typing import Any

import pytest
from data_tokenizers import templated_tokenizer

from pocl_ray.config.sources import DataConfig, SourceConfig
from pocl_ray.data.chat_turns import end_as_the_template
from pocl_ray.data.readers import SourceRow
from pocl_ray.data.rows import Preparation
from pocl_ray.errors import ConfigError

CHATML = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
LOOP, END = "{% for m in messages %}", "{% endfor %}"
ANSWERS = "{% if m.role == 'assistant' %}"


def ask(text: str) -> str:
    return "{% if add_generation_prompt %}" + text + "{% endif %}"


# Name -> (template, token that ends a turn).
TEMPLATES: dict[str, tuple[str, str]] = {
    "chatml": (LOOP + CHATML + END + ask("<|im_start|>assistant\n"), "<|im_end|>"),
    "qwen3": (
        LOOP
        + ANSWERS
        + "<|im_start|>assistant\n{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
        + "{% else %}"
        + CHATML
        + "{% endif %}"
        + END
        + ask("<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"),
        "<|im_end|>",
    ),
    "llama3": (
        "{{ bos_token }}"
        + LOOP
        + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
        + END
        + ask("<|start_header_id|>assistant<|end_header_id|>\n\n"),
        "<|eot_id|>",
    ),
    "gemma": (
        "{{ bos_token }}"
        + LOOP
        + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        + END
        + ask("<start_of_turn>model\n"),
        "<end_of_turn>",
    ),
    "phi3": (
        LOOP
        + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n"
        + END
        + "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        "<|end|>",
    ),
    "zephyr": (LOOP + "<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n" + END + ask("<|assistant|>\n"), "</s>"),
    "mistral": (
        "{{ bos_token }}"
        + LOOP
        + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
        + END,
        "</s>",
    ),
    "deepseek": (
        "{{ bos_token }}"
        + LOOP
        + "{% if m.role == 'user' %}<|User|>{{ m.content }}"
        + "{% else %}<|Assistant|>{{ m.content }}{{ eos_token }}{% endif %}"
        + END
        + ask("<|Assistant|>"),
        "</s>",
    ),
    "command_r": (
        "{{ bos_token }}"
        + LOOP
        + "<|START|>{{ '<|CHATBOT|>' if m.role == 'assistant' else '<|USER|>' }}{{ m.content | trim }}<|END_OF_TURN|>"
        + END
        + ask("<|START|><|CHATBOT|>"),
        "<|END_OF_TURN|>",
    ),
    "gpt_oss": (
        LOOP
        + "<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>{{ m.content }}"
        + "{% if m.role == 'assistant' %}<|return|>{% else %}<|end|>{% endif %}"
        + END
        + ask("<|start|>assistant"),
        "<|return|>",
    ),
    "falcon": (
        LOOP + "{{ 'Assistant' if m.role == 'assistant' else 'User' }}: {{ m.content }}{{ eos_token }}\n" + END
        + ask("Assistant:"),
        "</s>",
    ),
}  # fmt: skip
SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>"),
    *("<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>", "<|User|>", "<|Assistant|>", "<|START|>"),
    *("<|CHATBOT|>", "<|USER|>", "<|END_OF_TURN|>", "<|start|>", "<|channel|>", "<|message|>", "<|return|>"),
]
CHAT = [
    {"role": "user", "content": "Say hello"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "to the cat, சொல் สวัสดี 👋🏽"},
    {"role": "assistant", "content": "hello cat,\n\n- שלום\n- ሰላም"},
]


def made_for(template: str) -> Any:
    tokenizer = templated_tokenizer(template, SPECIAL)
    end_as_the_template(tokenizer)
    return tokenizer


def row_of(tokenizer: Any, **settings: Any) -> dict[str, Any]:
    source = SourceConfig(path="unread.jsonl")
    config = DataConfig(train=source, holdout_rows=1, prompt_template="chat", **settings)
    (batch,) = Preparation(source, config, [tokenizer], []).prepare([SourceRow("f", 1, {"messages": CHAT})])
    (row,) = batch.to_pylist()
    return row


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_familys_chat_is_its_templates_own_tokens(name: str) -> None:
    template, end = TEMPLATES[name]
    tokenizer = made_for(template)
    row = row_of(tokenizer)
    own = tokenizer(tokenizer.apply_chat_template(CHAT, tokenize=False), add_special_tokens=False)["input_ids"]
    ids = row["prompt_ids"] + row["response_ids"]
    assert ids == own[: len(ids)], tokenizer.decode(ids)
    assert tokenizer.eos_token == end and row["response_ids"].count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    asked = tokenizer.apply_chat_template(CHAT[:-1], tokenize=False, add_generation_prompt=True)
    assert row["prompt_ids"] == tokenizer(asked, add_special_tokens=False)["input_ids"], "what evaluation asks with"
    assert row["references"] == [CHAT[-1]["content"]]


def test_without_thoughts_the_empty_ones_are_part_of_the_prompt() -> None:
    tokenizer = made_for(TEMPLATES["qwen3"][0])
    row, quiet = row_of(tokenizer), row_of(tokenizer, template_args={"enable_thinking": False})
    assert row["prompt_ids"] + row["response_ids"] == quiet["prompt_ids"] + quiet["response_ids"]
    assert tokenizer.decode(quiet["response_ids"]) == CHAT[-1]["content"] + "<|im_end|>"
    assert tokenizer.decode(row["response_ids"]).startswith("<think>\n\n</think>\n\nhello cat")


def test_a_prompt_that_opens_thoughts_which_answers_do_not_have_is_refused() -> None:
    template = LOOP + CHATML + END + ask("<|im_start|>assistant\n<think>\n")
    with pytest.raises(ConfigError, match="begins an answer in another way than the prompt ends"):
        made_for(template)
