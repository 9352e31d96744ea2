"""Plain text: cut into rows without losing a token, prepared, held out by whole texts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from data_tokenizers import tiny_tokenizer

from pocl_ray.config.sources import DataConfig, SourceConfig
from pocl_ray.data.prepare import training_texts
from pocl_ray.data.prompts import Example
from pocl_ray.data.row_store import RowStore, shared_prompts
from pocl_ray.data.rows import hold_out, prepare_rows
from pocl_ray.data.tokenization import TextTokenizer
from pocl_ray.errors import DataError, ModelError

STORY = "Say hello to the cat. The cat says nothing at all, for cats do not say hello to anybody."


def example(text: str) -> Example:
    return Example("", (text,), "tales", 7, (1.5,))


def config_of(path: Path, **settings: object) -> DataConfig:
    return DataConfig.model_validate({"train": {"path": str(path)}, "holdout_rows": 1, "task": "text", **settings})


def write(path: Path, texts: list[str], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("max_tokens", [2, 3, 7, 64, 1000])
def test_every_token_but_the_first_is_a_response_token_exactly_once(max_tokens: int, adds_bos: bool) -> None:
    tokenizer = tiny_tokenizer(adds_bos=adds_bos)
    (rows,) = TextTokenizer(tokenizer, max_tokens).rows([example(STORY)])
    whole = [*tokenizer(STORY)["input_ids"], tokenizer.eos_token_id]
    assert [token for _, _, response in rows for token in response] == whole[1:]
    assert all(len(prompt) == 1 and 1 <= len(response) < max_tokens for _, prompt, response in rows)
    ends = [whole[0], *(response[-1] for _, _, response in rows[:-1])]
    assert [prompt[0] for _, prompt, _ in rows] == ends  # each row goes on where the one before ended
    assert all(len(prompt) + len(response) == max_tokens for _, prompt, response in rows[:-1])


def test_a_bos_token_in_front_leaves_the_whole_text_to_learn() -> None:
    tokenizer = tiny_tokenizer(adds_bos=True)
    (rows,) = TextTokenizer(tokenizer, 1000).rows([example(STORY)])
    assert rows[0][1] == [tokenizer.bos_token_id]
    assert tokenizer.decode(rows[0][2], skip_special_tokens=True) == STORY


def test_rows_keep_topic_number_and_figures_of_their_text_and_hold_their_own_part_of_it() -> None:
    (rows,) = TextTokenizer(tiny_tokenizer(), 16).rows([example(STORY)])
    assert len(rows) > 1
    assert all((row.prompt, row.topic, row.source_row, row.numbers) == ("", "tales", 7, (1.5,)) for row, _, _ in rows)
    assert all(row.references[0] in STORY for row, _, _ in rows)


def test_a_short_text_is_one_row_as_it_is() -> None:
    (rows,) = TextTokenizer(tiny_tokenizer(), 64).rows([example("cat")])
    assert [row.references for row, _, _ in rows] == [("cat",)]


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        TextTokenizer(tokenizer, 64)


def test_texts_are_prepared_as_rows_without_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [STORY, "The cat.", "  ", STORY[:40]])
    config = config_of(path, max_tokens=16, max_reject_share=0.5)
    summary, rejects = prepare_rows("train", config.train, config, tiny_tokenizer(), tmp_path / "train.arrow")
    store = RowStore.open(tmp_path / "train.arrow")
    assert [(reject.row, reject.reason) for reject in rejects] == [(3, "text is empty")]
    assert set(store.source_rows(range(len(store)))) == {1, 2, 4} and len(store) == summary.num_rows > 3
    assert set(store.prompts(range(len(store)))) == {""}
    assert store.prompt_lengths.tolist() == [1] * len(store)


def test_the_tokenizer_is_trained_on_the_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["one", "two"])
    assert list(training_texts(config_of(path))) == ["one", "two"]


def test_another_column_is_mapped_and_a_missing_one_refused_with_those_found(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["one"], column="body")
    with pytest.raises(DataError, match=r"which column holds the text; found: body; .*columns: \{text"):
        list(training_texts(config_of(path)))
    mapped = config_of(path, train=SourceConfig(path=str(path), columns={"text": "body"}))
    assert list(training_texts(mapped)) == ["one"]


def test_roles_of_other_tasks_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["one"])
    config = config_of(path, train=SourceConfig(path=str(path), columns={"output": "text"}))
    with pytest.raises(DataError, match=r"do not go together .* in data.task text; give text alone"):
        list(training_texts(config))


def a_store(folder: Path, texts: list[str], name: str = "train") -> Path:
    path = write(folder / f"{name}.jsonl", texts)
    config = config_of(path, max_tokens=16)
    prepare_rows(name, config.train, config, tiny_tokenizer(), folder / f"{name}.arrow")
    return folder / f"{name}.arrow"


def test_whole_texts_are_held_out(tmp_path: Path) -> None:
    rows = a_store(tmp_path, [f"{number} {STORY}" for number in range(8)])
    num_rows = len(RowStore.open(rows))
    train, dev = hold_out(rows, 3, 5, tmp_path / "t.arrow", tmp_path / "d.arrow")
    assert train.num_rows + dev.num_rows == num_rows and dev.num_rows >= 3
    numbers = [
        set(store.source_rows(np.arange(len(store))))
        for store in (RowStore.open(tmp_path / "t.arrow"), RowStore.open(tmp_path / "d.arrow"))
    ]
    assert numbers[0] | numbers[1] == set(range(1, 9)) and not numbers[0] & numbers[1]


def test_holding_out_every_text_is_refused(tmp_path: Path) -> None:
    rows = a_store(tmp_path, [STORY, STORY])
    num_rows = len(RowStore.open(rows)) - 1
    with pytest.raises(DataError, match="takes 2 of 2 texts"):
        hold_out(rows, num_rows, 5, tmp_path / "t.arrow", tmp_path / "d.arrow")


def test_leaks_are_counted_by_the_text(tmp_path: Path) -> None:
    train = RowStore.open(a_store(tmp_path, ["one", "two", "three"]))
    other = RowStore.open(a_store(tmp_path, ["two", "four"], "other"))
    assert shared_prompts(train, other) == 1
