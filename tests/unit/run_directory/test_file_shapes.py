"""Files of a run that are damaged, or of another version: one line that names the file, the key and the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pocl_ray.errors import StorageError
from pocl_ray.records import RowsSummary, Stage
from pocl_ray.run_directory.file_shapes import SHAPES, ManifestFile
from pocl_ray.run_directory.manifest import VERSION, Manifest
from pocl_ray.run_directory.storage import RunDirectory

SUMMARY = RowsSummary("train", "rows/train.arrow", 8, 0, 9, 9, 3, "f").__dict__
STAGE = Stage(0, (0,), 0, 8, 1, 2, 1.0, 0.7, True, 0, 2).to_json()
DIFFERENCE = {"mean": 1.0, "low": 0.5, "high": 1.5, "num_wins": 2, "verdict": "ahead"}
METRIC = {"value": 0.5, "stderr": None, "higher_is_better": True, "num_rows": 10}
CONTENTS: dict[str, Any] = {
    "manifest.json": {
        "version": 1,
        "steps": {"rows": {"status": "done", "fingerprint": "f", "outputs": [], "seconds": 1, "counts": {"num": 3}}},
    },
    "environment.json": {"versions": {"ray": None}, "nodes": [{"cpus": 2.0}], "on_hub": []},
    "evaluation.json": {
        "sets": {
            "dev": {
                "student": {
                    "rouge_l": {"mean": 1.0, "std": float("nan"), "by_seed": {"10": 1}},
                    "greedy": {"rouge_l": 2.0},
                    "num_rows": 10,
                }
            },
            "text": {"student": {"perplexity": 3.5, "ce_loss": None}},
        },
        "tasks": {"arc": {"arc": {"student": {"metrics": {"acc,none": METRIC}, "group": None, "num_fewshot": 0}}}},
    },
    "pairs.json": {"seeds": [1, 2], "sets": {"dev": {"rouge_l": {"student": [1.0], "difference": DIFFERENCE}}}},
    "plan.json": {"num_rows": 8, "bucket_ends": [8], "global_batch_rows": 4, "stages": [STAGE]},
    "race.json": {
        "winner": "plain",
        "num_steps": 3,
        "plan": {"num_steps": 2, "most_steps": 4},
        "decisions": [{}],
        "stages": [STAGE],
    },
    "rows/summary.json": {"sets": {"train": SUMMARY, "dev": SUMMARY, "held_out": SUMMARY}, "leaks": {"dev": 0}},
    "responses/summary.json": SUMMARY,
    "responses/for_teacher/summary.json": SUMMARY,
}
NO_JSON = (b"", b"{", b"[1, 2]", b"null", b"7", b'"text"', b"\xff\xfe\x00", b"\x00" * 9, b"[" * 100_000)


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDirectory:
    return RunDirectory.open(str(tmp_path), "run")


def refused(run_dir: RunDirectory, rel: str, content: bytes) -> str:
    run_dir.write_bytes(rel, content)
    with pytest.raises(StorageError) as caught:
        run_dir.read_json(rel)
    line = str(caught.value)
    assert line.startswith(f"{run_dir.uri_of(rel)}: ") and "\n" not in line
    return line


def test_every_shape_takes_what_a_run_writes(run_dir: RunDirectory) -> None:
    assert set(CONTENTS) == set(SHAPES)
    for rel, content in CONTENTS.items():
        run_dir.write_json(rel, content)
        assert str(run_dir.read_json(rel)) == str(content), "as a text, since NaN is not equal to itself"


@pytest.mark.parametrize("rel", [*CONTENTS, "student/any.json"])
def test_what_is_no_json_object_is_told_in_one_line(run_dir: RunDirectory, rel: str) -> None:
    for content in NO_JSON:
        assert "cannot be read, it is damaged (" in refused(run_dir, rel, content)
    refused(run_dir, rel, json.dumps(CONTENTS.get(rel, {"a": 1})).encode()[:-3])


WRONG: tuple[tuple[str, str, Any], ...] = (
    ("manifest.json", "steps", []),
    ("manifest.json", "steps.rows", None),
    ("manifest.json", "steps.rows.status", 1),
    ("manifest.json", "steps.rows.outputs", "rows"),
    ("manifest.json", "steps.rows.seconds", "12.5"),
    ("manifest.json", "steps.rows.counts.num", [1]),
    ("environment.json", "on_hub", 7),
    ("environment.json", "nodes.0", 7),
    ("evaluation.json", "sets", []),
    ("evaluation.json", "sets.dev", [1]),
    ("evaluation.json", "sets.dev.student", None),
    ("evaluation.json", "sets.dev.student.rouge_l", 12.5),
    ("evaluation.json", "sets.dev.student.rouge_l.mean", "12.5"),
    ("evaluation.json", "sets.dev.student.rouge_l.by_seed", [1]),
    ("evaluation.json", "sets.dev.student.greedy.rouge_l", "x"),
    ("evaluation.json", "tasks.arc.arc", {}),
    ("evaluation.json", "tasks.arc.arc.student.metrics", None),
    ("pairs.json", "seeds.0", "one"),
    ("pairs.json", "sets.dev.rouge_l.difference.low", None),
    ("plan.json", "stages.0.kd_temperature", "1.0"),
    ("plan.json", "bucket_ends", 8),
    ("plan.json", "num_rows", float("nan")),
    ("race.json", "decisions", []),
    ("race.json", "plan.num_steps", 0),
    ("rows/summary.json", "sets.held_out", 3),
    ("rows/summary.json", "sets.dev.num_rows", "8"),
    ("rows/summary.json", "sets.train.of_a_later_version", 1),
    ("rows/summary.json", "leaks", 3),
)


@pytest.mark.parametrize(("rel", "key", "value"), WRONG)
def test_a_value_of_another_type_is_named_by_its_key(run_dir: RunDirectory, rel: str, key: str, value: Any) -> None:
    content: Any = json.loads(json.dumps(CONTENTS[rel]))  # sets of one summary share it otherwise
    *parents, leaf = (int(part) if part.isdigit() else part for part in key.split("."))
    node = content
    for parent in parents:
        node = node[parent]
    node[leaf] = value
    line = refused(run_dir, rel, json.dumps(content).encode())
    assert f"it is damaged ({key}" in line and "delete it" in line


def test_a_manifest_of_another_version_is_told_from_a_damaged_one(run_dir: RunDirectory) -> None:
    assert ManifestFile.model_fields["version"].annotation.__args__ == (VERSION,)  # type: ignore[union-attr]
    for content in ({"version": VERSION + 1, "steps": 3}, {"version": "1", "steps": {}}, {"steps": {}}):
        run_dir.write_json("manifest.json", content)
        with pytest.raises(StorageError, match="written by another version of pocl-ray; read it with that one"):
            Manifest(run_dir)
    assert "put a copy in its place, or delete it: every step then runs again" in refused(run_dir, "manifest.json", b"")


def test_text_and_tables_that_cannot_be_read_are_named(run_dir: RunDirectory) -> None:
    run_dir.write_bytes("evaluation.json", b"\xff")
    with pytest.raises(StorageError, match=r"evaluation\.json: cannot be read, it is damaged \('utf-8'"):
        run_dir.read_text("evaluation.json")
    run_dir.write_table("scores.parquet", pa.table({"rank": [1, 2]}))
    assert run_dir.read_table("scores.parquet")["rank"].to_pylist() == [1, 2]
    content = run_dir.read_bytes("scores.parquet")
    for damage in (b"", content[: len(content) // 2], b"PAR1", b"\x00" * 100):
        run_dir.write_bytes("scores.parquet", damage)
        with pytest.raises(StorageError, match=r"scores\.parquet: cannot be read, it is damaged .*delete it to have"):
            run_dir.read_table("scores.parquet")
    with pytest.raises(StorageError, match=r"none\.parquet: no such file"):
        run_dir.read_table("none.parquet")
