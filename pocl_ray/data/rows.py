"""Preparation of one set: one streaming pass from a source to the Arrow file of rows; unusable rows become rejects.

`rows/<set>.arrow` holds text and token ids of every usable row. Its bytes depend only on the source, the data config
and the tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pocl_ray.config.sources import DataConfig, SourceConfig
from pocl_ray.data.columns import Request, wanted_columns
from pocl_ray.data.documents import ConversationFitter, DocumentFitter
from pocl_ray.data.prompts import CHUNK_ROWS, Example, ExampleReader, Fit, PromptTemplate
from pocl_ray.data.readers import Reject, SourceRow
from pocl_ray.data.row_counts import RowCounts
from pocl_ray.data.row_store import ROWS_SCHEMA, RowStore, rows_schema
from pocl_ray.data.sources import default_split, read_source
from pocl_ray.data.special_tokens import SpecialTokensAsText
from pocl_ray.data.tokenization import PreparedRow, RowTokenizer, TextTokenizer
from pocl_ray.errors import ConfigError, DataError
from pocl_ray.records import ID, PROMPT, PROMPT_IDS, REFERENCES, RESPONSE_IDS, SOURCE_ROW, TOPIC, RowsSummary
from pocl_ray.run_directory.digests import file_digest
from pocl_ray.run_directory.storage import replacing

Outcome = list[PreparedRow] | Reject
"""The outcome of a row of the source: one row, several rows of a long text, or a reject."""


class Preparation:
    """Reads a source in the tokens of one or two tokenizers: the run's, and the teacher's if it has its own.

    With two, each chunk is read twice: for the teacher with its chat template, if that is chosen, and in its tokens.
    Both files then hold the same rows under the same ids.

    Args:
        source: Source with the meaning of its columns.
        config: Task, template and lengths, which apply to each tokenizer.
        tokenizers: Hugging Face tokenizers.
        numbers: Numeric columns that serve as difficulty signals.

    Raises:
        ConfigError: The template does not work.
        ModelError: A tokenizer has no end-of-sequence token.

    Attributes:
        num_rows: Number of rows that all tokenizers can use.
        rejects: Other rows, in order.
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

    @property
    def counts(self) -> RowCounts:
        """Counts of the run's own tokenizer."""
        return self._readings[0].counts

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
    """The reader of rows for one tokenizer: from rows of the source to rows of tokens."""

    def __init__(self, reader: ExampleReader, tokenizer: RowTokenizer | TextTokenizer, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._reader = reader
        self._tokenizer = tokenizer

    @property
    def counts(self) -> RowCounts:
        """Counts of the tokenizer."""
        return self._tokenizer.counts

    def rows(self, chunk: Sequence[SourceRow | Reject]) -> list[Outcome]:
        """Return the outcome of each row of a chunk."""
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
        as_text = special_tokens_of(config, tokenizer)
        return [_Reading(reader, TextTokenizer(tokenizer, config.max_tokens, as_text), len(tokenizer))]
    templates = [row_template(config, tokenizer, is_teachers=place > 0) for place, tokenizer in enumerate(tokenizers)]
    own = row_tokenizer(config, tokenizers[0])
    fits = [_fit(config, tokenizers, templates, counts) for counts in (own.counts, RowCounts())]
    found: list[_Reading] = []
    for tokenizer, template, fit in zip(tokenizers, templates, fits, strict=False):
        as_text = special_tokens_of(config, tokenizer)
        mark = None if as_text is None else as_text.marked_request
        reader = ExampleReader(source.columns, template, numbers, config.task, fit, mark)
        found.append(_Reading(reader, own if not found else row_tokenizer(config, tokenizer), len(tokenizer)))
    return found


def special_tokens_of(config: DataConfig, tokenizer: Any) -> SpecialTokensAsText | None:
    """Return the reader of special tokens of the data as text; None where they are the tokens themselves."""
    return SpecialTokensAsText(tokenizer) if config.special_tokens == "text" else None


def row_tokenizer(config: DataConfig, tokenizer: Any) -> RowTokenizer:
    """Return the object that turns a config's prompts and responses into tokens."""
    return RowTokenizer(
        tokenizer,
        config.max_prompt_tokens,
        config.max_tokens,
        adds_special_tokens=config.prompt_template != "chat",
        as_text=special_tokens_of(config, tokenizer),
    )


def row_template(config: DataConfig, tokenizer: Any, is_teachers: bool = False) -> PromptTemplate:
    """Return the template of one model's prompts.

    Raises:
        ConfigError: The template does not work; the message says if that is for the teacher's tokenizer.
    """
    try:
        return PromptTemplate(config.prompt_template, tokenizer, config.template_args)
    except ConfigError as error:
        if not is_teachers:
            raise
        raise ConfigError(f"for the teacher: {error}") from None


def _fit(
    config: DataConfig, tokenizers: Sequence[Any], templates: Sequence[PromptTemplate], counts: RowCounts
) -> Fit | None:
    """The function that shortens documents and chats until they fit all models, which read the same text."""
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
        before = request
        for fitter in fitters:
            request = fitter.fit(request)
        if request is not before:
            counts.num_cut_prompts += 1
            whole, left = (
                len(tokenizers[0](templates[0].render(one), add_special_tokens=False, verbose=False)["input_ids"])
                for one in (before, request)
            )
            counts.num_lost_tokens += whole - left
        return request

    return fit


_NUM_REASONS_SHOWN = 3


@dataclass(frozen=True)
class TeacherTokens:
    """The teacher's own tokenizer, and the place of the rows in its tokens."""

    tokenizer: Any
    destination: Path


def prepare_rows(
    name: str,
    source: SourceConfig,
    config: DataConfig,
    tokenizer: Any,
    destination: Path,
    numbers: Sequence[str] = (),
    teacher: TeacherTokens | None = None,
) -> tuple[RowsSummary, list[Reject]]:
    """Prepare the rows of one set: read them, apply the template, and tokenise them.

    Args:
        name: Name of the set: `train`, `dev`, or the name of a test set.
        source: Source of the rows.
        config: Template, lengths, and the maximum share of unusable rows.
        tokenizer: Hugging Face tokenizer.
        destination: Local Arrow file to write; it appears complete or not at all.
        numbers: Numeric columns of the source that serve as difficulty signals.
        teacher: Tokenizer of the teacher if it has its own, and the Arrow file of the same rows in its tokens. A row
            that only one of the two can use is left out of both.

    Returns:
        The summary of the set, and the rejected rows in order.

    Raises:
        DataError: The source is missing, empty or lacks a column, too many rows cannot be used, or none can.
        ConfigError: The template does not work.
        ModelError: The tokenizer has no end-of-sequence token.
    """
    schema = rows_schema(numbers)
    tokenizers = [tokenizer, *([] if teacher is None else [teacher.tokenizer])]
    preparation = Preparation(source, config, tokenizers, numbers)
    with named_errors(name), ExitStack() as stack:
        files = [destination, *([] if teacher is None else [teacher.destination])]
        writers = [stack.enter_context(arrow_writer(file, schema)) for file in files]
        stream = read_source(source, default_split(name), wanted_columns(source.columns, config.task, numbers))
        while chunk := list(islice(stream, CHUNK_ROWS)):
            for writer, batch in zip(writers, preparation.prepare(chunk), strict=True):
                if batch.num_rows:
                    writer.write_batch(batch)
        check_rejects(source.path, preparation.num_rows, preparation.rejects, config.max_reject_share)
    summary = summarize_rows(name, destination, len(preparation.rejects))
    return replace(summary, **asdict(preparation.counts)), preparation.rejects


def summarize_rows(name: str, path: Path, num_rejected: int) -> RowsSummary:
    """Return the figures of a file of prepared rows.

    Args:
        name: Name of the set: `train`, `dev`, or the name of a test set.
        path: Arrow file of the rows.
        num_rejected: Number of rows of the source that were left out.
    """
    store = RowStore.open(path)
    return RowsSummary(
        name=name,
        path=f"rows/{name}.arrow",
        num_rows=len(store),
        num_rejected=num_rejected,
        num_prompt_tokens=int(store.prompt_lengths.sum(dtype=np.int64)),
        num_response_tokens=int(store.response_lengths.sum(dtype=np.int64)),
        max_response_tokens=int(store.response_lengths.max()),
        fingerprint=file_digest(path),
    )


def hold_out(
    rows: Path, num_rows: int, seed: int, train: Path, dev: Path, num_rejected: int = 0
) -> tuple[RowsSummary, RowsSummary]:
    """Move rows of the training set to a dev set; both keep the order of the file and are numbered again.

    Args:
        rows: Prepared rows of `data.train`.
        num_rows: Value of `data.holdout_rows`. If texts have several rows, complete texts are taken until there are as
            many rows.
        seed: Seed of the draw.
        train: File for the rows that stay; it may be `rows` itself.
        dev: File for the rows that are moved.
        num_rejected: Number of rows of the source that were left out, for the summary of train.

    Returns:
        The summaries of train and dev.

    Raises:
        DataError: No row would be left to train on.
    """
    assert num_rows > 0, "the config asks for a dev set"
    store = RowStore.open(rows)
    if num_rows >= len(store):
        raise DataError(
            f"data.holdout_rows {num_rows} leaves nothing to train on: data.train has {len(store)} usable rows; "
            "set it lower, or give data.dev"
        )
    taken = _draw(store, num_rows, seed)
    _write_selected(store, taken, dev)
    _write_selected(store, ~taken, train)
    return summarize_rows("train", train, num_rejected), summarize_rows("dev", dev, 0)


def _draw(store: RowStore, num_rows: int, seed: int) -> np.ndarray:
    """The mask of held-out rows, shape (rows,); the rows of one text stay together."""
    source_rows = np.concatenate([batch.column(SOURCE_ROW).to_numpy() for batch in store.batches])
    text_of_row = np.cumsum(np.diff(source_rows, prepend=-1) != 0) - 1
    sizes = np.bincount(text_of_row)
    rng = np.random.default_rng(seed)
    if len(sizes) == len(store):
        taken = np.zeros(len(store), dtype=bool)
        taken[rng.choice(len(store), size=num_rows, replace=False)] = True
        return taken
    order = rng.permutation(len(sizes))
    num_texts = int(np.searchsorted(np.cumsum(sizes[order]), num_rows)) + 1
    if num_texts >= len(sizes):
        raise DataError(
            f"data.holdout_rows {num_rows} takes {num_texts} of {len(sizes)} texts of data.train and leaves nothing to "
            "train on; set it lower, or give data.dev"
        )
    return np.isin(text_of_row, order[:num_texts])


def write_rejects(rejects: Iterable[Reject], path: Path) -> None:
    """Write rejects.jsonl with one `{"source", "row", "reason"}` in each line."""
    lines = (json.dumps(asdict(reject), ensure_ascii=False) + "\n" for reject in rejects)
    path.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")


def check_rejects(path: str, num_rows: int, rejects: Sequence[Reject], max_share: float) -> None:
    """Check the number of rejected rows against the limit.

    Args:
        path: Source of the rows.
        num_rows: Number of usable rows.
        rejects: Rejected rows.
        max_share: Maximum share of rejects in all rows.

    Raises:
        DataError: There are more rejects, or no row is left.
    """
    total = num_rows + len(rejects)
    if num_rows and len(rejects) <= max_share * total:
        return
    shown = "; ".join(f"row {r.row}: {r.reason}" for r in rejects[:_NUM_REASONS_SHOWN])
    more = " ..." if len(rejects) > _NUM_REASONS_SHOWN else ""
    limit = f"more than data.max_reject_share {max_share:.1%}" if num_rows else "so none is left"
    raise DataError(
        f"{path}: {len(rejects)} of {total} rows ({len(rejects) / total:.1%}) cannot be used, {limit}; "
        f"the first: {shown}{more}"
    )


def _write_selected(store: RowStore, selected: np.ndarray, path: Path) -> None:
    """Write the selected rows with new ids, one record batch at a time."""
    position, next_id = 0, 0
    with arrow_writer(path, store.schema) as writer:
        for batch in store.batches:
            part = batch.filter(pa.array(selected[position : position + batch.num_rows]))
            position += batch.num_rows
            if part.num_rows:
                writer.write_batch(part.set_column(0, ROWS_SCHEMA.field(ID), _new_ids(next_id, part.num_rows)))
                next_id += part.num_rows


def _new_ids(first: int, count: int) -> pa.Array:
    return pa.array(np.arange(first, first + count), type=pa.int64())


@contextmanager
def arrow_writer(path: Path, schema: pa.Schema) -> Iterator[pa.ipc.RecordBatchFileWriter]:
    """Yield a writer of a local Arrow file, which appears complete or not at all."""
    for left_behind in path.parent.glob(f".{path.name}.*.tmp"):  # by a killed run; it may be as large as the rows
        left_behind.unlink(missing_ok=True)
    with replacing(path) as new, pa.OSFile(str(new), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        yield writer


@contextmanager
def named_errors(name: str) -> Iterator[None]:
    """Add the name of the config's set to an error of its source."""
    try:
        yield
    except DataError as error:
        place = f"data.{name}" if name in ("train", "dev") else f"data.tests.{name}"
        raise DataError(f"{place}: {error}") from None
