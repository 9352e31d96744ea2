"""Training rows with the teacher's answers in place of their own responses.

The new rows train on the very tokens that the teacher generated, and not on its text tokenised again. An answer that
came to an end is closed by the end-of-sequence token, one that ran into its limit is not, as with references that are
cut. One without text teaches nothing: its row is left out and goes to the rejects.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from pocl_ray.data.preparing import REJECTS
from pocl_ray.data.readers import Reject
from pocl_ray.data.row_store import ROWS_SCHEMA, RowStore
from pocl_ray.data.rows import arrow_writer, check_rejects, summarize_rows
from pocl_ray.records import ID, REFERENCES, RESPONSE_IDS, SOURCE_ROW, RowsSummary
from pocl_ray.responses.writing import STOPPED
from pocl_ray.storage import RunDirectory

FOLDER = "responses"
ROWS, SUMMARY = f"{FOLDER}/train.arrow", f"{FOLDER}/summary.json"
OWN_REJECTS = f"{FOLDER}/{REJECTS}"
EMPTY = "the teacher's answer is empty"
FOREIGN = "the teacher's answer holds an id that is no token"


def replace_responses(
    rows: RowsSummary,
    answers: pa.Table,
    tokenizer: PreTrainedTokenizerBase,
    run_dir: RunDirectory,
    source: str,
    max_reject_share: float,
) -> RowsSummary:
    """Write the training rows anew, with the teacher's answers as responses and as references.

    Args:
        rows: The prepared training rows.
        answers: One of each row by id, as `write_answers` gives them.
        tokenizer: The run's.
        run_dir: Where the rows are, and where the new ones go.
        source: What the rows were read from, for the rejects.
        max_reject_share: `data.max_reject_share`.

    Returns:
        The new rows; ids count anew where some were left out.

    Raises:
        DataError: More of the answers cannot be used than the limit allows.
    """
    store = RowStore.open(run_dir.local(rows.path))
    rejects: list[Reject] = []
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "train.arrow"
        first, next_id = 0, 0
        with arrow_writer(path, store.schema) as writer:
            for batch in store.batches:
                answered = answers.slice(first, batch.num_rows).combine_chunks()
                first += batch.num_rows
                made, left_out = _answered(batch, answered, tokenizer, next_id)
                next_id += made.num_rows
                rejects += [Reject(source, number, reason) for number, reason in left_out]
                if made.num_rows:
                    writer.write_batch(made)
        check_rejects(source, next_id, rejects, max_reject_share)
        made_rows = replace(summarize_rows("train", path, rows.num_rejected + len(rejects)), path=ROWS)
        run_dir.publish(path, ROWS)
    run_dir.write_text(OWN_REJECTS, _lines(rejects))
    run_dir.write_json(SUMMARY, asdict(made_rows))
    return made_rows


def read_responses(run_dir: RunDirectory) -> RowsSummary:
    """Return the rows that `replace_responses` wrote."""
    return RowsSummary(**run_dir.read_json(SUMMARY))


def settle_rejects(run_dir: RunDirectory, is_used: bool) -> None:
    """See that rejects.jsonl, which the row step writes, holds those of the teacher's answers where these are used.

    Args:
        run_dir: The run directory.
        is_used: Whether they are; an earlier config of the run may have used them.
    """
    if not run_dir.exists(OWN_REJECTS):
        return
    before = run_dir.read_text(REJECTS)
    lines = [line for line in before.splitlines(keepends=True) if json.loads(line)["reason"] not in (EMPTY, FOREIGN)]
    now = "".join(lines) + (run_dir.read_text(OWN_REJECTS) if is_used else "")
    if now != before:
        run_dir.write_text(REJECTS, now)


def _answered(
    batch: pa.RecordBatch, answers: pa.Table, tokenizer: PreTrainedTokenizerBase, first_id: int
) -> tuple[pa.RecordBatch, list[tuple[int, str]]]:
    """A batch of rows with new responses, and of those left out the source row and the reason."""
    tokens = answers[RESPONSE_IDS].to_pylist()
    # The padding of a vocabulary can be drawn from a model that was hardly trained, and is no token of anything.
    foreign = [max(ids, default=0) >= len(tokenizer) for ids in tokens]
    known = [[] if is_foreign else ids for ids, is_foreign in zip(tokens, foreign, strict=True)]
    texts = tokenizer.batch_decode(known, skip_special_tokens=True)
    kept = np.array([bool(text.strip()) for text in texts], dtype=bool)
    end = [tokenizer.eos_token_id]
    responses = [ids + end if ended else ids for ids, ended in zip(tokens, answers[STOPPED].to_pylist(), strict=True)]
    columns = {
        REFERENCES: pa.array([[text] for text in texts], ROWS_SCHEMA.field(REFERENCES).type),
        RESPONSE_IDS: pa.array(responses, ROWS_SCHEMA.field(RESPONSE_IDS).type),
    }
    for name, values in columns.items():
        batch = batch.set_column(batch.schema.get_field_index(name), ROWS_SCHEMA.field(name), values)
    left_out = [
        (row, FOREIGN if foreign[place] else EMPTY)
        for place, row in enumerate(batch.column(SOURCE_ROW).to_pylist())
        if not kept[place]
    ]
    made = batch.filter(pa.array(kept))
    ids = pa.array(np.arange(first_id, first_id + made.num_rows), pa.int64())
    return made.set_column(0, ROWS_SCHEMA.field(ID), ids), left_out


def _lines(rejects: list[Reject]) -> str:
    return "".join(json.dumps(asdict(reject), ensure_ascii=False) + "\n" for reject in rejects)
