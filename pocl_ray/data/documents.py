"""Shortening of requests that are too long: a document to be summarised loses its end, and the template stays whole.

Other prompts lose their beginning if they are too long. For a document that would be the wrong part, since it holds the
instruction and the lead.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pocl_ray.data.columns import Message, Request, UnusableRowError
from pocl_ray.data.prompts import PromptTemplate
from pocl_ray.data.tokenization import front_tokens
from pocl_ray.errors import ModelError


class DocumentFitter:
    """Shortens documents to the room in their prompts.

    Args:
        tokenizer: Hugging Face tokenizer that gives the position of each token in the text.
        template: Template of the prompts.
        max_prompt_tokens: Maximum tokens of a prompt, including the tokens that the tokenizer adds in front.

    Raises:
        ModelError: The tokenizer gives no positions.
    """

    def __init__(self, tokenizer: Any, template: PromptTemplate, max_prompt_tokens: int) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                f"tokenizer {tokenizer.name_or_path}: tells no places of tokens, which cutting documents needs; "
                "use its fast version"
            )
        self._tokenizer, self._template = tokenizer, template
        self._limit = max_prompt_tokens - (0 if template.is_chat else len(front_tokens(tokenizer)))
        self._max_prompt_tokens = max_prompt_tokens

    def fit(self, request: Request) -> Request:
        """Return the request with as much of its document as fits.

        Raises:
            UnusableRowError: There is no room for any of the document, or the template refuses the request.
        """
        prompt = self._template.render(request)
        if len(prompt.encode("utf-8", errors="replace")) <= self._limit:  # a token has at least one byte
            return request
        num_over = self._num_tokens(prompt) - self._limit
        while num_over > 0:
            document = self._without_end(request.input, num_over)
            if not document.strip():
                raise UnusableRowError(
                    "no room for the document: the template alone fills data.max_prompt_tokens "
                    f"{self._max_prompt_tokens}"
                )
            request = replace(request, input=document)
            num_over = self._num_tokens(self._template.render(request)) - self._limit
        return request

    def _num_tokens(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _without_end(self, document: str, num_tokens: int) -> str:
        """The document without its last tokens, at least one character shorter."""
        places = self._tokenizer(document, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        if len(places) <= num_tokens:
            return ""
        _, end = places[len(places) - num_tokens - 1]
        return document[: min(end, len(document) - 1)].rstrip()


class ConversationFitter:
    """Shortens conversations that are too long for a prompt: their oldest turns go, their system message stays.

    Tokens cut off at the beginning would be wrong for a chat: it begins with the system message, and the rest would
    begin in the middle of a turn, which no chat template writes.

    Args:
        tokenizer: Hugging Face tokenizer.
        template: Template of chat prompts.
        max_prompt_tokens: Maximum tokens of a prompt.
    """

    def __init__(self, tokenizer: Any, template: PromptTemplate, max_prompt_tokens: int) -> None:
        self._tokenizer, self._template, self._limit = tokenizer, template, max_prompt_tokens

    def fit(self, request: Request) -> Request:
        """Return the request with as many of its last turns as fit; the first of them is a turn of the user.

        A last turn that is too long by itself does not change here. Later it loses its beginning like any other prompt.

        Raises:
            UnusableRowError: The template refuses the request.
        """
        while request.history and not self._fits(request):
            request = replace(request, history=_without_oldest(request.history))
        return request

    def _fits(self, request: Request) -> bool:
        prompt = self._template.render(request)
        if len(prompt.encode("utf-8", errors="replace")) <= self._limit:  # a token has at least one byte
            return True
        return len(self._tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]) <= self._limit


def _without_oldest(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns from the user's second turn on."""
    later = (place for place, turn in enumerate(turns) if place > 0 and turn["role"] == "user")
    return turns[next(later, len(turns)) :]
