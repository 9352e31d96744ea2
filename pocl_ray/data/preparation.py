"""The pass over a source: chunks of it become record batches of tokens, and what cannot be used is collected.

Where the teacher has another tokenizer, each chunk is read once more in its way: with its chat template, where that is
asked for, and into its tokens. Both files then hold the same rows under the same ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from pocl_ray.config.sources import DataConfig, SourceConfig
from pocl_ray.data.columns import Request
from pocl_ray.data.conversations import ConversationFitter
from pocl_ray.data.documents import DocumentFitter
from pocl_ray.data.examples import ExampleReader
from pocl_ray.data.prompts import Example, Fit, PromptTemplate
from pocl_ray.data.readers import Reject, SourceRow
from pocl_ray.data.row_store import rows_schema
from pocl_ray.data.texts import TextTokenizer
from pocl_ray.data.tokenization import PreparedRow, RowTokenizer
from pocl_ray.errors import ConfigError
from pocl_ray.records import ID, PROMPT, PROMPT_IDS, REFERENCES, RESPONSE_IDS, SOURCE_ROW, TOPIC

Outcome = list[PreparedRow] | Reject
"""What becomes of a row of the source: one row, several of a long text, or a reason."""


class Preparation:
    """Reads a source in the tokens of one tokenizer or more; the first is the run's, the second the teacher's own.

    Args:
        source: Says what its columns mean.
        config: Task, template and lengths, which hold for each tokenizer.
        tokenizers: Hugging Face tokenizers.
        numbers: Numeric columns that are carried along.

    Raises:
        ConfigError: The template does not work.
        ModelError: A tokenizer has no end-of-sequence token.

    Attributes:
        num_rows: Rows that all tokenizers can use.
        rejects: The others, in order.
    """

    def __init__(
        self, source: SourceConfig, config: DataConfig, tokenizers: Sequence[Any], numbers: Sequence[str]
    ) -> None:
        self.num_rows = 0
        self.rejects: list[Reject] = []
        self._readings = _readings(source, config, tokenizers, numbers)
        self._schema = rows_schema(numbers)

    def prepare(self, chunk: Sequence[SourceRow | Reject]) -> list[pa.RecordBatch]:
        """Return the usable rows of a chunk, one batch for each tokenizer."""
        kept: list[list[PreparedRow]] = [[] for _ in self._readings]
        for outcomes in zip(*(reading.rows(chunk) for reading in self._readings), strict=True):
            if rejects := [outcome for outcome in outcomes if isinstance(outcome, Reject)]:
                of_all = isinstance(outcomes[0], Reject)
                self.rejects.append(rejects[0] if of_all else _for_the_teacher(rejects[0]))
                continue
            for rows, outcome in zip(kept, outcomes, strict=True):
                assert not isinstance(outcome, Reject)
                rows.extend(outcome)
        first, self.num_rows = self.num_rows, self.num_rows + len(kept[0])
        return [
            self._batch(rows, first, reading.vocab_size) for rows, reading in zip(kept, self._readings, strict=True)
        ]

    def _batch(self, kept: Sequence[PreparedRow], first: int, vocab_size: int) -> pa.RecordBatch:
        columns = {
            ID: np.arange(first, first + len(kept)),
            SOURCE_ROW: [example.source_row for example, _, _ in kept],
            TOPIC: [example.topic for example, _, _ in kept],
            PROMPT: [example.prompt for example, _, _ in kept],
            REFERENCES: [example.references for example, _, _ in kept],
            PROMPT_IDS: [prompt for _, prompt, _ in kept],
            RESPONSE_IDS: [response for _, _, response in kept],
        }
        own = self._schema.names[len(columns) :]
        columns.update({name: [e.numbers[place] for e, _, _ in kept] for place, name in enumerate(own)})
        arrays = [pa.array(columns[field.name], type=field.type) for field in self._schema]
        for name in (PROMPT_IDS, RESPONSE_IDS):
            ids = arrays[self._schema.get_field_index(name)].values.to_numpy()
            assert not ids.size or (ids.min() >= 0 and ids.max() < vocab_size), "id outside the vocabulary"
        return pa.RecordBatch.from_arrays(arrays, schema=self._schema)


class _Reading:
    """What the task makes of a row of the source, and of that one tokenizer."""

    def __init__(self, reader: ExampleReader, tokenizer: RowTokenizer | TextTokenizer, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._reader = reader
        self._tokenizer = tokenizer

    def rows(self, chunk: Sequence[SourceRow | Reject]) -> list[Outcome]:
        """Return what becomes of each row of a chunk."""
        items = self._reader.read(chunk)
        tokenized = iter(self._tokenizer.rows([item for item in items if isinstance(item, Example)]))
        return [
            item
            if isinstance(item, Reject)
            else next(tokenized) or Reject(origin.source, origin.row, "the response has no tokens")
            for item, origin in zip(items, chunk, strict=True)
        ]


def _for_the_teacher(reject: Reject) -> Reject:
    return replace(reject, reason=f"for the teacher: {reject.reason}")


def _readings(
    source: SourceConfig, config: DataConfig, tokenizers: Sequence[Any], numbers: Sequence[str]
) -> list[_Reading]:
    if config.task == "text":
        (tokenizer,) = tokenizers
        reader = ExampleReader(source.columns, PromptTemplate("plain", None), numbers, config.task)
        return [_Reading(reader, TextTokenizer(tokenizer, config.max_tokens), len(tokenizer))]
    templates = [row_template(config, tokenizer, is_teachers=place > 0) for place, tokenizer in enumerate(tokenizers)]
    fit = _fit(config, tokenizers, templates)
    return [
        _Reading(
            ExampleReader(source.columns, template, numbers, config.task, fit),
            row_tokenizer(config, tokenizer),
            len(tokenizer),
        )
        for tokenizer, template in zip(tokenizers, templates, strict=True)
    ]


def row_tokenizer(config: DataConfig, tokenizer: Any) -> RowTokenizer:
    """Return what turns prompts and responses of a config into tokens."""
    is_chat = config.prompt_template == "chat"
    return RowTokenizer(tokenizer, config.max_prompt_tokens, config.max_tokens, adds_special_tokens=not is_chat)


def row_template(config: DataConfig, tokenizer: Any, is_teachers: bool = False) -> PromptTemplate:
    """Return the template that makes the prompts of one model.

    Raises:
        ConfigError: It does not work; of the teacher's tokenizer the message says that it is this one's.
    """
    try:
        return PromptTemplate(config.prompt_template, tokenizer)
    except ConfigError as error:
        if not is_teachers:
            raise
        raise ConfigError(f"for the teacher: {error}") from None


def _fit(config: DataConfig, tokenizers: Sequence[Any], templates: Sequence[PromptTemplate]) -> Fit | None:
    """What shortens documents and chats until every model has room for them: all of them read the same text."""
    kind: type[DocumentFitter] | type[ConversationFitter]
    if config.task == "summarization":
        kind = DocumentFitter
    elif templates[0].is_chat:
        kind = ConversationFitter
    else:
        return None
    fitters = [
        kind(tokenizer, template, config.max_prompt_tokens)
        for tokenizer, template in zip(tokenizers, templates, strict=True)
    ]

    def fit(request: Request) -> Request:
        for fitter in fitters:
            request = fitter.fit(request)
        return request

    return fit
