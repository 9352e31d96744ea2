"""Machines that run other code than the driver are named before anything is trained."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from pocl_ray.errors import ResourceError
from pocl_ray.ray_cluster import versions as versions_module
from pocl_ray.ray_cluster.versions import COMPARED, check_same, versions


def test_the_same_versions_pass() -> None:
    here = versions()
    assert set(here) == {"python", "pocl-ray", *COMPARED}
    check_same(here, dict(here), "node 10.0.0.4")


def test_what_differs_is_named_with_both_versions() -> None:
    other = {**versions(), "torch": "1.0", "pocl-ray": "0123"}
    with pytest.raises(ResourceError) as refused:
        check_same(versions(), other, "node 10.0.0.4")
    message = str(refused.value)
    assert message.startswith("node 10.0.0.4 runs other code: pocl-ray 0123 (here ")
    assert f"torch 1.0 (here {versions()['torch']})" in message
    assert "deepspeed" not in message


def test_a_node_without_the_project_is_named() -> None:
    with pytest.raises(ResourceError, match="pocl-ray none, or an older one"):
        check_same(versions(), {"pocl-ray": "none, or an older one"}, "node 10.0.0.4")


def test_a_digest_waits_until_the_files_stand_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.py").write_text("1")
    whole = versions_module._digest(tmp_path)
    looks = iter(["", "half", "half and more", whole, whole])
    monkeypatch.setattr(versions_module, "BETWEEN_LOOKS_S", 0.0)
    monkeypatch.setattr(versions_module, "_digest_now", lambda _: next(looks))
    assert versions_module._digest(tmp_path) == whole


def test_files_that_never_stand_still_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions_module, "BETWEEN_LOOKS_S", 0.0)
    monkeypatch.setattr(versions_module, "_digest_now", lambda _: "")
    with pytest.raises(ResourceError, match="keep changing"):
        versions_module._digest(tmp_path)


def test_a_folder_that_is_empty_for_a_moment_has_no_digest_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "later").write_text("x = 1", encoding="utf-8")  # as while Ray unpacks a job's files
    looks = []

    def unpack(_: float) -> None:
        looks.append(versions_module._digest_now(tmp_path))
        if len(looks) == 3:
            (tmp_path / "later").rename(tmp_path / "module.py")

    monkeypatch.setattr(versions_module.time, "sleep", unpack)
    assert versions_module._digest(tmp_path) == versions_module._digest_now(tmp_path)
    assert looks[:3] == ["", "", ""]


def test_a_folder_that_vanishes_while_it_is_walked_has_no_digest_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one.py").write_text("1")

    def vanish(self: Path, pattern: str) -> Iterator[Path]:
        yield self / "one.py"
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(self / "room"))

    with monkeypatch.context() as walked:
        walked.setattr(Path, "rglob", vanish)
        assert versions_module._digest_now(tmp_path) == ""
    assert versions_module._digest_now(tmp_path) != ""
