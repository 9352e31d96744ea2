"""Rows in the tokens of two tokenizers: the same rows under the same ids, each model's prompt in its own way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_tokenizers import CHAT_TEMPLATE, tiny_tokenizer

from pocl_ray.config import DataConfig, SourceConfig
from pocl_ray.data.prepare import Rows, prepare_all, read_summary
from pocl_ray.data.row_store import RowStore
from pocl_ray.errors import ConfigError
from pocl_ray.run_directory.storage import RunDirectory

STUDENTS = tiny_tokenizer(chat=True)
TEACHERS = tiny_tokenizer(["colour river stone the of and say", "the stone the river"], adds_bos=True, vocab_size=300)


def config_of(folder: Path, rows: list[dict[str, Any]], **keys: Any) -> DataConfig:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"max_prompt_tokens": 200, "max_tokens": 300, "prompt_template": "plain", "max_reject_share": 0.5}
    return DataConfig(train=SourceConfig(path=str(path)), **{"holdout_rows": 2, **sizes, **keys})


def prepared(folder: Path, config: DataConfig, teachers: Any = TEACHERS, students: Any = STUDENTS) -> tuple[Rows, Any]:
    run_dir = RunDirectory.open(str(folder), "run")
    rows = prepare_all(config, students, 7, run_dir, teacher_tokenizer=teachers)
    stores = {
        name: [RowStore.open(run_dir.local(one[name].path)) for one in ({"train": rows.train, "dev": rows.dev}, own)]
        for name in ("train", "dev")
        for own in [rows.for_teacher]
    }
    return rows, stores


def counted(number: int) -> dict[str, str]:
    return {"instruction": f"Say stone {number}", "output": f"the river {number}"}


def test_both_files_hold_the_same_texts_by_id_also_of_the_rows_held_out(tmp_path: Path) -> None:
    rows, stores = prepared(tmp_path, config_of(tmp_path, [counted(number) for number in range(12)]))
    assert rows.train.num_rows == rows.for_teacher["train"].num_rows == 10
    for ours, theirs in stores.values():
        ids = range(len(ours))
        assert ours.source_rows(ids) == theirs.source_rows(ids)
        for tokenizer, store in ((STUDENTS, ours), (TEACHERS, theirs)):
            prompts, responses = store.tokens(ids)
            assert tokenizer.batch_decode(prompts, skip_special_tokens=True) == ours.prompts(ids)
            texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
            assert texts == [references[0] for references in ours.references(ids)]
            assert all(response[-1] == tokenizer.eos_token_id for response in responses)
        assert all(prompt[0] == TEACHERS.bos_token_id for prompt in theirs.tokens(ids)[0])
    assert read_summary(RunDirectory.open(str(tmp_path), "run")) == rows
    read = rows.as_teacher_reads
    assert [made.path for made in read] == ["rows/for_teacher/train.arrow", "rows/for_teacher/dev.arrow"]


def test_the_rows_of_the_student_are_those_that_it_has_without_a_second_tokenizer(tmp_path: Path) -> None:
    config = config_of(tmp_path, [counted(number) for number in range(12)])
    both, _ = prepared(tmp_path / "both", config)
    alone = prepare_all(config, STUDENTS, 7, RunDirectory.open(str(tmp_path / "alone"), "run"))
    assert (both.train, both.dev) == (alone.train, alone.dev)
    assert not alone.for_teacher and alone.as_teacher_reads is alone
    other = tiny_tokenizer(["quite another text of another kind"], vocab_size=290)
    again, _ = prepared(tmp_path / "again", config, other)
    assert again.train.fingerprint == both.train.fingerprint
    assert again.for_teacher["train"].fingerprint != both.for_teacher["train"].fingerprint, "it ties the cache"


def test_each_model_is_asked_in_its_own_chat_template(tmp_path: Path) -> None:
    teachers = tiny_tokenizer(vocab_size=300)
    teachers.chat_template = "{% for m in messages %}<{{ m['content'] + eos_token }}{% endfor %}"
    config = config_of(tmp_path, [counted(number) for number in range(4)], prompt_template="chat")
    _, stores = prepared(tmp_path, config, teachers)
    ours, theirs = stores["dev"]
    assert "[assistant]" in ours.prompts([0])[0] and theirs.prompts([0])[0].startswith("<Say stone")
    assert ours.references([0, 1]) == theirs.references([0, 1])


def test_a_row_that_the_teachers_template_refuses_is_left_out_of_both(tmp_path: Path) -> None:
    teachers = tiny_tokenizer(vocab_size=300)
    teachers.chat_template = CHAT_TEMPLATE.replace("'tool'", "'system'")
    rows = [counted(number) for number in range(6)]
    rows[2]["system"] = "Be brief."
    config = config_of(tmp_path, rows, prompt_template="chat")
    made, stores = prepared(tmp_path, config, teachers)
    numbers = [number for store, _ in stores.values() for number in store.source_rows(range(len(store)))]
    assert sorted(numbers) == [1, 2, 4, 5, 6] and made.train.num_rejected == 1
    (reject,) = (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()
    assert json.loads(reject)["row"] == 3
    assert json.loads(reject)["reason"].startswith("for the teacher: the tokenizer's chat template refuses it")


def test_a_teacher_without_a_chat_template_is_refused_by_name(tmp_path: Path) -> None:
    config = config_of(tmp_path, [counted(1)] * 4, prompt_template="chat")
    with pytest.raises(ConfigError, match=r"for the teacher: .*no chat template; use alpaca"):
        prepared(tmp_path, config)


def test_documents_are_cut_until_both_models_have_room_for_them_and_both_read_the_same(tmp_path: Path) -> None:
    rows = [{"document": "the stone the river of stone and river " * 6, "summary": "stone"} for _ in range(4)]
    config = config_of(
        tmp_path,
        rows,
        task="summarization",
        prompt_template="Read: {document} Sum:",
        max_prompt_tokens=40,
        max_tokens=60,
        holdout_rows=1,
    )
    _, stores = prepared(tmp_path, config)
    ours, theirs = stores["train"]
    assert ours.prompts([0]) == theirs.prompts([0])
    assert ours.prompts([0])[0].startswith("Read: the stone") and ours.prompts([0])[0].endswith("Sum:")
    assert max(ours.prompt_lengths[0], theirs.prompt_lengths[0]) <= 40
    assert len(rows[0]["document"]) > len(ours.prompts([0])[0])
