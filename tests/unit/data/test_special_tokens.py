"""Special tokens that are written in data are text; what cutting takes from rows is counted and told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from data_tokenizers import EOS, tiny_tokenizer

from pocl_ray.config.sources import DataConfig, SourceConfig
from pocl_ray.data.prepare import data_fingerprint
from pocl_ray.data.readers import SourceRow
from pocl_ray.data.row_counts import told_cuts, told_rejects
from pocl_ray.data.rows import Preparation
from pocl_ray.records import RowsSummary

END = EOS


def prepare(rows: list[dict[str, Any]], tokenizer: Any, **settings: Any) -> tuple[Preparation, list[dict[str, Any]]]:
    source = SourceConfig(path="unread.jsonl")
    config = DataConfig(train=source, holdout_rows=1, **{"prompt_template": "plain", **settings})
    preparation = Preparation(source, config, [tokenizer], [])
    (batch,) = preparation.prepare([SourceRow("f", number, row) for number, row in enumerate(rows, 1)])
    return preparation, batch.to_pylist()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = tiny_tokenizer()
    assert END in made.all_special_tokens
    return made


def row(prompt: str, output: str) -> dict[str, str]:
    return {"prompt": prompt, "output": output}


@pytest.mark.parametrize("prompt", [f"what is {END}?", "what", END, f"{END}{END} a"])
@pytest.mark.parametrize("output", [f"it is {END} here", f"{END}", "nothing"])
def test_they_are_read_as_text_and_come_back_as_they_were(prompt: str, output: str, tokenizer: Any) -> None:
    preparation, (made,) = prepare([row(prompt, output)], tokenizer)
    *response, last = made["response_ids"]
    assert tokenizer.eos_token_id not in [*made["prompt_ids"], *response]
    assert last == tokenizer.eos_token_id
    assert tokenizer.decode(made["prompt_ids"]) == made["prompt"] == prompt
    assert tokenizer.decode(response) == output
    assert preparation.counts.num_special == (END in prompt + output)


def test_keep_reads_them_as_the_tokens(tokenizer: Any) -> None:
    preparation, (made,) = prepare([row("a", f"b {END} c")], tokenizer, special_tokens="keep")
    assert made["response_ids"].count(tokenizer.eos_token_id) == 2
    assert preparation.counts.num_special == 0


def test_those_of_a_template_stay_tokens(tokenizer: Any) -> None:
    _, (made,) = prepare([row(f"a {END}", "b")], tokenizer, prompt_template=f"{END}{{instruction}}{END}")
    ids = made["prompt_ids"]
    assert (ids[0], ids[-1], ids.count(tokenizer.eos_token_id)) == (*[tokenizer.eos_token_id] * 2, 2)
    assert made["prompt"] == f"{END}a {END}{END}"


def test_those_of_plain_text_are_text_too(tokenizer: Any) -> None:
    preparation, (made,) = prepare([{"text": f"one {END} two"}], tokenizer, task="text")
    ids = made["prompt_ids"] + made["response_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids[:-1]) == f"one {END} two"
    assert preparation.counts.num_special == 1


def test_rows_without_them_have_the_ids_that_they_had(tokenizer: Any) -> None:
    rows = [row("hello there", "general words"), row("ünï cödé", "x")]
    assert prepare(rows, tokenizer)[1] == prepare(rows, tokenizer, special_tokens="keep")[1]


def test_a_run_directory_of_before_is_the_same_run(tmp_path: Any) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "output": "b"}\n')
    config = DataConfig(train=SourceConfig(path=str(tmp_path / "a.jsonl")), holdout_rows=1)
    (_, settings), (_, kept) = (
        data_fingerprint(config),
        data_fingerprint(config.model_copy(update={"special_tokens": "keep"})),
    )
    assert "special_tokens" not in settings  # type: ignore[operator]
    assert kept["special_tokens"] == "keep"  # type: ignore[index]


def test_what_cutting_takes_is_counted(tokenizer: Any) -> None:
    rows = [row("a " * 40, "b"), row("a", "b " * 60), row("a", "b")]
    long = [len(tokenizer("a " * 40)["input_ids"]), len(tokenizer("b " * 60)["input_ids"])]
    preparation, made = prepare(rows, tokenizer, max_prompt_tokens=10, max_tokens=30)
    counts = preparation.counts
    assert (counts.num_cut_prompts, counts.num_cut_responses) == (1, 1)
    assert counts.num_lost_tokens == (long[0] - 10) + (long[1] + 1 - len(made[1]["response_ids"]))


def summary(**counts: int) -> RowsSummary:
    return RowsSummary("train", "rows/train.arrow", 100, 0, 1000, 1000, 10, "f", **counts)


def test_cut_rows_are_a_note_and_from_a_twentieth_on_a_warning() -> None:
    assert told_cuts([summary()]) == []
    ((is_warning, line),) = told_cuts([summary(num_cut_prompts=1, num_cut_responses=4, num_lost_tokens=1234)])
    assert not is_warning
    assert line.startswith("train: 1 prompts (1.0%) and 4 responses (4.0%) were cut to fit, 1,234 tokens lost;")
    ((is_warning, _),) = told_cuts([summary(num_cut_responses=5, num_lost_tokens=9)])
    assert is_warning
    ((is_warning, line),) = told_cuts([summary(num_special=2)])
    assert not is_warning
    assert "data.special_tokens: keep" in line


def test_a_plan_needs_no_storage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from pathlib import Path

    from pocl_ray import preview
    from pocl_ray.config import load_config
    from pocl_ray.errors import StorageError

    def unreachable(*_: Any, **__: Any) -> Any:
        raise StorageError("s3://my-bucket: cannot be opened (no network)")

    monkeypatch.setattr(preview, "prepared_sets", unreachable)
    config = load_config(Path(__file__).resolve().parents[3] / "configs" / "quickstart.yaml", [])
    preview.print_plan(config, 4000)
    printed = capsys.readouterr().out
    assert "planned without the rows of the run directory" in printed
    assert "optimizer steps" in printed


def test_rows_left_out_are_a_note_and_from_a_twentieth_on_a_warning() -> None:
    assert told_rejects([summary()]) == []
    told = told_rejects([replace(summary(), num_rejected=4), replace(summary(), num_rejected=6)])
    assert told[0] == (False, "train: 4 rows were left out; rejects.jsonl gives the reasons")
    assert told[1][0]
