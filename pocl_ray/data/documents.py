"""Documents to be summarised that are too long for a prompt: they lose their end, and the template stays whole.

Other prompts lose their beginning when they are too long. Of a document that would be the wrong part: instruction and
lead stand there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pocl_ray.data.columns import Message, Request, UnusableRowError
from pocl_ray.data.prompts import PromptTemplate
from pocl_ray.data.tokenization import front_tokens
from pocl_ray.errors import ModelError


class DocumentFitter:
    """Shortens documents.

    Args:
        tokenizer: A Hugging Face tokenizer that tells where in the text a token stands.
        template: Makes the prompts.
        max_prompt_tokens: Of a prompt, what the tokenizer puts in front included.

    Raises:
        ModelError: The tokenizer cannot tell.
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
            UnusableRowError: There is no room for any of it; or the template refuses the request.
        """
        prompt = self._template.render(request)
        if len(prompt.encode("utf-8", errors="replace")) <= self._limit:  # a token is a byte at least
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
        """The document without its last tokens, shorter by a character at least."""
        places = self._tokenizer(document, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        if len(places) <= num_tokens:
            return ""
        _, end = places[len(places) - num_tokens - 1]
        return document[: min(end, len(document) - 1)].rstrip()


# Conversations that are too long for a prompt: they lose their oldest turns, whole, and keep their system message.
#
# Other prompts lose their beginning when they are too long. Of a chat that would be the wrong part: the system message
# stands there, and what is left would begin in the middle of a turn, which no chat template ever writes.


class ConversationFitter:
    """Leaves out turns.

    Args:
        tokenizer: A Hugging Face tokenizer.
        template: Makes the prompts, of chats.
        max_prompt_tokens: Of a prompt.
    """

    def __init__(self, tokenizer: Any, template: PromptTemplate, max_prompt_tokens: int) -> None:
        self._tokenizer, self._template, self._limit = tokenizer, template, max_prompt_tokens

    def fit(self, request: Request) -> Request:
        """Return the request with as many of its last turns as fit, a turn of the user the first of them.

        A last turn that is too long by itself is left as it is, to lose its beginning like any other prompt.

        Raises:
            UnusableRowError: The template refuses the request.
        """
        while request.history and not self._fits(request):
            request = replace(request, history=_without_oldest(request.history))
        return request

    def _fits(self, request: Request) -> bool:
        prompt = self._template.render(request)
        if len(prompt.encode("utf-8", errors="replace")) <= self._limit:  # a token is a byte at least
            return True
        return len(self._tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]) <= self._limit


def _without_oldest(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns from the second one of the user on."""
    later = (place for place, turn in enumerate(turns) if place > 0 and turn["role"] == "user")
    return turns[next(later, len(turns)) :]
