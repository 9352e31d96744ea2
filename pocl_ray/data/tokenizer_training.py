"""A tokenizer of one's own for models that are trained from nothing: byte-level BPE with single digits.

Byte-level, so every text can be written and none is unknown. Digits stay single, so that a small model sees the columns
of a sum. One special token both ends a text and pads a batch, as in GPT-2: the rest of the system has to live with that
anyway.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pocl_ray.errors import ConfigError

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
