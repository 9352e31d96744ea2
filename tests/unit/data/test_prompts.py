from __future__ import annotations

import pytest
from data_tokenizers import tiny_tokenizer

from pocl_ray.data.columns import Request, UnusableRowError
from pocl_ray.data.prompts import Example, PromptTemplate, read_example
from pocl_ray.data.readers import SourceRow
from pocl_ray.errors import ConfigError

TURN = {"role": "user", "content": "before"}


def request(instruction: str = "Add.", input: str = "", system: str = "", history: tuple = ()) -> Request:
    return Request(instruction, input, system, history, ("x",), None)


def render(template: str, asked: Request) -> str:
    return PromptTemplate(template, tokenizer=None).render(asked)


def test_alpaca_is_the_text_of_the_papers() -> None:
    assert render("alpaca", request()) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Response:\n"
    )
    assert render("alpaca", request(input="1 2")) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )


def test_plain_is_the_request_alone() -> None:
    assert render("plain", request()) == "Add."
    assert render("plain", request(input="1 2", system="Be brief.")) == "Be brief.\n\nAdd.\n\n1 2"


def test_a_template_of_the_users_own_is_filled() -> None:
    assert render("Q: {instruction}\nI: {input}\nA:", request(input="1 2")) == "Q: Add.\nI: 1 2\nA:"
    assert render("Q: {instruction} ({input})", request()) == "Q: Add. ()"
    assert render("Q: {instruction}\nA:", request(input="1 2")) == "Q: Add.\n\n1 2\nA:"


def test_braces_mean_nothing_in_data_and_can_be_written_in_a_template() -> None:
    hostile = request("{input} {0} {{x}} {instruction}", input="{instruction}")
    assert render("{instruction}|{input}", hostile) == "{input} {0} {{x}} {instruction}|{instruction}"
    assert render('{{"q": "{instruction}"}} {{instruction}} { 1 }', request()) == '{"q": "Add."} {instruction} { 1 }'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{instruction} {inptu}", r"data.prompt_template: unknown placeholder {inptu}; there are {instruction} and"),
        ("alpcaa", r"'alpcaa' holds no {instruction}; did you mean alpaca\?"),
        ("Answer: {input}", r"holds no {instruction}; give alpaca, chat, plain, or a text with {instruction}"),
        ("chat", "the tokenizer has no chat template"),
    ],
)
def test_templates_that_cannot_work_are_refused(template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PromptTemplate(template, tiny_tokenizer())


def test_chat_uses_the_tokenizers_template_up_to_the_answer() -> None:
    template = PromptTemplate("chat", tiny_tokenizer(chat=True))
    assert template.render(request(input="1 2", system="Be brief.", history=(TURN,))) == (
        "<s>[system] Be brief.\n[user] before\n[user] Add.\n\n1 2\n[assistant] "
    )


def test_a_chat_template_may_refuse_a_row() -> None:
    template = PromptTemplate("chat", tiny_tokenizer(chat=True))
    with pytest.raises(UnusableRowError, match=r"chat template refuses it .*no tools here"):
        template.render(request(history=({"role": "tool", "content": "x"},)))


@pytest.mark.parametrize("template", ["alpaca", "plain", "{instruction}"])
def test_conversations_of_several_turns_need_chat(template: str) -> None:
    with pytest.raises(UnusableRowError, match=r"several turns needs data\.prompt_template: chat"):
        render(template, request(history=(TURN,)))


def test_an_example_carries_prompt_references_topic_and_row_number() -> None:
    row = SourceRow("a.jsonl", 7, {"prompt": "Add.", "response": ["x", "y"], "topic": "t"})
    columns = {"prompt": "prompt", "output": "response", "topic": "topic"}
    assert read_example(row, columns, PromptTemplate("plain", None)) == Example("Add.", ("x", "y"), "t", 7)
