"""Special tokens that are written in the text of a row, such as `<|endoftext|>` in an article about tokenizers.

A tokenizer reads them as the token itself. A row would then end in its middle, or a user's text could open a turn of
the assistant. Here they are read as text, while those that a prompt template writes stay what they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pocl_ray.data.columns import Request, UnusableRowError
from pocl_ray.errors import ModelError

_FIRST, _LAST = 0xF0000, 0xFFFFD  # characters of private use, which stand in for special tokens of data
_MARKS = re.compile(f"[{chr(_FIRST)}-{chr(_LAST)}]")


class SpecialTokensAsText:
    """Marks the special tokens of data before a template is filled in, and tokenises what comes out.

    Args:
        tokenizer: A Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        named = {token.content for token in added.values() if token.special} | set(
            getattr(tokenizer, "all_special_tokens", ())
        )
        # The longest first, so that none is taken for the beginning of another.
        self._tokens = sorted(filter(None, named), key=lambda token: (-len(token), token))
        self._pattern = re.compile("|".join(map(re.escape, self._tokens)) or r"(?!)")
        self._own_ids = {tokenizer.convert_tokens_to_ids(token) for token in self._tokens} - {None}
        self._own_ids.discard(getattr(tokenizer, "unk_token_id", None))  # of letters that the tokenizer does not know
        self._mark_of: Mapping[str, str] = {token: chr(_FIRST + place) for place, token in enumerate(self._tokens)}

    def marked(self, text: str) -> str:
        """Return a text of a row with a mark in place of each special token.

        Raises:
            UnusableRowError: It holds characters that are marks here.
        """
        if not self._pattern.search(text):
            return text
        if _MARKS.search(text):
            raise UnusableRowError("characters of private use stand next to special tokens written as text")
        return self._pattern.sub(lambda found: self._mark_of[found[0]], text)

    def marked_request(self, request: Request) -> Request:
        """Return a request with marked texts; references after the first stay, since they are never tokenised."""
        history = tuple({**turn, "content": self.marked(turn["content"])} for turn in request.history)
        return replace(
            request,
            instruction=self.marked(request.instruction),
            input=self.marked(request.input),
            system=self.marked(request.system),
            history=history,
            references=(self.marked(request.references[0]), *request.references[1:]),
        )

    def plain(self, text: str) -> str:
        """Return a marked text as it was."""
        return _MARKS.sub(self._unmark, text)

    def _unmark(self, found: re.Match[str]) -> str:
        place = ord(found[0]) - _FIRST
        return self._tokens[place] if place < len(self._tokens) else found[0]

    def has_marks(self, text: str) -> bool:
        """Whether a text holds special tokens that are to be read as text."""
        return any(ord(found) - _FIRST < len(self._tokens) for found in _MARKS.findall(text))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts; of a marked special token these are the ids of its letters."""
        plain = [text for text in texts if not self.has_marks(text)]
        known = iter(_ids(self._tokenizer, plain))
        return [self._encode_marked(text) if self.has_marks(text) else next(known) for text in texts]

    def _encode_marked(self, text: str) -> list[int]:
        ids: list[int] = []
        end = 0
        # A tokenizer treats the text between two special tokens by itself, so cutting there changes nothing.
        for found in self._pattern.finditer(text):
            ids += self._letters(text[end : found.start()])
            ids.append(self._tokenizer.convert_tokens_to_ids(found[0]))
            end = found.end()
        return ids + self._letters(text[end:])

    def _letters(self, text: str) -> list[int]:
        if not text:
            return []
        (ids,) = _ids(self._tokenizer, [self.plain(text)], split_special_tokens=True)
        if not self._own_ids.isdisjoint(ids):
            raise ModelError(
                f"tokenizer {self._tokenizer.name_or_path}: cannot read a special token as text; set "
                "data.special_tokens: keep"
            )
        return ids


def _ids(tokenizer: Any, texts: Sequence[str], **options: Any) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
        **options,
    )
    return encoded["input_ids"]
