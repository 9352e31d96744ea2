"""Training rows in which the teacher's answers replace the responses.

The new rows hold the exact tokens that the teacher generated, and not its text tokenised again. An answer that is
complete ends with the end-of-sequence token. An answer that reached the limit does not, like a reference that is cut. A
row whose answer has no text is left out and goes to the rejects.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from pocl_ray.data.prepare import FOR_TEACHER, REJECTS, Rows
from pocl_ray.data.readers import Reject
from pocl_ray.data.row_store import ROWS_SCHEMA, RowStore
from pocl_ray.data.rows import arrow_writer, check_rejects, summarize_rows
from pocl_ray.data.tokenization import RowTokenizer
from pocl_ray.records import ID, PROMPT, REFERENCES, RESPONSE_IDS, SOURCE_ROW, RowsSummary
from pocl_ray.responses.writing import STOPPED
from pocl_ray.run_directory.storage import RunDirectory

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
    """Write new training rows, with the teacher's answers as responses and as references.

    Args:
        rows: Prepared training rows.
        answers: One answer for each row by id, as `write_answers` returns them.
        tokenizer: Tokenizer of the run.
        run_dir: Run directory of the old and the new rows.
        source: Source that the rows were read from, for the rejects.
        max_reject_share: Value of `data.max_reject_share`.

    Returns:
        The new rows. They are numbered again if some were left out.

    Raises:
        DataError: The share of answers that cannot be used is above the limit.
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
                read = read_answers(answered, tokenizer)
                made = with_answers(batch, read, next_id)
                next_id += made.num_rows
                rejects += left_out(batch, read, source)
                if made.num_rows:
                    writer.write_batch(made)
        check_rejects(source, next_id, rejects, max_reject_share)
        made_rows = replace(summarize_rows("train", path, rows.num_rejected + len(rejects)), path=ROWS)
        run_dir.publish(path, ROWS)
    write_summary(made_rows, rejects, run_dir)
    return made_rows


def write_summary(rows: RowsSummary, rejects: list[Reject], run_dir: RunDirectory) -> None:
    """Write the summary of the new training rows, and the rejected answers."""
    run_dir.write_text(OWN_REJECTS, _lines(rejects))
    run_dir.write_json(SUMMARY, asdict(rows))


def read_responses(run_dir: RunDirectory) -> RowsSummary:
    """Return the rows that `replace_responses` wrote."""
    return RowsSummary(**run_dir.read_json(SUMMARY))


def settle_rejects(run_dir: RunDirectory, is_used: bool) -> None:
    """Add the rejected teacher's answers to rejects.jsonl, which the row step writes, or remove them from it.

    Args:
        run_dir: The run directory.
        is_used: Whether the run uses the teacher's answers; an earlier config of the run may have used them.
    """
    if not run_dir.exists(OWN_REJECTS):
        return
    before = run_dir.read_text(REJECTS)
    lines = [line for line in before.splitlines(keepends=True) if json.loads(line)["reason"] not in (EMPTY, FOREIGN)]
    now = "".join(lines) + (run_dir.read_text(OWN_REJECTS) if is_used else "")
    if now != before:
        run_dir.write_text(REJECTS, now)


@dataclass(frozen=True)
class Answers:
    """A batch of answers: the text of each, its tokens as a response, and the reason why it cannot be used, or None."""

    texts: list[str]
    responses: list[list[int]]
    faults: list[str | None]


def read_answers(answers: pa.Table, tokenizer: PreTrainedTokenizerBase) -> Answers:
    """Return a batch of answers, decoded by the tokenizer that they were written with."""
    tokens = answers[RESPONSE_IDS].to_pylist()
    # A model that was hardly trained can sample ids of the vocabulary's padding, which are not tokens.
    foreign = [max(ids, default=0) >= len(tokenizer) for ids in tokens]
    known = [[] if is_foreign else ids for ids, is_foreign in zip(tokens, foreign, strict=True)]
    texts = tokenizer.batch_decode(known, skip_special_tokens=True)
    end = [tokenizer.eos_token_id]
    responses = [ids + end if ended else ids for ids, ended in zip(tokens, answers[STOPPED].to_pylist(), strict=True)]
    faults = [
        FOREIGN if is_foreign else None if text.strip() else EMPTY
        for text, is_foreign in zip(texts, foreign, strict=True)
    ]
    return Answers(texts, responses, faults)


def with_answers(batch: pa.RecordBatch, answers: Answers, first_id: int) -> pa.RecordBatch:
    """Return the rows of a batch whose answers can be used, with the answers as responses, and with new ids."""
    columns = {
        REFERENCES: pa.array([[text] for text in answers.texts], ROWS_SCHEMA.field(REFERENCES).type),
        RESPONSE_IDS: pa.array(answers.responses, ROWS_SCHEMA.field(RESPONSE_IDS).type),
    }
    for name, values in columns.items():
        batch = batch.set_column(batch.schema.get_field_index(name), ROWS_SCHEMA.field(name), values)
    made = batch.filter(pa.array([fault is None for fault in answers.faults], pa.bool_()))
    ids = pa.array(np.arange(first_id, first_id + made.num_rows), pa.int64())
    return made.set_column(0, ROWS_SCHEMA.field(ID), ids)


