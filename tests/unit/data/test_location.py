from __future__ import annotations

from pathlib import Path

import pytest

from pocl_ray.config.sources import SourceConfig
from pocl_ray.data.readers import ending_of, locate
from pocl_ray.errors import DataError, StorageError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}\n")


def names_found(path: object, **settings: object) -> list[str]:
    return [Path(file.path).name for file in locate(SourceConfig(path=str(path), **settings)).files]


@pytest.mark.parametrize(
    ("name", "ending"),
    [("a.jsonl", ".jsonl"), ("a.JSON", ".json"), ("a.b.csv.gz", ".csv"), ("a.gz", ".gz"), ("a", ""), ("v1.2/a", "")],
)
def test_the_ending_is_read_behind_a_compression(name: str, ending: str) -> None:
    assert ending_of(name) == ending


def test_formats_are_told_by_the_ending_or_by_the_config(tmp_path: Path) -> None:
    touch(tmp_path, "a.jsonl", "b.tsv", "c.pq", "d.txt")
    formats = [locate(SourceConfig(path=str(tmp_path / name))).format for name in ("a.jsonl", "b.tsv", "c.pq")]
    assert formats == ["jsonl", "csv", "parquet"]
    assert locate(SourceConfig(path=str(tmp_path / "d.txt"), format="csv")).format == "csv"
    with pytest.raises(DataError, match=r"d\.txt: its ending does not tell the format \(known: \.jsonl"):
        locate(SourceConfig(path=str(tmp_path / "d.txt")))


def test_a_missing_file_is_named_with_its_near_names(tmp_path: Path) -> None:
    touch(tmp_path, "train.jsonl", "notes.md")
    with pytest.raises(DataError, match=r"trian\.jsonl: no such file; did you mean train\.jsonl\?"):
        locate(SourceConfig(path=str(tmp_path / "trian.jsonl")))
    with pytest.raises(DataError, match=r"zzzzzzzz: no such file; the folder holds train\.jsonl$"):
        locate(SourceConfig(path=str(tmp_path / "zzzzzzzz")))
    with pytest.raises(DataError, match=r"there is no folder .*nowhere either"):
        locate(SourceConfig(path=str(tmp_path / "nowhere" / "a.jsonl")))


def test_globs_match_within_a_folder_or_over_folders_in_sorted_order(tmp_path: Path) -> None:
    touch(tmp_path, "b1.jsonl", "a1.jsonl", "a22.jsonl", "deep/er/a3.jsonl", "deep/a+b.jsonl")
    assert names_found(tmp_path / "*.jsonl") == ["a1.jsonl", "a22.jsonl", "b1.jsonl"]
    assert names_found(tmp_path / "a?.jsonl") == ["a1.jsonl"]
    assert names_found(tmp_path / "[!a]*.jsonl") == ["b1.jsonl"]
    assert names_found(tmp_path / "**/a*.jsonl") == ["a1.jsonl", "a22.jsonl", "a+b.jsonl", "a3.jsonl"]
    assert names_found(tmp_path / "*/a+b.jsonl") == ["a+b.jsonl"]
    with pytest.raises(DataError, match="no file matches"):
        locate(SourceConfig(path=str(tmp_path / "*.csv")))


def test_a_file_whose_name_holds_brackets_is_a_file(tmp_path: Path) -> None:
    touch(tmp_path, "rows[1].jsonl")
    assert names_found(tmp_path / "rows[1].jsonl") == ["rows[1].jsonl"]


def test_a_folder_of_part_files_is_read_whole(tmp_path: Path) -> None:
    touch(tmp_path, "part-1.jsonl", "part-0.jsonl", "_SUCCESS", ".part-1.jsonl", "_metadata.json")
    assert names_found(tmp_path) == ["part-0.jsonl", "part-1.jsonl"]
    touch(tmp_path, "more.csv")
    with pytest.raises(DataError, match=r"several formats \(csv, jsonl\)"):
        locate(SourceConfig(path=str(tmp_path)))


def test_folders_without_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a folder without files of rows"):
        locate(SourceConfig(path=str(tmp_path)))
    with pytest.raises(DataError, match="not a saved `datasets` directory"):
        locate(SourceConfig(path=str(tmp_path), format="dataset"))
    with pytest.raises(DataError, match="no such saved `datasets` directory"):
        locate(SourceConfig(path=str(tmp_path / "gone"), format="dataset"))


def test_hub_ids_are_told_from_misspelt_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate(SourceConfig(path="databricks/databricks-dolly-15k")).format == "hub"
    assert locate(SourceConfig(path="squad", format="hub")).format == "hub"
    touch(tmp_path, "data/train.jsonl")
    for path in ("data/train", "owner/rows.jsonl", "squad", "./owner/name"):
        with pytest.raises(DataError, match="no such file"):
            locate(SourceConfig(path=path))


def test_file_urls_are_local_and_unknown_schemes_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.jsonl")
    assert names_found(f"file://{tmp_path}/a.jsonl") == ["a.jsonl"]
    with pytest.raises(StorageError, match=r"nosuch://bucket/a\.jsonl: cannot be opened"):
        locate(SourceConfig(path="nosuch://bucket/a.jsonl"))
