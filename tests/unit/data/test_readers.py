from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pocl_ray.config.sources import SourceConfig
from pocl_ray.data.readers import Reject, SourceRow, locate, read_file
from pocl_ray.errors import DataError


def read(path: Path, content: bytes | None = None) -> list[SourceRow | Reject]:
    if content is not None:
        path.write_bytes(content)
    (file,) = locate(SourceConfig(path=str(path))).files
    return list(read_file(file))


def outcome(items: list[SourceRow | Reject]) -> list[tuple[int, object]]:
    return [(item.row, item.values if isinstance(item, SourceRow) else item.reason) for item in items]


def test_jsonl_lines_that_cannot_be_read_are_rejected_by_number(tmp_path: Path) -> None:
    lines = [b'\xef\xbb\xbf{"a": 1}', b"", b'{"a": ', b'{"a": "\xff"}', b"[1]", b"3", b'{"a": "\xe2\x80\xa8"}\r']
    items = read(tmp_path / "rows.jsonl", b"\n".join(lines))
    rows = outcome(items)
    assert rows[0] == (1, {"a": 1})
    assert rows[1][0] == 3 and str(rows[1][1]).startswith("not JSON (Expecting value")
    assert rows[2] == (4, "not UTF-8 (byte 8 of the line)")
    assert rows[3:] == [(5, "not a JSON object but list"), (6, "not a JSON object but int"), (7, {"a": "\u2028"})]
    assert {item.source for item in items} == {str(tmp_path / "rows.jsonl")}


def test_absurdly_nested_json_is_a_reject(tmp_path: Path) -> None:
    (item,) = read(tmp_path / "rows.jsonl", b'{"a": ' + b"[" * 200_000)
    assert isinstance(item, Reject) and item.reason.startswith("not JSON")


def test_a_row_that_gives_a_key_twice_is_rejected_with_the_key(tmp_path: Path) -> None:
    doubled = b'{"a": 1, "b": [{"c": 1, "c": 2}]}\n{"a": 1, "b": [{"c": 1}, {"c": 2}]}\n'
    reason = "the key 'c' stands twice in one object"
    assert outcome(read(tmp_path / "rows.jsonl", doubled)) == [(1, reason), (2, {"a": 1, "b": [{"c": 1}, {"c": 2}]})]
    with pytest.raises(DataError, match=reason):
        read(tmp_path / "rows.json", b'[{"a": 1, "c": 1, "c": 1}]')


def test_compressed_files_are_read(tmp_path: Path) -> None:
    assert outcome(read(tmp_path / "rows.jsonl.gz", gzip.compress(b'{"a": 1}\n{"a": 2}\n'))) == [
        (1, {"a": 1}),
        (2, {"a": 2}),
    ]


def test_a_json_file_is_an_array_or_lines(tmp_path: Path) -> None:
    array = json.dumps([{"a": 1}, "x"], indent=1).encode()
    expected = [(1, {"a": 1}), (2, "not a JSON object but str")]
    assert outcome(read(tmp_path / "rows.json", b"\xef\xbb\xbf \n" + array)) == expected
    assert outcome(read(tmp_path / "rows.json", b'{"a": 1}\n{"a": 2}\n')) == [(1, {"a": 1}), (2, {"a": 2})]
    with pytest.raises(DataError, match=r"rows\.json: not valid JSON"):
        read(tmp_path / "rows.json", array[:-3])


def test_csv_fields_keep_quotes_line_breaks_and_text_type(tmp_path: Path) -> None:
    content = '\ufeffprompt,answer\r\n"a ""b""\r\nc",42\r\n\r\né,x\r\n'.encode()
    expected = [(1, {"prompt": 'a "b"\r\nc', "answer": "42"}), (2, {"prompt": "é", "answer": "x"})]
    assert outcome(read(tmp_path / "rows.csv", content)) == expected
    assert outcome(read(tmp_path / "rows.tsv", b"a\tb\n1,5\t2\n")) == [(1, {"a": "1,5", "b": "2"})]


def test_csv_rows_that_cannot_be_read_are_rejected_by_number(tmp_path: Path) -> None:
    rows = outcome(read(tmp_path / "rows.csv", b'a,b\n1,2\n1\n1,2,3\n"x"y,2\n\xff,2\n3,4\n'))
    assert rows[0] == (1, {"a": "1", "b": "2"})
    assert rows[1:3] == [(2, "1 fields, but the header names 2"), (3, "3 fields, but the header names 2")]
    assert rows[3][0] == 4 and str(rows[3][1]).startswith("not CSV (line 5")
    assert rows[4:] == [(5, "not UTF-8"), (6, {"a": "3", "b": "4"})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'a,b\n1,2\n"1,2\n3,4\n5,6\n', "a quote opened in line 3 is not closed"),
        (b"a,a\n1,2\n", "the header names 'a' more than once"),
        ("prompt,output\na,b\n".encode("utf-16"), "is UTF-16, as some tables are exported; save it as CSV in UTF-8"),
        (b'"a"b,c\n', "the header is not CSV"),
    ],
)
def test_csv_files_that_are_broken_as_a_whole_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path / "rows.csv", content)


def test_parquet_rows_have_their_position_over_row_groups(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": list(range(5)), "b": [["x"]] * 5}), tmp_path / "rows.parquet", row_group_size=2)
    assert outcome(read(tmp_path / "rows.parquet")) == [(i + 1, {"a": i, "b": ["x"]}) for i in range(5)]


def test_a_parquet_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    columns = [pa.array(["x"]), pa.array(["y"]), pa.array(["z"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["a", "a", "b"]), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet: has the column 'a' more than once"):
        read(tmp_path / "rows.parquet")


def test_parquet_text_that_is_not_utf8_is_rejected_by_number(tmp_path: Path) -> None:
    text = pa.array([b"good", b"\xff", b"fine"], pa.binary())
    broken = pa.StringArray.from_buffers(3, text.buffers()[1], text.buffers()[2])
    pq.write_table(pa.table({"a": broken}), tmp_path / "rows.parquet")
    assert outcome(read(tmp_path / "rows.parquet")) == [(1, {"a": "good"}), (2, "a is not UTF-8"), (3, {"a": "fine"})]


def test_files_that_are_not_what_they_are_called_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.parquet: cannot be read as parquet"):
        read(tmp_path / "rows.parquet", b"not at all")
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz: cannot be read as jsonl"):
        read(tmp_path / "rows.jsonl.gz", b"not at all")


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    (file,) = locate(SourceConfig(path=str(tmp_path / "rows.jsonl"))).files
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(DataError, match=r"rows\.jsonl: no such file"):
        list(read_file(file))
