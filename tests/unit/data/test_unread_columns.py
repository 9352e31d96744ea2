"""Columns that no role names are not decoded, and fields are as long as they are, in every format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pocl_ray.config.sources import SourceConfig, Task
from pocl_ray.data.columns import read_request, wanted_columns
from pocl_ray.data.prompts import Example, PromptTemplate, read_examples
from pocl_ray.data.readers import Reject

FAR = 10**18  # microseconds: the year 33658
TOO_FAR = {
    "timestamp": pa.array([FAR, 0], pa.timestamp("us")),
    "timestamp with zone": pa.array([FAR, 0], pa.timestamp("us", tz="UTC")),
    "duration": pa.array([2**62, 0], pa.duration("s")),
    "date": pa.array([2**30, 0], pa.date32()),
    "bytes as text": pa.array([b"\xff", b"a"], pa.binary()).view(pa.string()),
    "nested": pa.array([{"at": FAR}, {"at": 0}], pa.struct({"at": pa.timestamp("us")})),
    "list": pa.array([[FAR], []], pa.list_(pa.timestamp("us"))),
}


def read(path: Path, task: Task = "instruction", **columns: Any) -> list[Example | Reject]:
    source = SourceConfig(path=str(path), columns=columns)
    return list(read_examples(source, PromptTemplate("plain", None), "train", task))


def assert_read(found: list[Example | Reject], num_rows: int = 2) -> None:
    assert [type(item) for item in found] == [Example] * num_rows, found


def table(**others: Any) -> pa.Table:
    return pa.table({"instruction": ["a", "b"], "output": ["c", "d"], **others})


@pytest.mark.parametrize("kind", TOO_FAR)
def test_a_parquet_column_that_no_role_names_may_hold_anything(kind: str, tmp_path: Path) -> None:
    pq.write_table(table(created=TOO_FAR[kind]), tmp_path / "rows.parquet")
    assert_read(read(tmp_path / "rows.parquet"))


@pytest.mark.parametrize("kind", ["timestamp", "duration", "nested"])
def test_so_may_one_of_a_saved_dataset(kind: str, tmp_path: Path) -> None:
    datasets.Dataset(table(created=TOO_FAR[kind])).save_to_disk(tmp_path / "saved")
    assert_read(read(tmp_path / "saved"))


@pytest.mark.parametrize("feature", [datasets.Audio(), datasets.Image()])
def test_audio_and_images_that_no_role_names_are_not_decoded(feature: Any, tmp_path: Path) -> None:
    features = datasets.Features(
        {"instruction": datasets.Value("string"), "output": datasets.Value("string"), "media": feature}
    )
    nothing = {"bytes": b"neither sound nor picture", "path": None}
    made = table(media=pa.array([nothing, nothing], features.arrow_schema.field("media").type))
    datasets.Dataset(made, info=datasets.DatasetInfo(features=features)).save_to_disk(tmp_path / "saved")
    assert_read(read(tmp_path / "saved"))


def test_an_image_in_the_place_of_the_answer_is_a_reject_with_the_reason(tmp_path: Path) -> None:
    features = datasets.Features({"instruction": datasets.Value("string"), "output": datasets.Image()})
    picture = {"bytes": b"no picture", "path": None}
    made = pa.table(
        {
            "instruction": ["a", "b"],
            "output": pa.array([picture, picture], features.arrow_schema.field("output").type),
        }
    )
    datasets.Dataset(made, info=datasets.DatasetInfo(features=features)).save_to_disk(tmp_path / "saved")
    found = read(tmp_path / "saved")
    assert all(isinstance(item, Reject) and "cannot be decoded" in item.reason for item in found)
    assert [item.row for item in found if isinstance(item, Reject)] == [1, 2]


def test_a_value_that_is_wanted_and_cannot_be_read_costs_its_row_alone(tmp_path: Path) -> None:
    pq.write_table(table(topic=TOO_FAR["timestamp"]), tmp_path / "rows.parquet")
    first, second = read(tmp_path / "rows.parquet")
    assert isinstance(first, Reject)
    assert first.reason.startswith("topic cannot be read (")
    assert isinstance(second, Example)


def test_bytes_that_are_no_text_matter_in_wanted_columns_alone(tmp_path: Path) -> None:
    csv, jsonl = tmp_path / "rows.csv", tmp_path / "rows.jsonl"
    csv.write_bytes(b"instruction,output,note\na,b,\xff\nc,\xff,d\n")
    jsonl.write_bytes(
        b'{"instruction": "a", "output": "b", "note": "\xff"}\n{"instruction": "c", "output": "\xff", "note": "d"}\n'
    )
    for path in (csv, jsonl):
        first, second = read(path)
        assert isinstance(first, Example)
        assert isinstance(second, Reject)
        assert "not UTF-8" in second.reason


def test_a_message_of_a_missing_column_still_names_all_that_are_there(tmp_path: Path) -> None:
    pq.write_table(pa.table({"frage": ["a"], "antwort": ["b"]}), tmp_path / "rows.parquet")
    with pytest.raises(Exception, match="antwort, frage"):
        read(tmp_path / "rows.parquet")


def test_a_mapping_wants_its_columns_and_no_others() -> None:
    wanted = wanted_columns({"prompt": "q", "output": "a"}, "instruction", ["score"])
    assert wanted(["q", "a", "input", "output", "score", "topic", "created"]) == {"q", "a", "score", "topic"}


LONG = 200_000  # characters; Python's own limit of a CSV field is 131,072


@pytest.mark.parametrize("text", ["x" * LONG, "line\n" * (LONG // 5), "a quoted word, " * (LONG // 16)])
def test_csv_fields_are_as_long_as_they_are(text: str, tmp_path: Path) -> None:
    quoted = text.replace('"', '""')
    (tmp_path / "rows.csv").write_text(f'instruction,output\na,b\nlong,"{quoted}"\nc,d\n', encoding="utf-8")
    found = read(tmp_path / "rows.csv")
    assert_read(found, 3)
    assert isinstance(found[1], Example)
    assert found[1].references == (text,)


def test_a_long_csv_header_and_tsv_too(tmp_path: Path) -> None:
    (tmp_path / "rows.tsv").write_text(f"instruction\toutput\t{'x' * LONG}\na\tb\tc\n", encoding="utf-8")
    assert_read(read(tmp_path / "rows.tsv"), 1)


@pytest.mark.parametrize("name", ["ts.parquet", "dur.parquet", "big2.csv"])
def test_the_tables_that_failed_are_read(shared: Path, name: str) -> None:
    path = shared / "cases" / "tables" / name
    if not path.is_file():
        pytest.skip(f"no {path}")
    found = read(path)
    assert found
    assert all(isinstance(item, Example) for item in found), found[:2]


@pytest.mark.parametrize(
    "turn",
    [{"role": "system", "content": ""}, {"role": "developer", "content": " \n"}, {"role": "system", "content": None}],
)
@pytest.mark.parametrize("place", [0, 2])
def test_an_empty_system_turn_is_left_out(turn: dict[str, Any], place: int) -> None:
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    turns.insert(place, turn)
    request = read_request({"messages": turns}, {"messages": "messages"})
    assert request.system == ""
    assert [message["role"] for message in request.history] == ["user", "assistant"]


def test_an_empty_system_turn_leaves_the_system_column() -> None:
    turns = [{"from": "system", "value": ""}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    found = read_request(
        {"conversations": turns, "system": "be brief"}, {"messages": "conversations", "system": "system"}
    )
    assert found.system == "be brief"
