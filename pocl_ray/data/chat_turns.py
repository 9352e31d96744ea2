"""The assistant's turn in a chat template: the text before and after the answer, and the token that ends it.

Many templates end a turn with another token than the tokenizer's end of sequence (Gemma, Phi-3, ChatML with a base
model's tokenizer). A response must end with that token, and generation must stop there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from pocl_ray.errors import ConfigError

_QUESTION, _ANSWER = "Tell me 7.", "It is 7, as told."


@dataclass(frozen=True)
class AssistantTurn:
    """The turn of the assistant in a chat template.

    Attributes:
        opening: Text between the prompt and the answer.
        closing: Text between the answer and the token that ends the turn, or all text after the answer if none ends it.
        end: Token that ends the turn; None if the template writes none.
    """

    opening: str
    closing: str
    end: str | None

    def is_plain(self, eos_token: str) -> bool:
        """Whether a turn is the answer and the end of sequence, and nothing else."""
        return not self.opening and (self.end is None or (not self.closing and self.end == eos_token))


def assistant_turn(tokenizer: Any, template_args: Mapping[str, Any] | None = None) -> AssistantTurn:
    """Return the turn of the assistant as the tokenizer's chat template writes it.

    Args:
        tokenizer: Hugging Face tokenizer with a chat template.
        template_args: Further arguments of the template.

    Raises:
        ConfigError: A response cannot end as the template's turn does; the message says why.
    """
    asked = [{"role": "user", "content": _QUESTION}]
    answered = [*asked, {"role": "assistant", "content": _ANSWER}]
    args = dict(template_args or {})
    try:
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, **args)
        whole = tokenizer.apply_chat_template(answered, tokenize=False, **args)
    except (TemplateError, TypeError, ValueError) as error:
        raise _refusal(f"fails for a question and an answer ({error})") from None
    if not whole.startswith(prompt):
        raise _refusal(f"begins an answer in another way than the prompt ends ({prompt[-40:]!r})")
    opening, found, behind = whole[len(prompt) :].rpartition(_ANSWER)
    if not found:
        raise _refusal("does not write the answer as it is")
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values()]
    places = [(behind.find(token), -len(token), token) for token in tokens if token and token in behind]
    if places:
        place, _, end = min(places)
        return AssistantTurn(opening, behind[:place], end)
    if behind.strip():
        raise _refusal(f"ends an answer with {behind.strip()!r}, which is no token of the tokenizer")
    return AssistantTurn(opening, behind, None)


def end_as_the_template(tokenizer: Any, template_args: Mapping[str, Any] | None = None) -> None:
    """Make the token that ends a turn the tokenizer's end of sequence, where responses end and generation stops."""
    if not getattr(tokenizer, "chat_template", None):
        return  # the template of the prompts says so
    end = assistant_turn(tokenizer, template_args).end
    if end is None or end == tokenizer.eos_token:
        return
    if isinstance(tokenizer.chat_template, str) and "eos_token" in tokenizer.chat_template:
        # The template means the old one where it names it, such as behind the whole chat.
        tokenizer.chat_template = f"{{%- set eos_token = {tokenizer.eos_token!r} %}}{tokenizer.chat_template}"
    tokenizer.eos_token = end


def _refusal(reason: str) -> ConfigError:
    return ConfigError(
        f"data.prompt_template: chat, but the tokenizer's chat template {reason}; use another template or tokenizer, "
        "or set its switches in data.template_args"
    )
