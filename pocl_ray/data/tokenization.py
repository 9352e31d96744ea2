"""From prompt and response to token ids, many rows in one call of the tokenizer.

The authors tokenise prompt and response as one text and cut behind the prompt's tokens, which is right only while no
token spans the border. Here the joined text is used where its tokens begin with the prompt's own (so the response gets
the pieces that it has in running text, also with SentencePiece), and otherwise the response is tokenised by itself.
Either way the prompt's ids are those that a model is given at generation.

With the `alpaca` template the response begins right behind `### Response:` and a line break.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pocl_ray.data.prompts import Example
from pocl_ray.errors import ConfigError, ModelError

PreparedRow = tuple[Example, list[int], list[int]]
"""A row, the ids of its prompt, and those of its response."""


class RowTokenizer:
    """Tokenises prompts and responses, and cuts them to length.

    Args:
        tokenizer: A Hugging Face tokenizer.
        max_prompt_tokens: Longer prompts lose their beginning (the response marker stands at the end), save for the
            tokens that the tokenizer puts in front.
        max_tokens: Prompt and response together; a longer response loses its end, its end-of-sequence token with it.
        adds_special_tokens: Whether the tokenizer puts its tokens, such as BOS, in front of the prompt. False for chat
            templates, which write them out. A BOS that the prompt has already is not doubled.

    Raises:
        ModelError: The tokenizer has no end-of-sequence token, so a response could not end.
    """

    def __init__(self, tokenizer: Any, max_prompt_tokens: int, max_tokens: int, adds_special_tokens: bool) -> None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"tokenizer {tokenizer.name_or_path}: has no end-of-sequence token; set its eos_token")
        assert max_prompt_tokens < max_tokens, "no room for a response"
        self._tokenizer = tokenizer
        self._max_prompt_tokens = max_prompt_tokens
        self._max_tokens = max_tokens
        self._front = front_tokens(tokenizer) if adds_special_tokens else []

    def rows(self, examples: Sequence[Example]) -> list[list[PreparedRow]]:
        """Return the one row of each example, or none where the response has no tokens."""
        prompt_ids, response_ids = self.encode(
            [example.prompt for example in examples], [example.references[0] for example in examples]
        )
        tokenized = zip(examples, prompt_ids, response_ids, strict=True)
        return [[row] if row[2] else [] for row in tokenized]

    def encode(self, prompts: Sequence[str], responses: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
        """Tokenise rows.

        Args:
            prompts: Texts of prompts.
            responses: Texts of responses, as many.

        Returns:
            Ids of the prompts, and of the responses with the end-of-sequence token (unless that was cut off); a
            response without any token of its own gives an empty list.
        """
        bare_prompts = self._tokenize(prompts)
        bare_responses = self._tokenize_behind(prompts, bare_prompts, responses)
        prompt_ids = [self._cut_prompt(ids) for ids in bare_prompts]
        eos = [self._tokenizer.eos_token_id]
        response_ids = [
            (ids + eos)[: self._max_tokens - len(prompt)] if ids else []
            for prompt, ids in zip(prompt_ids, bare_responses, strict=True)
        ]
        return prompt_ids, response_ids

    def responses(self, prompts: Sequence[str], texts: Sequence[str], ended: Sequence[bool]) -> list[list[int]]:
        """Return the ids of responses; the end-of-sequence token stands behind those alone that came to an end."""
        eos = self._tokenizer.eos_token_id
        _, whole = self.encode(prompts, texts)
        return [
            ids if has_ended or ids[-1:] != [eos] else ids[:-1] for ids, has_ended in zip(whole, ended, strict=True)
        ]

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return encoded["input_ids"]

    def _tokenize_behind(
        self, prompts: Sequence[str], prompt_ids: list[list[int]], responses: Sequence[str]
    ) -> list[list[int]]:
        joined = self._tokenize([prompt + response for prompt, response in zip(prompts, responses, strict=True)])
        found: list[list[int] | None] = [
            ids[len(prompt) :] if ids[: len(prompt)] == prompt else None
            for prompt, ids in zip(prompt_ids, joined, strict=True)
        ]
        alone = iter(self._tokenize([text for text, ids in zip(responses, found, strict=True) if ids is None]))
        return [next(alone) if ids is None else ids for ids in found]

    def _cut_prompt(self, ids: list[int]) -> list[int]:
        bos = self._tokenizer.bos_token_id
        has_bos = bos is not None and ids[:1] == [bos]
        front, body = (ids[:1], ids[1:]) if has_bos else (self._front, ids)
        room = max(0, self._max_prompt_tokens - len(front))
        return front + body[max(0, len(body) - room) :]


def front_tokens(tokenizer: Any) -> list[int]:
    """Return the tokens that the tokenizer puts in front of a text by itself."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = (start for start in range(len(full)) if full[start : start + len(bare)] == bare)
    return list(full[: next(starts, 0)])


# Plain text without a prompt, for the distillation of language modelling: texts cut into rows of at most `max_tokens`.
#
# A row's first token is its prompt, all others are its response, so that every position but the first is trained on.
# A long text becomes several rows, each of which begins with the last token of the one before: every token of the
# text but the first is a response token exactly once, and nothing is lost. The text ends with the end-of-sequence
# token. Short texts are not packed: batches are made of rows of similar length anyway, and a row stays one text of
# one difficulty.


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


# A tokenizer of one's own for models that are trained from nothing: byte-level BPE with single digits.
#
# Byte-level, so every text can be written and none is unknown. Digits stay single, so that a small model sees the
# columns of a sum. One special token both ends a text and pads a batch, as in GPT-2: the rest of the system has to
# live with that anyway.

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = len(pre_tokenizers.ByteLevel.alphabet()) + 1
"""Every byte and the special token: with fewer, some text could not be written."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + '\n=>\n' }}{% endif %}"
    "{% endfor %}"
)
"""A turn of anyone but the assistant ends in an arrow, an answer in the end-of-text token."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train a byte-level BPE tokenizer and save it as a directory that `AutoTokenizer` loads.

    The same texts in the same order give the same tokenizer. A few texts may hold fewer pairs worth merging than
    `vocab_size` has room for; the vocabulary is smaller then.

    Args:
        texts: what to learn the merges from, such as prompts and answers.
        vocab_size: entries of the vocabulary at most, the 256 bytes and the special token included.
        path: the directory to write, made where it is missing.

    Raises:
        ConfigError: `vocab_size` has no room for every byte and the special token.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(f"vocab_size {vocab_size} is too small: byte-level BPE needs {SMALLEST_VOCABULARY} or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)
    wrapped.clean_up_tokenization_spaces = False
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(path)
