"""Tokenization of prompts and responses, many rows in one call of the tokenizer.

The authors tokenise prompt and response as one text, and cut after the prompt's tokens. That is right only if no token
spans the border. Here the joined text is used if its tokens begin with the prompt's tokens, so that the response has
the same pieces as in running text, also with SentencePiece. Otherwise the response is tokenised by itself. In both
cases the prompt has the same ids as at generation.

With the `alpaca` template the response begins directly after `### Response:` and a line break.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pocl_ray.data.prompts import Example
from pocl_ray.data.row_counts import RowCounts
from pocl_ray.data.special_tokens import SpecialTokensAsText
from pocl_ray.errors import ConfigError, ModelError

PreparedRow = tuple[Example, list[int], list[int]]
"""A row, the ids of its prompt, and the ids of its response."""


class RowTokenizer:
    """Tokenises prompts and responses, and cuts them to length.

    Args:
        tokenizer: Hugging Face tokenizer.
        max_prompt_tokens: Maximum tokens of a prompt. A longer prompt loses its beginning (the response marker is at
            the end), but keeps the tokens that the tokenizer adds in front.
        max_tokens: Maximum tokens of prompt and response together. A longer response loses its end, including its
            end-of-sequence token.
        adds_special_tokens: Whether the tokenizer adds tokens such as BOS in front of the prompt. It is False for chat
            templates, which contain them. A BOS that the prompt already has is not added again.
        as_text: Reads special tokens of the data as text; None: they are the tokens themselves.

    Raises:
        ModelError: The tokenizer has no end-of-sequence token, so a response could not end.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_prompt_tokens: int,
        max_tokens: int,
        adds_special_tokens: bool,
        as_text: SpecialTokensAsText | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"tokenizer {tokenizer.name_or_path}: has no end-of-sequence token; set its eos_token")
        assert max_prompt_tokens < max_tokens, "no room for a response"
        self._tokenizer = tokenizer
        self._max_prompt_tokens = max_prompt_tokens
        self._max_tokens = max_tokens
        self._front = front_tokens(tokenizer) if adds_special_tokens else []
        self._as_text = as_text
        self.counts = RowCounts()

    def rows(self, examples: Sequence[Example]) -> list[list[PreparedRow]]:
        """Return a list with the row of each example; it is empty if the response has no tokens.

        Prompts may have marks in place of the special tokens of their data; those of the returned rows have none.
        """
        prompts = [example.prompt for example in examples]
        # What a chat template wrote is marked already; the special tokens in it are the template's own.
        responses = [self._marked(e.references[0]) if e.response is None else e.response for e in examples]
        prompt_ids, response_ids = self._encode(prompts, responses)
        if self._as_text is not None:
            pairs = zip(prompts, responses, strict=True)
            self.counts.num_special += sum(any(map(self._as_text.has_marks, pair)) for pair in pairs)
            examples = [replace(e, prompt=self._as_text.plain(e.prompt)) for e in examples]
        tokenized = zip(examples, prompt_ids, response_ids, strict=True)
        return [[row] if row[2] else [] for row in tokenized]

    def encode(self, prompts: Sequence[str], responses: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
        """Return the token ids of rows.

        Args:
            prompts: Texts of the prompts.
            responses: Texts of the responses, equally many.

        Returns:
            Ids of the prompts, and ids of the responses with the end-of-sequence token (unless it was cut off). A
            response without any tokens gives an empty list.
        """
        return self._encode(prompts, [self._marked(response) for response in responses])

    def _marked(self, text: str) -> str:
        return text if self._as_text is None else self._as_text.marked(text)

    def _encode(self, prompts: Sequence[str], responses: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
        bare_prompts = self._tokenize(prompts)
        bare_responses = self._tokenize_after(prompts, bare_prompts, responses)
        prompt_ids = [self._cut_prompt(ids) for ids in bare_prompts]
        eos = [self._tokenizer.eos_token_id]
        whole = [ids + eos if ids else [] for ids in bare_responses]
        response_ids = [ids[: self._max_tokens - len(prompt)] for prompt, ids in zip(prompt_ids, whole, strict=True)]
        self.counts.add(bare_prompts, prompt_ids, whole, response_ids)
        return prompt_ids, response_ids

    def responses(self, prompts: Sequence[str], texts: Sequence[str], ended: Sequence[bool]) -> list[list[int]]:
        """Return the ids of responses; only complete responses have the end-of-sequence token."""
        eos = self._tokenizer.eos_token_id
        _, whole = self.encode(prompts, texts)
        return [
            ids if has_ended or ids[-1:] != [eos] else ids[:-1] for ids, has_ended in zip(whole, ended, strict=True)
        ]

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        if self._as_text is not None:
            return self._as_text.encode(texts)
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return encoded["input_ids"]

    def _tokenize_after(
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
    """Return the tokens that the tokenizer itself adds in front of a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = (start for start in range(len(full)) if full[start : start + len(bare)] == bare)
    return list(full[: next(starts, 0)])


class TextTokenizer:
    """Cuts plain text, which has no prompt, into rows of at most `max_tokens`.

    A row's first token is its prompt, and all others are its response, so that every position except the first is
    trained on. A long text becomes several rows. Each of them begins with the last token of the row before, so every
    token of the text except the first is a response token exactly once, and nothing is lost. The text ends with the
    end-of-sequence token. Short texts are not packed: batches hold rows of similar length anyway, and each row stays
    one text with one difficulty.

    Args:
        tokenizer: Hugging Face tokenizer. A token that it adds in front of a text, such as BOS, is the first token of
            the text.
        max_tokens: Maximum tokens of a row.

    Raises:
        ModelError: The tokenizer has no end-of-sequence token.
    """

    def __init__(self, tokenizer: Any, max_tokens: int, as_text: SpecialTokensAsText | None = None) -> None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"tokenizer {tokenizer.name_or_path}: has no end-of-sequence token; set its eos_token")
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._front = front_tokens(tokenizer)
        self._as_text = as_text
        self.counts = RowCounts()

    def rows(self, examples: Sequence[Example]) -> list[list[PreparedRow]]:
        """Return the rows of each text.

        Args:
            examples: Examples with an empty prompt, whose first reference is the text.

        Returns:
            The rows of each text: the example with the row's own text, the first token, and the other tokens.
        """
        if not examples:
            return []
        texts = [example.references[0] for example in examples]
        if self._as_text is not None:
            texts = [self._as_text.marked(text) for text in texts]
            self.counts.num_special += sum(map(self._as_text.has_marks, texts))
            ids_of = self._as_text.encode(texts)
        else:
            encoded = self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
            ids_of = encoded["input_ids"]
        return [self._cut(example, ids) for example, ids in zip(examples, ids_of, strict=True)]

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


END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = len(pre_tokenizers.ByteLevel.alphabet()) + 1
"""The number of all bytes and the special token. A smaller vocabulary could not encode every text."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + '\n=>\n' }}{% endif %}"
    "{% endfor %}"
)
"""The chat template: a turn of the assistant ends with the end-of-text token, every other turn with an arrow."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train a byte-level BPE tokenizer and save it as a directory that `AutoTokenizer` loads.

    With bytes, every text can be encoded and no token is unknown. Digits stay single, so that a small model sees the
    columns of a sum. One special token ends a text and pads a batch, as in GPT-2, since the rest of the system must
    handle that anyway.

    The same texts in the same order give the same tokenizer. If the texts have too few pairs to merge, the vocabulary
    is smaller than `vocab_size`.

    Args:
        texts: Texts from which the merges are learnt, such as prompts and answers.
        vocab_size: Maximum size of the vocabulary, including the 256 bytes and the special token.
        path: Directory to write; it is created if it is missing.

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
