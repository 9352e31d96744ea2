from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_tokenizers import tiny_tokenizer

from pocl_ray.config.sources import DataConfig, SourceConfig
from pocl_ray.data.readers import Reject
from pocl_ray.data.row_store import RowStore, shared_prompts
from pocl_ray.data.rows import hold_out, prepare_rows, write_rejects
from pocl_ray.errors import DataError
from pocl_ray.run_directory.digests import file_digest

TOKENIZER = tiny_tokenizer()
GOOD = [{"instruction": f"Say {i}", "output": [f"{i}", "x"], "topic": f"t{i % 2}"} for i in range(20)]


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def prepare(path: Path, name: str = "train", tokenizer: object = TOKENIZER, columns: dict | None = None, **settings):
    source = SourceConfig(path=str(path), columns=columns or {})
    config = DataConfig(train=source, holdout_rows=1, **settings)
    return prepare_rows(name, source, config, tokenizer, path.parent / "rows" / f"{name}.arrow")


def test_rows_become_an_arrow_file_and_its_summary(tmp_path: Path) -> None:
    summary, rejects = prepare(write(tmp_path / "a.jsonl", GOOD))
    store = RowStore.open(tmp_path / "rows" / "train.arrow")
    assert rejects == [] and len(store) == summary.num_rows == 20
    assert (summary.name, summary.path, summary.num_rejected) == ("train", "rows/train.arrow", 0)
    assert summary.num_prompt_tokens == store.prompt_lengths.sum()
    assert summary.num_response_tokens == store.response_lengths.sum()
    assert summary.max_response_tokens == store.response_lengths.max() == 3
    assert summary.fingerprint == file_digest(tmp_path / "rows" / "train.arrow")
    assert store.references([3]) == [["3", "x"]] and store.topics([3, 4]) == ["t1", "t0"]
    assert [path.name for path in (tmp_path / "rows").iterdir()] == ["train.arrow"]


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD)
    assert prepare(path, "train")[0].fingerprint == prepare(path, "again")[0].fingerprint
    assert prepare(path, "train", prompt_template="plain")[0].fingerprint != prepare(path, "again")[0].fingerprint


def test_unusable_rows_are_left_out_in_order_and_ids_have_no_gap(tmp_path: Path) -> None:
    bad = ["{", {"instruction": "a"}, {"instruction": "a", "output": "x"}, {"instruction": 3, "output": "x"}, "[]"]
    path = write(tmp_path / "a.jsonl", [*bad, *GOOD])
    summary, rejects = prepare(path, max_reject_share=0.2)
    assert [(reject.row, reject.reason.split(" (")[0]) for reject in rejects] == [
        (1, "not JSON"),
        (2, "output is missing"),
        (4, "instruction is int, not text"),
        (5, "not a JSON object but list"),
    ]
    assert (summary.num_rows, summary.num_rejected) == (21, 4)
    store = RowStore.open(tmp_path / "rows" / "train.arrow")
    assert store.source_rows([0, 1, 20]) == [3, 6, 25]
    assert [value for batch in store.batches for value in batch.column("id").to_pylist()] == list(range(21))


def test_a_response_without_tokens_is_rejected(tmp_path: Path) -> None:
    class Deaf:
        """Like the tiny tokenizer, but hears no "x"."""

        eos_token_id, bos_token_id = TOKENIZER.eos_token_id, None

        def __len__(self) -> int:
            return len(TOKENIZER)

        def __call__(self, texts, **settings):
            strip = [text.replace("x", "") for text in texts] if isinstance(texts, list) else texts
            return TOKENIZER(strip, **settings)

    rows = [{"instruction": "a", "output": "x"}, {"instruction": "b", "output": "y"}]
    summary, rejects = prepare(write(tmp_path / "a.jsonl", rows), tokenizer=Deaf(), max_reject_share=0.5)
    assert rejects == [Reject(str(tmp_path / "a.jsonl"), 1, "the response has no tokens")]
    assert summary.num_rows == 1


def test_too_many_unusable_rows_stop_with_share_and_first_reasons(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*[{"instruction": "a", "output": ""}] * 5, *GOOD])
    with pytest.raises(DataError) as error:
        prepare(path, "dev")
    assert str(error.value) == (
        f"data.dev: {path}: 5 of 25 rows (20.0%) cannot be used, more than data.max_reject_share 5.0%; the first: "
        "row 1: output is empty; row 2: output is empty; row 3: output is empty ..."
    )
    assert list((tmp_path / "rows").iterdir()) == [], "nothing half-written is left"


