"""A directory that Ray cannot use is refused in one line before Ray starts."""

from pathlib import Path

import pytest

from pocl_ray.errors import StorageError
from pocl_ray.ray_cluster import session


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_TMPDIR", "TMPDIR", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))

    def init(**options: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(session.ray, "init", init)


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_directory_that_is_too_long_for_a_socket_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "/tmp/" + "a" * 100)
    with pytest.raises(StorageError, match=rf"^{name} /tmp/a+: 105 bytes, too long .* set RAY_TMPDIR to a shorter"):
        session.connect(None)


def test_a_short_ray_tmpdir_is_used_in_place_of_a_long_tmpdir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/tmp/" + "a" * 100)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    session.check_places()


def test_bytes_are_counted_and_not_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    room = session.SOCKET_BYTES - len(session.BELOW_TMPDIR)
    monkeypatch.setenv("TMPDIR", "/" + "a" * (room - 1))
    session.check_places()
    monkeypatch.setenv("TMPDIR", "/" + "ä" * (room - 1))
    with pytest.raises(StorageError, match="too long"):
        session.check_places()


def test_a_home_that_cannot_be_made_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(StorageError, match=r"^HOME .*/file/home: Ray keeps its token there.* set HOME to a directory"):
        session.connect(None)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "own")
    session.check_places()


def test_a_cluster_that_runs_already_needs_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/tmp/" + "a" * 100)
    with pytest.raises(AssertionError, match="Ray was started"):
        session.connect("10.0.0.1:6379")