def left_out(batch: pa.RecordBatch, answers: Answers, source: str) -> list[Reject]:
    """Return the rows of a batch whose answers cannot be used."""
    faults = zip(batch.column(SOURCE_ROW).to_pylist(), answers.faults, strict=True)
    return [Reject(source, row, fault) for row, fault in faults if fault is not None]


def _lines(rejects: list[Reject]) -> str:
    return "".join(json.dumps(asdict(reject), ensure_ascii=False) + "\n" for reject in rejects)


TEACHER_ROWS, TEACHER_SUMMARY = f"{FOLDER}/{FOR_TEACHER}/train.arrow", f"{FOLDER}/{FOR_TEACHER}/summary.json"


def hand_over_responses(
    rows: Rows,
    answers: pa.Table,
    teachers: PreTrainedTokenizerBase,
    ours: RowTokenizer,
    run_dir: RunDirectory,
    source: str,
    max_reject_share: float,
) -> RowsSummary:
    """Write new training rows in both tokenizers, with the teacher's answers as responses and as references.

    The teacher's rows keep the exact tokens that it generated. The student's rows get the student's tokens of the
    decoded text, after their own prompt. A row is left out of both files if either model cannot use its answer, so that
    an id names the same row in both files.

    Args:
        rows: Prepared sets, in the tokens of both.
        answers: One answer for each training row by id, in the teacher's tokens, as `write_answers` returns them.
        teachers: Tokenizer of the teacher.
        ours: Tokenizes a prompt and a text for the student.
        run_dir: Run directory of the old and the new rows.
        source: Source that the rows were read from, for the rejects.
        max_reject_share: Value of `data.max_reject_share`.

    Returns:
        The new rows in the student's tokens. They are numbered again if some were left out.

    Raises:
        DataError: The share of answers that cannot be used is above the limit.
    """
    stores = [RowStore.open(run_dir.local(made.path)) for made in (rows.train, rows.for_teacher["train"])]
    rejects: list[Reject] = []
    first, next_id = 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        paths = [Path(scratch) / name for name in ("ours.arrow", "theirs.arrow")]
        with (
            arrow_writer(paths[0], stores[0].schema) as our_file,
            arrow_writer(paths[1], stores[1].schema) as their_file,
        ):
            for our_batch, their_batch in zip(*(store.batches for store in stores), strict=True):
                answered = answers.slice(first, our_batch.num_rows).combine_chunks()
                first += our_batch.num_rows
                theirs, read = _both(our_batch, answered, teachers, ours)
                made = [with_answers(our_batch, read, next_id), with_answers(their_batch, theirs, next_id)]
                rejects += left_out(our_batch, read, source)
                next_id += made[0].num_rows
                if made[0].num_rows:
                    our_file.write_batch(made[0])
                    their_file.write_batch(made[1])
        check_rejects(source, next_id, rejects, max_reject_share)
        num_rejected = rows.train.num_rejected + len(rejects)
        summaries = [
            replace(summarize_rows("train", path, num_rejected), path=rel)
            for path, rel in zip(paths, (ROWS, TEACHER_ROWS), strict=True)
        ]
        for path, summary in zip(paths, summaries, strict=True):
            run_dir.publish(path, summary.path)
    run_dir.write_json(TEACHER_SUMMARY, asdict(summaries[1]))
    write_summary(summaries[0], rejects, run_dir)
    return summaries[0]


def with_responses(rows: Rows, run_dir: RunDirectory) -> Rows:
    """Return the sets with the teacher's answers in train, in both models' tokens if these differ."""
    rows = replace(rows, train=read_responses(run_dir))
    if not rows.for_teacher:
        return rows
    theirs = RowsSummary(**run_dir.read_json(TEACHER_SUMMARY))
    return replace(rows, for_teacher={**rows.for_teacher, "train": theirs})


def own_files(rows: Rows) -> list[str]:
    """Return the files in the teacher's tokens; empty if both models share a tokenizer."""
    return [TEACHER_ROWS, TEACHER_SUMMARY] if rows.for_teacher else []


def _both(
    batch: pa.RecordBatch, answered: pa.Table, teachers: PreTrainedTokenizerBase, ours: RowTokenizer
) -> tuple[Answers, Answers]:
    """A batch of answers in the teacher's tokens and in the student's; an answer has the faults of both."""
    theirs = read_answers(answered, teachers)
    responses = ours.responses(batch.column(PROMPT).to_pylist(), theirs.texts, answered[STOPPED].to_pylist())
    faults = [fault if fault is not None or ids else EMPTY for fault, ids in zip(theirs.faults, responses, strict=True)]
    return replace(theirs, faults=faults), Answers(theirs.texts, responses, faults)