def test_a_set_without_a_usable_row_is_refused_whatever_the_share(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 of 1 rows \(100.0%\) cannot be used, so none is left"):
        prepare(write(tmp_path / "a.jsonl", ["{"]), max_reject_share=1.0)
    with pytest.raises(DataError, match="row 1: has no columns"):
        prepare(write(tmp_path / "a.jsonl", [{}]), max_reject_share=1.0)


def test_errors_name_the_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^data\.tests\.vicuna: .*a\.jsonl: no such file"):
        prepare(tmp_path / "a.jsonl", "vicuna")
    path = write(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(DataError, match=r"^data\.train: .*no column 'gold'.*found: instruction, output, topic"):
        prepare(path, columns={"output": "gold"})


def test_held_out_rows_leave_train_and_follow_the_seed(tmp_path: Path) -> None:
    prepare(write(tmp_path / "a.jsonl", GOOD))
    rows, train, dev = (tmp_path / "rows" / f"{name}.arrow" for name in ("train", "stays", "dev"))
    train_summary, dev_summary = hold_out(rows, 5, seed=3, train=train, dev=dev, num_rejected=2)
    assert (train_summary.num_rows, dev_summary.num_rows, train_summary.num_rejected) == (15, 5, 2)
    parts = [RowStore.open(path).source_rows(range(count)) for path, count in ((train, 15), (dev, 5))]
    assert sorted(parts[0] + parts[1]) == list(range(1, 21)) and parts[1] == sorted(parts[1])
    assert RowStore.open(dev).batches[0].column("id").to_pylist() == [0, 1, 2, 3, 4]
    again = hold_out(rows, 5, seed=3, train=train, dev=dev)[1].fingerprint
    other = hold_out(rows, 5, seed=4, train=train, dev=dev)[1].fingerprint
    assert again == dev_summary.fingerprint != other
    in_place = hold_out(rows, 5, seed=3, train=rows, dev=dev)[0]
    assert in_place.fingerprint == train_summary.fingerprint
    assert shared_prompts(RowStore.open(rows), RowStore.open(dev)) == 0


def test_holding_out_every_row_is_refused(tmp_path: Path) -> None:
    prepare(write(tmp_path / "a.jsonl", GOOD))
    rows = tmp_path / "rows" / "train.arrow"
    with pytest.raises(DataError, match=r"data\.holdout_rows 20 leaves nothing to train on: .* 20 usable rows"):
        hold_out(rows, 20, seed=0, train=rows, dev=tmp_path / "dev.arrow")


def test_rejects_are_one_json_object_a_line(tmp_path: Path) -> None:
    rejects = [Reject("a.jsonl", 3, "ü is\nodd"), Reject("b\udcff", 4, "x")]
    write_rejects(rejects, tmp_path / "rejects.jsonl")
    lines = (tmp_path / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {"source": "a.jsonl", "row": 3, "reason": "ü is\nodd"}
    assert len(lines) == 2


@pytest.mark.parametrize("name", ["s_ni_dev", "self_instruct_eval"])
def test_real_rows_are_prepared_whole(shared: Path, tmp_path: Path, name: str) -> None:
    path = shared / "data" / f"{name}.jsonl"
    originals = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    tokenizer = tiny_tokenizer([row["instruction"] for row in originals], vocab_size=1000)
    source = SourceConfig(path=str(path))
    config = DataConfig(train=source, holdout_rows=1)
    summary, rejects = prepare_rows("train", source, config, tokenizer, tmp_path / "train.arrow")
    assert rejects == [] and summary.num_rows == len(originals)
    store = RowStore.open(tmp_path / "train.arrow")
    prompts, responses = store.tokens(range(len(store)))
    assert max(map(len, prompts)) <= 256 and int((store.prompt_lengths + store.response_lengths).max()) <= 512
    for row, text, references, prompt, response in zip(
        originals,
        store.prompts(range(len(store))),
        store.references(range(len(store))),
        prompts,
        responses,
        strict=True,
    ):
        assert references == (row["output"] if isinstance(row["output"], list) else [row["output"]])
        assert tokenizer.decode(prompt).endswith("### Response:\n") and text.endswith(tokenizer.decode(prompt))
        if response[-1] == tokenizer.eos_token_id:
            assert tokenizer.decode(response[:-1]) == references[0]
        else:
            assert len(prompt) + len(response) == 512


# Columns of the user's own


def test_numeric_columns_are_carried_along_and_rows_without_a_number_are_set_aside(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "response": "r", "score": i / 2} for i in range(6)]
    bad = [{"score": None}, {"score": "high"}, {"score": True}, {"score": float("inf")}, {}]
    path = tmp_path / "rows.jsonl"
    lines = [*rows, *({"prompt": "p", "response": "r", **values} for values in bad)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    source = SourceConfig(path=str(path))
    config = DataConfig(train=source, holdout_rows=2, max_reject_share=0.5, prompt_template="plain")
    file = tmp_path / "train.arrow"
    _, rejects = prepare_rows("train", source, config, TOKENIZER, file, numbers=["score"])
    assert [reject.reason for reject in rejects] == [
        "score is empty",
        "score is str, not a number",
        "score is bool, not a number",
        "score is inf, not a finite number",
        "score is missing",
    ]
    assert RowStore.open(file).numbers("score").tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
    hold_out(file, 2, 0, file, tmp_path / "dev.arrow")
    kept, held = RowStore.open(file), RowStore.open(tmp_path / "dev.arrow")
    assert sorted([*kept.numbers("score"), *held.numbers("score")]) == [0, 0.5, 1, 1.5, 2, 2.5]
    assert [f"p{int(2 * score)}" for score in kept.numbers("score")] == kept.prompts(range(len(kept)))


def test_a_column_that_is_not_there_is_named_with_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "response": "r", "my_scores": 1}\n', encoding="utf-8")
    source = SourceConfig(path=str(path))
    config = DataConfig(train=source, holdout_rows=1)
    with pytest.raises(DataError, match=r"no column 'my_score', which difficulty.signals names \(did you mean 'my_s"):
        prepare_rows("train", source, config, TOKENIZER, tmp_path / "train.arrow", numbers=["my_score"])
