"""Conversations that are too long for a prompt: they lose their oldest turns, whole, and keep their system message.

Other prompts lose their beginning when they are too long. Of a chat that would be the wrong part: the system message
stands there, and what is left would begin in the middle of a turn, which no chat template ever writes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pocl_ray.data.columns import Message, Request
from pocl_ray.data.prompts import PromptTemplate


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
