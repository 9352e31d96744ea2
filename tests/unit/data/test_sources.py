from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import datasets
import pyarrow.fs as pafs
import pytest

from pocl_ray.config.sources import SourceConfig
from pocl_ray.data import readers
from pocl_ray.data.readers import Reject, SourceRow
from pocl_ray.data.sources import read_source, source_fingerprint
from pocl_ray.errors import DataError

ROWS = [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(5)]


def values(path: object, **settings: object) -> list[object]:
    source = SourceConfig(path=str(path), **settings)
    return [item.values if isinstance(item, SourceRow) else item for item in read_source(source)]


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    part = datasets.Dataset.from_list(ROWS)
    part.save_to_disk(folder / "one")
    datasets.DatasetDict({"train": part, "test": part.select([4, 0])}).save_to_disk(folder / "splits")
    datasets.DatasetDict({"only": part}).save_to_disk(folder / "only")
    return folder


def test_rows_stream_over_the_files_of_a_glob_and_stop_at_max_rows(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS[:2])
    write_jsonl(tmp_path / "b.jsonl", ROWS[2:])
    assert values(tmp_path / "*.jsonl") == ROWS
    assert values(tmp_path / "*.jsonl", max_rows=3) == ROWS[:3]
    assert [item.row for item in read_source(SourceConfig(path=str(tmp_path / "*.jsonl")))] == [1, 2, 1, 2, 3]


def test_unreadable_rows_come_with_their_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xff\n")
    (item,) = values(tmp_path / "a.jsonl")
    assert item == Reject(str(tmp_path / "a.jsonl"), 1, "not UTF-8 (byte 1 of the line)")


def test_an_empty_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"a\.jsonl: holds no rows"):
        values(tmp_path / "a.jsonl")
    (tmp_path / "a.csv").write_text("a,b\n")
    with pytest.raises(DataError, match=r"a\.csv: holds no rows"):
        values(tmp_path / "a.csv")


def test_a_missing_source_is_an_error_before_the_first_row_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_source(SourceConfig(path=str(tmp_path / "a.jsonl")))


def test_saved_datasets_are_read_with_and_without_splits(saved: Path) -> None:
    assert values(saved / "one") == ROWS
    assert values(saved / "splits", split="test") == [ROWS[4], ROWS[0]]
    assert values(saved / "only") == ROWS
    items = list(read_source(SourceConfig(path=str(saved / "one"))))
    assert [item.row for item in items] == [1, 2, 3, 4, 5] and items[0].source == str(saved / "one")


def test_a_missing_split_is_named_with_those_there(saved: Path) -> None:
    with pytest.raises(DataError, match=r"splits: has no split 'dev'; there are train, test"):
        values(saved / "splits", split="dev")
    with pytest.raises(DataError, match=r"splits: needs `split`; there are train, test"):
        values(saved / "splits")
    with pytest.raises(DataError, match="one: has no splits; leave out split 'dev'"):
        values(saved / "one", split="dev")


def test_a_damaged_saved_dataset_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(DataError, match="not a readable `datasets` directory") as error:
        values(tmp_path)
    assert "\n" not in str(error.value)


def test_hub_settings_reach_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def load(path: str, **settings: object) -> datasets.Dataset:
        asked.update(path=path, **settings)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert values("owner/rows", split="train[:5]", subset="en", revision="abc") == ROWS
    assert asked == {"path": "owner/rows", "split": "train[:5]", "name": "en", "revision": "abc"}


def test_a_hub_without_the_split_asked_for_lists_those_there(monkeypatch: pytest.MonkeyPatch) -> None:
    part = datasets.Dataset.from_list(ROWS)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict({"a": part, "b": part}))
    with pytest.raises(DataError, match="owner/rows: needs `split`; there are a, b"):
        values("owner/rows")


@pytest.mark.parametrize(
    "error", [ConnectionError("no net\nmore"), ValueError("Unknown split"), RuntimeError("script")]
)
def test_hub_failures_are_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match="owner/rows: cannot be loaded from the Hub") as caught:
        values("owner/rows")
    assert "\n" not in str(caught.value)


def test_samples_take_the_split_of_the_config_or_of_the_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def sample_rows(name: str, split: str) -> list[dict[str, str]]:
        asked.append((name, split))
        return ROWS

    fake = types.ModuleType("pocl_ray.data.samples")
    fake.sample_rows = sample_rows  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pocl_ray.data.samples", fake)
    source = SourceConfig(path="samples://instructions")
    assert [item.values for item in read_source(source, "dev")] == ROWS
    list(read_source(SourceConfig(path="samples://instructions", split="test"), "dev"))
    assert asked == [("instructions", "dev"), ("instructions", "test")]
    assert source_fingerprint(source, "dev") == source_fingerprint(source, "dev")


def test_rows_are_read_from_an_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bucket").mkdir()
    write_jsonl(tmp_path / "bucket" / "a.jsonl", ROWS)
    store = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    monkeypatch.setattr(readers, "resolve", lambda path: (store, path.removeprefix("s3://")))
    for path in ("s3://bucket/a.jsonl", "s3://bucket/*.jsonl", "s3://bucket"):
        items = list(read_source(SourceConfig(path=path)))
        assert [item.values for item in items] == ROWS
        assert items[0].source == "s3://bucket/a.jsonl"
    before = source_fingerprint(SourceConfig(path="s3://bucket/a.jsonl"))
    assert before == source_fingerprint(SourceConfig(path="s3://bucket/a.jsonl"))
    write_jsonl(tmp_path / "bucket" / "a.jsonl", ROWS[:1])
    assert before != source_fingerprint(SourceConfig(path="s3://bucket/a.jsonl"))


def test_the_fingerprint_follows_content_and_settings_but_not_the_place(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", ROWS)
    second = write_jsonl(tmp_path / "b.jsonl", ROWS)
    digest = source_fingerprint(SourceConfig(path=str(first)))
    assert digest == source_fingerprint(SourceConfig(path=str(second)))
    assert digest != source_fingerprint(SourceConfig(path=str(first), max_rows=2))
    assert digest != source_fingerprint(SourceConfig(path=str(first), columns={"output": "response"}))
    write_jsonl(second, ROWS[:4])
    assert digest != source_fingerprint(SourceConfig(path=str(second)))
    with pytest.raises(DataError, match="no such file"):
        source_fingerprint(SourceConfig(path=str(tmp_path / "c.jsonl")))


def test_the_fingerprint_of_a_saved_dataset_and_of_the_hub(saved: Path) -> None:
    digests = {source_fingerprint(SourceConfig(path=str(saved / name))) for name in ("one", "splits", "only")}
    hub = [SourceConfig(path="owner/rows", revision=revision) for revision in ("a", "b")]
    assert len(digests | {source_fingerprint(source) for source in hub}) == 5
