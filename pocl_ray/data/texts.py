"""Plain text without a prompt, for the distillation of language modelling: texts cut into rows of at most `max_tokens`.

A row's first token is its prompt, all others are its response, so that every position but the first is trained on. A
long text becomes several rows, each of which begins with the last token of the one before: every token of the text but
the first is a response token exactly once, and nothing is lost. The text ends with the end-of-sequence token. Short
texts are not packed: batches are made of rows of similar length anyway, and a row stays one text of one difficulty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pocl_ray.data.prompts import Example
from pocl_ray.data.tokenization import PreparedRow, front_tokens
from pocl_ray.errors import ModelError


class TextTokenizer:
    """Makes rows of texts.

    Args:
        tokenizer: A Hugging Face tokenizer. A token that it puts in front of a text by itself, such as BOS, is the
            first one of the text.
        max_tokens: Of a row.

    Raises:
        ModelError: The tokenizer has no end-of-sequence token.
    """

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"tokenizer {tokenizer.name_or_path}: has no end-of-sequence token; set its eos_token")
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._front = front_tokens(tokenizer)

    def rows(self, examples: Sequence[Example]) -> list[list[PreparedRow]]:
        """Return the rows of each text.

        Args:
            examples: Texts as their first reference, with an empty prompt.

        Returns:
            For each text its rows: the example with the row's own text, the first token, and those behind it.
        """
        if not examples:
            return []
        texts = [example.references[0] for example in examples]
        encoded = self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [self._cut(example, ids) for example, ids in zip(examples, encoded["input_ids"], strict=True)]

    def _cut(self, example: Example, ids: list[int]) -> list[PreparedRow]:
        if not ids:
            return []
        front = [] if ids[0] == self._tokenizer.bos_token_id else self._front
        whole = [*front, *ids, self._tokenizer.eos_token_id]
        pieces = [whole[start : start + self._max_tokens] for start in range(0, len(whole) - 1, self._max_tokens - 1)]
        if len(pieces) == 1:
            return [(example, whole[:1], whole[1:])]
        texts = self._tokenizer.batch_decode(pieces, skip_special_tokens=True)
        return [
            (replace(example, references=(text,)), piece[:1], piece[1:])
            for text, piece in zip(texts, pieces, strict=True)
        ]
