"""Rows of text as long as Dolly's, and a tokenizer with one token a word, for models with random weights.

The word of a token is `ba-4512`: a syllable that a sixty-fourth of all words share, and a number that is its own. Texts
of random tokens thus have words in common, and ROUGE-L tells them apart.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from step_sides import Row, random_rows
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SYLLABLES = [first + vowel for first in "bdfgklmnprstvwxz" for vowel in "aeio"]
SPECIAL = ("<eos>", "<unk>", "<pad>")
ANSWER_TOKENS = 60  # on average, of a model with random weights whose `stop_tokens` end an answer
TEMPLATE = "{instruction}\n{input}\n"  # the same for tokenizers of words, which skip all space, and others
MAX_PROMPT_TOKENS, MAX_TOKENS = 256, 512  # those of POCL


def word_of(token: int) -> str:
    """Return the text of a token."""
    return SPECIAL[token] if token < len(SPECIAL) else f"{SYLLABLES[token % len(SYLLABLES)]}-{token}"


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with as many tokens, each of which is a word."""
    words = models.WordLevel({word_of(token): token for token in range(vocabulary)}, "<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    )
    wrapped.clean_up_tokenization_spaces = False
    return wrapped


def stop_tokens(vocabulary: int) -> list[int]:
    """Return the tokens that end an answer, so many that answers of random weights are about as long as Dolly's."""
    return list(range(len(SPECIAL), len(SPECIAL) + max(1, vocabulary // ANSWER_TOKENS)))


def write_rows(path: Path, num_rows: int, vocabulary: int, seed: int = 0) -> None:
    """Write rows of random words with lengths like those of Dolly, as JSONL in the Alpaca layout."""
    with path.open("w", encoding="utf-8") as file:
        for row in random_rows(num_rows, vocabulary, seed):
            instruction, output = _texts(row)
            file.write(json.dumps({"instruction": instruction, "input": "", "output": output}) + "\n")


def _texts(row: Row) -> Sequence[str]:
    ids = row.ids_T.tolist()
    return [" ".join(map(word_of, part)) for part in (ids[: row.num_prompt_tokens], ids[row.num_prompt_tokens :])]
