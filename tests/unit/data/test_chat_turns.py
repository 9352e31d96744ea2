"""A chat's prompt and response are the template's own tokens, up to the end of the assistant's turn."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from data_tokenizers import templated_tokenizer
from transformers import AutoTokenizer

from pocl_ray.config import Config
from pocl_ray.config.sources import DataConfig, SourceConfig
from pocl_ray.data.chat_turns import assistant_turn, end_as_the_template
from pocl_ray.data.prepare import data_fingerprint
from pocl_ray.data.readers import SourceRow
from pocl_ray.data.rows import Preparation
from pocl_ray.errors import ConfigError
from pocl_ray.inputs import Inputs, _copy_tokenizer

CASES = Path(__file__).resolve().parents[4] / "shared" / "cases" / "chat"
END = "<|end|>"
LOOP = "{% for m in messages %}[{{ m.role }}]"
ASK = "{% if add_generation_prompt %}[assistant]{% endif %}"
TEMPLATES = {
    "another end": LOOP + "{{ m.content }}" + END + "\n{% endfor %}" + ASK,
    "space in front": LOOP + " {{ m.content }}" + END + "{% endfor %}" + ASK,
    "space behind": LOOP + "{{ m.content }} " + END + "{% endfor %}" + ASK,
    "trimmed": LOOP + "\n{{ m.content | trim }}" + END + "\n{% endfor %}" + ASK,
    "eos behind all": LOOP + "{{ m.content }}" + END + "\n{% endfor %}{{ eos_token }}" + ASK,
    "eos": LOOP + "{{ m.content }}{{ eos_token }}{% endfor %}" + ASK,
    "thoughts": LOOP
    + "{% if m.role == 'assistant' and loop.last %}<think></think>\n{% endif %}{{ m.content }}"
    + END
    + "{% endfor %}"
    + ASK,
}
CHAT = [
    {"role": "user", "content": "Say hello"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "to the cat"},
    {"role": "assistant", "content": " hello cat \n"},
]


def made_for(template: str) -> Any:
    closed = "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    return templated_tokenizer(template.replace("{{ eos_token }}" + ASK, closed + ASK), [END])


def rows_of(tokenizer: Any, values: dict[str, Any], **settings: Any) -> tuple[Any, list[dict[str, Any]]]:
    source = SourceConfig(path="unread.jsonl")
    config = DataConfig(train=source, holdout_rows=1, prompt_template="chat", **settings)
    preparation = Preparation(source, config, [tokenizer], [])
    (batch,) = preparation.prepare([SourceRow("f", 1, values)])
    return preparation, batch.to_pylist()


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_and_response_are_the_templates_own_tokens(name: str) -> None:
    tokenizer = made_for(TEMPLATES[name])
    end_as_the_template(tokenizer)
    _, (row,) = rows_of(tokenizer, {"messages": CHAT})
    own = tokenizer(tokenizer.apply_chat_template(CHAT, tokenize=False), add_special_tokens=False)["input_ids"]
    ids = row["prompt_ids"] + row["response_ids"]
    assert ids == own[: len(ids)]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token == ("</s>" if name == "eos" else END)
    assert ids.count(tokenizer.eos_token_id) == 4
    assert row["references"] == [" hello cat \n"]


def test_special_tokens_in_an_answer_stay_text() -> None:
    tokenizer = made_for(TEMPLATES["space behind"])
    end_as_the_template(tokenizer)
    turns = [CHAT[0], {"role": "assistant", "content": f"a {END} b"}]
    preparation, (row,) = rows_of(tokenizer, {"messages": turns})
    assert row["response_ids"].count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(row["response_ids"]) == f"a {END} b {END}"
    assert row["references"] == [f"a {END} b"]
    assert preparation.counts.num_special == 1


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (LOOP + "{{ m.content }}<|no token|>{% endfor %}" + ASK, r"ends an answer with '<\|no token\|>', .* no token"),
        (LOOP + "{{ m.content }}{% endfor %}" + ASK + "<think>", "begins an answer in another way than the prompt"),
        (LOOP + "{{ m.content | upper }}{% endfor %}" + ASK, "does not write the answer as it is"),
        ("{{ raise_exception('never') }}", r"fails for a question and an answer \(never\)"),
    ],
)
def test_a_template_whose_turn_cannot_be_met_is_refused(template: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"^data.prompt_template: chat, but .* {words}"):
        assistant_turn(made_for(template))


def test_switches_of_the_template_reach_it() -> None:
    ask = "{% if add_generation_prompt %}[assistant]{% if not thinks | default(true) %}<think></think>\n{% endif %}"
    tokenizer = made_for(TEMPLATES["thoughts"].replace(ASK, ask + "{% endif %}"))
    end_as_the_template(tokenizer)
    (_, (without,)) = rows_of(tokenizer, {"messages": CHAT}, template_args={"thinks": False})
    (_, (plain,)) = rows_of(tokenizer, {"messages": CHAT})
    assert without["prompt"] == plain["prompt"] + "<think></think>\n"
    assert plain["prompt_ids"] + plain["response_ids"] == without["prompt_ids"] + without["response_ids"]


def test_switches_need_the_chat_template_and_default_to_the_same_run() -> None:
    source = SourceConfig(path="samples://instructions", split="train")
    with pytest.raises(ValueError, match="template_args are for the tokenizer's chat template"):
        DataConfig(train=source, holdout_rows=1, template_args={"thinks": False})
    with pytest.raises(ValueError, match="template_args cannot hold tokenize"):
        DataConfig(train=source, holdout_rows=1, prompt_template="chat", template_args={"tokenize": True})
    config = DataConfig(train=source, holdout_rows=1, prompt_template="chat")
    assert "template_args" not in str(data_fingerprint(config))
    assert "thinks" in str(data_fingerprint(config.model_copy(update={"template_args": {"thinks": False}})))


@pytest.mark.skipif(not CASES.is_dir(), reason="the shared cases are not here")
@pytest.mark.parametrize("name", ["gemma", "qwen3", "tools"])
def test_the_shared_cases_are_exact(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(CASES / name)
    end_as_the_template(tokenizer)
    _, (row,) = rows_of(tokenizer, {"messages": CHAT})
    own = tokenizer(tokenizer.apply_chat_template(CHAT, tokenize=False), add_special_tokens=False)["input_ids"]
    ids = row["prompt_ids"] + row["response_ids"]
    assert ids == own[: len(ids)]
    assert tokenizer.decode(ids[-1:]) == ("<end_of_turn>" if name == "gemma" else "<|im_end|>")


@pytest.mark.parametrize(("name", "num_turns"), [("another end", 1), ("space in front", 1), ("eos", 0)])
def test_the_runs_tokenizer_ends_as_the_template_and_only_then_has_another_fingerprint(
    name: str, num_turns: int, tmp_path: Path
) -> None:
    place = str(tmp_path / "given")
    made_for(TEMPLATES[name]).save_pretrained(place)
    data = {"train": {"path": "samples://instructions", "split": "train"}, "holdout_rows": 1, "prompt_template": "chat"}
    config = Config.model_validate(
        {"name": "chat", "data": data, "teacher": {"path": place}, "student": {"path": place}}
    )
    inputs = Inputs(config, SimpleNamespace(run_dir=None))  # type: ignore[arg-type]
    assert len(inputs._turns(place, None)) == num_turns
    _copy_tokenizer(place, None, False, tmp_path / "own", config.data)
    own = AutoTokenizer.from_pretrained(tmp_path / "own")
    assert own.eos_token == ("</s>" if name == "eos" else END)
