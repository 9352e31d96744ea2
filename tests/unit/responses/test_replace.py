"""The teacher's answers as text: each model's rows in its own tokens, and the same rows in both files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pocl_ray.config import DataConfig, SourceConfig
from pocl_ray.data.prepare import Rows, prepare_all
from pocl_ray.data.row_store import RowStore
from pocl_ray.data.rows import row_tokenizer
from pocl_ray.data.tokenization import train_tokenizer
from pocl_ray.errors import DataError
from pocl_ray.models.loading import load_tokenizer
from pocl_ray.responses.replace import EMPTY, FOREIGN, hand_over_responses, own_files, with_responses
from pocl_ray.responses.writing import PART_SCHEMA
from pocl_ray.run_directory.storage import RunDirectory

QUESTIONS = [f"Count to {n}." for n in range(1, 8)]
ANSWERS = ["one", "  ", "one two three", "", "two three", "one one one"]
ENDED = [True, True, False, True, True, False]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, Rows, Any, Any, DataConfig]:
    """Six training rows in two tokenizers, of which the teacher's knows the words."""
    scratch = tmp_path_factory.mktemp("handing_over")
    run_dir = RunDirectory.open(str(scratch), "run")
    path = scratch / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"instruction": text, "output": "one two"}) for text in QUESTIONS))
    train_tokenizer(["one two three"] * 9, 290, run_dir.local("teacher_tokenizer"))
    train_tokenizer(QUESTIONS, 280, run_dir.local("tokenizer"))
    teachers, ours = (load_tokenizer(str(run_dir.local(name))) for name in ("teacher_tokenizer", "tokenizer"))
    config = DataConfig(
        train=SourceConfig(path=str(path)),
        holdout_rows=1,
        prompt_template="plain",
        max_prompt_tokens=20,
        max_tokens=40,
    )
    return run_dir, prepare_all(config, ours, 0, run_dir, teacher_tokenizer=teachers), ours, teachers, config


def answered(teachers: Any, foreign: int | None = None) -> pa.Table:
    tokens = [teachers(text, add_special_tokens=False)["input_ids"] for text in ANSWERS]
    if foreign is not None:
        tokens[foreign] = [len(teachers)]
    return pa.table([np.arange(len(ANSWERS)), tokens, ENDED], schema=PART_SCHEMA)


def handed_over(prepared: Any, share: float = 0.9, foreign: int | None = None) -> Any:
    run_dir, rows, ours, teachers, config = prepared
    tokenizer = row_tokenizer(config, ours)
    return hand_over_responses(rows, answered(teachers, foreign), teachers, tokenizer, run_dir, "rows.jsonl", share)


def test_both_models_train_on_the_same_texts_each_in_its_own_tokens(prepared: Any) -> None:
    run_dir, rows, ours, teachers, _ = prepared
    made = handed_over(prepared)
    now = with_responses(rows, run_dir)
    assert now.train == made and now.dev == rows.dev and now.for_teacher["dev"] == rows.for_teacher["dev"]
    assert all(run_dir.exists(rel) for rel in own_files(rows))
    assert made.num_rows == now.for_teacher["train"].num_rows == 4
    kept = [0, 2, 4, 5]
    for tokenizer, summary, before in (
        (ours, now.train, rows.train),
        (teachers, now.for_teacher["train"], rows.for_teacher["train"]),
    ):
        store, old = (RowStore.open(run_dir.local(one.path)) for one in (summary, before))
        assert store.references(range(4)) == [[ANSWERS[row]] for row in kept]
        assert store.source_rows(range(4)) == old.source_rows(kept)
        prompts, responses = store.tokens(range(4))
        assert all(np.array_equal(*pair) for pair in zip(prompts, old.tokens(kept)[0], strict=True))
        assert tokenizer.batch_decode(responses, skip_special_tokens=True) == [ANSWERS[row] for row in kept]
        ends = [response[-1] == tokenizer.eos_token_id for response in responses]
        assert ends == [ENDED[row] for row in kept], "an answer that ran into its limit has no end"


def test_the_teachers_tokens_are_those_that_it_generated(prepared: Any) -> None:
    run_dir, rows, _, teachers, _ = prepared
    handed_over(prepared)
    theirs = RowStore.open(run_dir.local(with_responses(rows, run_dir).for_teacher["train"].path))
    written = answered(teachers)["response_ids"].to_pylist()
    assert [response.tolist() for response in theirs.tokens([1, 3])[1]] == [written[2], written[5]]


def test_an_answer_of_no_use_is_left_out_of_both_and_told(prepared: Any) -> None:
    run_dir, *_ = prepared
    assert handed_over(prepared, foreign=4).num_rows == 3
    rejects = [json.loads(line) for line in run_dir.read_text("responses/rejects.jsonl").splitlines()]
    assert [reject["reason"] for reject in rejects] == [EMPTY, EMPTY, FOREIGN]
    assert len(RowStore.open(Path(run_dir.uri) / "responses" / "for_teacher" / "train.arrow")) == 3
    with pytest.raises(DataError, match="3 of 6 rows"):
        handed_over(prepared, share=0.2, foreign=4)
