from __future__ import annotations

import pytest
from data_tokenizers import EOS, tiny_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pocl_ray.data.tokenization import RowTokenizer
from pocl_ray.errors import ModelError


def encode(tokenizer: object, prompt: str, response: str, longest: int = 64, both: int = 128, special: bool = True):
    (prompt_ids,), (response_ids,) = RowTokenizer(tokenizer, longest, both, special).encode([prompt], [response])
    return prompt_ids, response_ids


def test_prompt_and_response_join_to_the_tokens_of_the_running_text() -> None:
    tokenizer = tiny_tokenizer()
    prompt, response = "### Response:\n", "hello to the cat."
    prompt_ids, response_ids = encode(tokenizer, prompt, response)
    assert prompt_ids == tokenizer(prompt)["input_ids"]
    assert prompt_ids + response_ids == [*tokenizer(prompt + response)["input_ids"], tokenizer.eos_token_id]
    assert tokenizer.decode(response_ids) == response + EOS


def test_a_token_over_the_border_does_not_change_the_prompt() -> None:
    tokenizer = tiny_tokenizer()
    prompt, response = "Say hel", "lo"
    alone = tokenizer(prompt)["input_ids"]
    assert tokenizer(prompt + response)["input_ids"][: len(alone)] != alone, "the example must merge at the border"
    prompt_ids, response_ids = encode(tokenizer, prompt, response)
    assert prompt_ids == alone
    assert tokenizer.decode(response_ids) == "lo" + EOS


def test_a_response_gets_no_word_start_of_its_own_with_sentencepiece_like_tokenizers() -> None:
    vocab = {"</s>": 0, "▁": 1, "a": 2, "b": 3, "\n": 4, "▁a": 5, "▁b": 6}
    core = Tokenizer(models.BPE(vocab, [("▁", "a"), ("▁", "b")]))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    assert encode(tokenizer, "a\n", "b b") == ([5, 4], [3, 6, 0])


def test_many_rows_at_once_give_what_each_gives_alone() -> None:
    rows = [("Say hel", "lo"), ("Say ", "hello"), ("the cat.", "x" * 300), ("y" * 300, "the cat.")]
    tokenizer = tiny_tokenizer(adds_bos=True)
    together = RowTokenizer(tokenizer, 64, 128, True).encode([p for p, _ in rows], [r for _, r in rows])
    assert list(zip(*together, strict=True)) == [encode(tokenizer, *row) for row in rows]
    assert RowTokenizer(tokenizer, 64, 128, True).encode([], []) == ([], [])


def test_bos_stands_once_whoever_writes_it() -> None:
    tokenizer = tiny_tokenizer(adds_bos=True)
    bos = tokenizer.bos_token_id
    bare = tokenizer("Say", add_special_tokens=False)["input_ids"]
    assert encode(tokenizer, "Say", "x")[0] == [bos, *bare]
    assert encode(tokenizer, "<s>Say", "x")[0] == [bos, *bare]
    assert encode(tokenizer, "<s>Say", "x", special=False)[0] == [bos, *bare]
    assert encode(tokenizer, "Say", "x", special=False)[0] == bare
    assert encode(tiny_tokenizer(), "Say", "x")[0] == bare, "a tokenizer that adds none"


@pytest.mark.parametrize("written", [False, True])
def test_a_long_prompt_loses_its_beginning_but_not_bos(written: bool) -> None:
    tokenizer = tiny_tokenizer(adds_bos=True)
    text = "Say hello to the cat. " * 9 + "### Response:\n"
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt_ids, response_ids = encode(tokenizer, "<s>" * written + text, "hello", longest=6)
    assert prompt_ids == [tokenizer.bos_token_id, *bare[-5:]]
    assert tokenizer.decode(response_ids) == "hello" + EOS
    assert encode(tokenizer, text, "hello", longest=1)[0] == [tokenizer.bos_token_id]


def test_a_response_is_cut_to_the_room_left_and_keeps_eos_unless_cut() -> None:
    tokenizer = tiny_tokenizer()
    prompt, response = "Say ", "q" * 10
    prompt_ids, whole = encode(tokenizer, prompt, response)
    assert whole[-1] == tokenizer.eos_token_id
    fits = len(prompt_ids) + len(whole)
    assert encode(tokenizer, prompt, response, longest=4, both=fits)[1] == whole
    assert encode(tokenizer, prompt, response, longest=4, both=fits - 1)[1] == whole[:-1]
    assert len(encode(tokenizer, prompt, response, longest=4, both=5)[1]) == 5 - len(prompt_ids)


def test_a_response_without_tokens_is_empty_without_eos() -> None:
    core = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    core.normalizer = normalizers.Replace("\u200b", "")
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    assert encode(tokenizer, "a", "\u200b") == ([0], [])


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        RowTokenizer(tokenizer, 64, 128, True)
