"""A tokenizer trained here: nothing is lost, digits stay single, and transformers loads it."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pocl_ray.data.tokenization import SMALLEST_VOCABULARY, train_tokenizer
from pocl_ray.errors import ConfigError

TEXTS = ["Add the numbers.\n17 + 5\n=>\n22", "Copy the words.\nred cat\n=>\nred cat"] * 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "new"
    train_tokenizer(iter(TEXTS), 320, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", [TEXTS[0], " two  blanks , kept .", "naïve 猫 🙂\t\r\n", "don't 1234"])
def test_every_text_comes_back_as_it_was(tokenizer: PreTrainedTokenizerFast, text: str):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_are_tokens_of_their_own(tokenizer: PreTrainedTokenizerFast):
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    assert not [token for token in tokenizer.get_vocab() if len(token) > 1 and any(c.isdigit() for c in token)]


def test_frequent_words_are_merged_and_the_vocabulary_keeps_its_limit(tokenizer: PreTrainedTokenizerFast):
    assert SMALLEST_VOCABULARY < len(tokenizer) <= 320
    assert len(tokenizer.tokenize("the words")) == 2


def test_one_token_is_both_end_and_padding_and_is_not_put_into_plain_text(tokenizer: PreTrainedTokenizerFast):
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert tokenizer.eos_token_id not in tokenizer("red cat")["input_ids"]
    assert (
        tokenizer.decode(tokenizer("red cat")["input_ids"] + [tokenizer.eos_token_id], skip_special_tokens=True)
        == "red cat"
    )


def test_the_chat_template_ends_a_prompt_in_the_arrow_and_an_answer_in_end_of_text(tokenizer: PreTrainedTokenizerFast):
    prompt = [{"role": "user", "content": "Copy the words.\nred cat"}]
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert text == "Copy the words.\nred cat\n=>\n"
    answered = [*prompt, {"role": "assistant", "content": "red cat"}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == f"{text}red cat<|endoftext|>"


def test_the_same_texts_give_the_same_tokenizer(folder: Path, tmp_path: Path):
    train_tokenizer(TEXTS, 320, tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_vocabulary_without_room_for_every_byte_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="257"):
        train_tokenizer(TEXTS, 256, tmp_path / "small")
    assert not list(tmp_path.iterdir())
