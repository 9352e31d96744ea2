from __future__ import annotations

import json
from pathlib import Path

import pytest

from pocl_ray.config.sources import SourceConfig
from pocl_ray.data import prompts
from pocl_ray.data.prompts import Example, PromptTemplate, read_examples
from pocl_ray.data.readers import Reject
from pocl_ray.errors import DataError


def stream(path: Path, rows: list[object]) -> list[Example | Reject]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_examples(SourceConfig(path=str(path)), PromptTemplate("plain", None), "train"))


def test_examples_and_rejects_come_in_the_order_of_the_rows(tmp_path: Path) -> None:
    items = stream(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r"}, 3, {"prompt": "", "response": "r"}])
    assert items[0] == Example("p", ("r",), None, 1)
    assert items[1:] == [
        Reject(str(tmp_path / "a.jsonl"), 2, "not a JSON object but int"),
        Reject(str(tmp_path / "a.jsonl"), 3, "prompt is empty"),
    ]


def test_columns_are_told_from_the_first_chunk_that_has_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "CHUNK_ROWS", 2)
    rows = [3, {}, {"prompt": "p", "response": "r"}, {"question": "q", "answer": "a"}, {"prompt": "p"}]
    reasons = [item.reason for item in stream(tmp_path / "a.jsonl", rows) if isinstance(item, Reject)]
    assert reasons == ["not a JSON object but int", "has no columns", "prompt is missing", "response is missing"]


def test_a_column_missing_in_every_row_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot tell which columns hold the prompt and the response; found: prompt"):
        stream(tmp_path / "a.jsonl", [{"prompt": "p"}, {"prompt": "q"}])
