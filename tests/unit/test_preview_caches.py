"""The output of `plan` about the teacher caches before anything is prepared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pocl_ray.config import Config, TeacherConfig
from pocl_ray.errors import ModelError
from pocl_ray.preview import _teacher_width, print_plan


def said(folder: Path, capsys: pytest.CaptureFixture[str], first: str | None = None, **distill: Any) -> str:
    (folder / "teacher").mkdir()
    (folder / "teacher" / "config.json").write_text(json.dumps({"hidden_size": 4096}))
    tree = {
        "name": "run",
        "storage_path": str(folder / "runs"),
        "data": {"train": {"path": "train.jsonl"}, "dev": {"path": "dev.jsonl"}},
        "teacher": [{"path": first or str(folder / "teacher")}, {"path": str(folder / "elsewhere")}],
        "student": {"num_layers": 2},
        "distill": distill,
    }
    print_plan(Config.model_validate(tree), 1000)
    return capsys.readouterr().out


def test_a_top_k_cache_takes_the_same_of_every_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(tmp_path, capsys, teacher_cache="topk")
    assert "teacher cache: 428 bytes a response token" in text
    assert "teacher cache 2: 428 bytes a response token" in text
    assert not (tmp_path / "runs").exists()


def test_hidden_states_take_the_width_of_each_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(tmp_path, capsys, cache_dtype="float32")
    assert "teacher cache: 16,384 bytes a response token" in text
    assert "teacher cache 2: its size is known once the teacher's config can be read" in text


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff\xfe", b'{"hidden_size": "wide"}'])
def test_a_teachers_config_that_is_none_is_told_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"^teacher\.path: .*config\.json: is no config of a model") as refused:
        _teacher_width(TeacherConfig(path=str(tmp_path)))
    assert "\n" not in str(refused.value)


def test_the_width_of_a_shipped_teacher_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(tmp_path, capsys, first="samples://quickstart-teacher", cache_dtype="float32")
    assert "teacher cache: 512 bytes a response token" in text
