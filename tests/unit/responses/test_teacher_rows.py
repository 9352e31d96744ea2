"""Training rows with the teacher's answers: what stays, what is replaced, and what is left out and said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pocl_ray.config import DataConfig, SourceConfig
from pocl_ray.data.row_store import RowStore
from pocl_ray.data.rows import prepare_rows
from pocl_ray.data.tokenization import train_tokenizer
from pocl_ray.errors import DataError
from pocl_ray.models.loading import load_tokenizer
from pocl_ray.records import RowsSummary
from pocl_ray.responses.replace import EMPTY, FOREIGN, read_responses, replace_responses, settle_rejects
from pocl_ray.responses.writing import PART_SCHEMA
from pocl_ray.run_directory.storage import RunDirectory

QUESTIONS = [f"Count to {n}." for n in range(1, 7)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, RowsSummary, Any]:
    """Six rows, of which the second of seven in the file had no prompt, and their tokenizer."""
    scratch = tmp_path_factory.mktemp("teacher_rows")
    run_dir = RunDirectory.open(str(scratch), "run")
    lines = [json.dumps({"instruction": text, "output": "one two"}) for text in QUESTIONS]
    lines.insert(1, json.dumps({"instruction": " ", "output": "x"}))
    source = SourceConfig(path=str(scratch / "rows.jsonl"))
    Path(source.path).write_text("\n".join(lines), encoding="utf-8")
    train_tokenizer([*QUESTIONS, "one two three"], 300, run_dir.local("tokenizer"))
    tokenizer = load_tokenizer(str(run_dir.local("tokenizer")))
    config = DataConfig(
        train=source,
        holdout_rows=1,
        prompt_template="plain",
        max_prompt_tokens=20,
        max_tokens=40,
        max_reject_share=0.5,
    )
    summary, rejects = prepare_rows("train", source, config, tokenizer, run_dir.local("rows/train.arrow"))
    run_dir.write_text(
        "rejects.jsonl", json.dumps({"source": "s", "row": rejects[0].row, "reason": "no prompt"}) + "\n"
    )
    return run_dir, summary, tokenizer


def answers_of(tokenizer: Any, texts: list[str], stopped: list[bool] | None = None) -> pa.Table:
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    ended = stopped or [True] * len(texts)
    return pa.table([np.arange(len(texts)), tokens, ended], schema=PART_SCHEMA)


def test_responses_and_references_are_the_teachers_and_all_else_stays(prepared: Any) -> None:
    run_dir, summary, tokenizer = prepared
    texts = [f"three {n}" for n in range(6)]
    answers = answers_of(tokenizer, texts, [True] * 5 + [False])
    made = replace_responses(summary, answers, tokenizer, run_dir, "rows.jsonl", 0.0)
    before, after = (RowStore.open(run_dir.local(rows.path)) for rows in (summary, made))
    ids = np.arange(6)
    assert (made.name, made.num_rows, made.num_rejected) == ("train", 6, 1)
    assert made.fingerprint != summary.fingerprint
    assert after.references(ids) == [[text] for text in texts]
    assert after.prompts(ids) == before.prompts(ids)
    assert after.source_rows(ids) == [1, 3, 4, 5, 6, 7]
    old_prompts, _ = before.tokens(ids)
    new_prompts, responses = after.tokens(ids)
    assert all(np.array_equal(a, b) for a, b in zip(old_prompts, new_prompts, strict=True))
    generated = answers["response_ids"].to_pylist()
    assert [r.tolist() for r in responses[:5]] == [[*ids, tokenizer.eos_token_id] for ids in generated[:5]]
    assert responses[5].tolist() == generated[5], "an answer that ran into its limit has no end"
    assert read_responses(run_dir) == made


def test_answers_without_text_are_rejected_by_row_and_ids_count_anew(prepared: Any) -> None:
    run_dir, summary, tokenizer = prepared
    answers = answers_of(tokenizer, ["one", "", "two", "  ", "three", "one two"])
    beyond = answers["response_ids"].to_pylist()
    beyond[4] = [len(tokenizer)]
    answers = answers.set_column(1, PART_SCHEMA.field(1), [pa.array(beyond, PART_SCHEMA.field(1).type)])
    made = replace_responses(summary, answers, tokenizer, run_dir, "rows.jsonl", 0.5)
    store = RowStore.open(run_dir.local(made.path))
    assert (made.num_rows, made.num_rejected) == (3, 4)
    assert store.references(np.arange(3)) == [["one"], ["two"], ["one two"]]
    assert [batch.column("id").to_pylist() for batch in store.batches] == [[0, 1, 2]]

    settle_rejects(run_dir, is_used=True)
    once = run_dir.read_text("rejects.jsonl")
    lines = [json.loads(line) for line in once.splitlines()]
    assert [(line["row"], line["reason"]) for line in lines] == [
        (2, "no prompt"),
        (3, EMPTY),
        (5, EMPTY),
        (6, FOREIGN),
    ]
    settle_rejects(run_dir, is_used=True)
    assert run_dir.read_text("rejects.jsonl") == once, "they are not added twice"
    settle_rejects(run_dir, is_used=False)
    assert len(run_dir.read_text("rejects.jsonl").splitlines()) == 1, "a run on references has none of them"


def test_more_empty_answers_than_the_limit_allows_end_the_run_by_name(prepared: Any) -> None:
    run_dir, summary, tokenizer = prepared
    answers = answers_of(tokenizer, ["one", "", "two", "", "three", "one"])
    with pytest.raises(DataError, match=r"2 of 6 rows \(33.3%\).*max_reject_share 20.0%.*row 3: the teacher's answer"):
        replace_responses(summary, answers, tokenizer, run_dir, "rows.jsonl", 0.2)
