"""The teacher's answers to a student with another tokenizer: what is handed over is the text.

The teacher's own rows keep the very tokens that it generated. The student's rows get its tokens of the decoded text,
behind the prompt that it has already. A row whose answer either of them cannot use is left out of both files, so that
ids go on naming the same row in both.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from pocl_ray.data.prepare import FOR_TEACHER, Rows
from pocl_ray.data.readers import Reject
from pocl_ray.data.row_store import RowStore
from pocl_ray.data.rows import arrow_writer, check_rejects, summarize_rows
from pocl_ray.data.tokenization import RowTokenizer
from pocl_ray.records import PROMPT, RowsSummary
from pocl_ray.responses.replace import (
    EMPTY,
    FOLDER,
    ROWS,
    Answers,
    left_out,
    read_answers,
    read_responses,
    with_answers,
    write_summary,
)
from pocl_ray.responses.writing import STOPPED
from pocl_ray.run_directory.storage import RunDirectory

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
    """Write the training rows anew, in both tokenizers, with the teacher's answers as responses and as references.

    Args:
        rows: The prepared sets, in the tokens of both.
        answers: One of each training row by id, in the teacher's tokens, as `write_answers` gives them.
        teachers: The teacher's tokenizer.
        ours: Makes the student's tokens of a prompt and a text.
        run_dir: Where the rows are, and where the new ones go.
        source: What the rows were read from, for the rejects.
        max_reject_share: `data.max_reject_share`.

    Returns:
        The new rows in the student's tokens; ids count anew where some were left out.

    Raises:
        DataError: More of the answers cannot be used than the limit allows.
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
    """Return the sets with train as the teacher answered it, in the tokens of both where these differ."""
    rows = replace(rows, train=read_responses(run_dir))
    if not rows.for_teacher:
        return rows
    theirs = RowsSummary(**run_dir.read_json(TEACHER_SUMMARY))
    return replace(rows, for_teacher={**rows.for_teacher, "train": theirs})


def own_files(rows: Rows) -> list[str]:
    """Return the files in the teacher's tokens; none where both have one tokenizer."""
    return [TEACHER_ROWS, TEACHER_SUMMARY] if rows.for_teacher else []


def _both(
    batch: pa.RecordBatch, answered: pa.Table, teachers: PreTrainedTokenizerBase, ours: RowTokenizer
) -> tuple[Answers, Answers]:
    """A batch of answers in the teacher's tokens and in the student's; the faults are those of either."""
    theirs = read_answers(answered, teachers)
    responses = ours.responses(batch.column(PROMPT).to_pylist(), theirs.texts, answered[STOPPED].to_pylist())
    faults = [fault if fault is not None or ids else EMPTY for fault, ids in zip(theirs.faults, responses, strict=True)]
    return replace(theirs, faults=faults), Answers(theirs.texts, responses, faults)
