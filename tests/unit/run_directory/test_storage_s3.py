"""The run directory on an object store: a real S3 server process on loopback, found through the environment."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pocl_ray.errors import StorageError
from pocl_ray.run_directory.manifest import Manifest, StepResult
from pocl_ray.run_directory.storage import RunDirectory, localize

ACTIONS_BEFORE_AUTHENTICATION = b"1000000000"


@pytest.fixture
def run_dir(s3_bucket: str) -> RunDirectory:
    return RunDirectory.open(f"{s3_bucket}/runs", "tiny")


@pytest.fixture
def guarded(s3_server: str) -> Iterator[None]:
    """The server checks credentials while the test runs."""
    _authenticate(s3_server, b"0")
    yield
    _authenticate(s3_server, ACTIONS_BEFORE_AUTHENTICATION)


def _authenticate(server: str, after_actions: bytes) -> None:
    url, headers = f"{server}/moto-api/reset-auth", {"Content-Type": "text/plain"}
    urllib.request.urlopen(urllib.request.Request(url, after_actions, headers), timeout=30).close()


def test_what_is_written_is_read_back(run_dir: RunDirectory) -> None:
    run_dir.write_json("a/b.json", {"x": [1, 2]})
    assert run_dir.read_json("a/b.json") == {"x": [1, 2]}
    run_dir.write_text("a/b.json", "replaced")
    assert run_dir.read_text("a/b.json") == "replaced"
    assert run_dir.exists("a/b.json")
    assert run_dir.exists("a")
    assert not run_dir.exists("a/c.json")


def test_a_directory_is_published_whole_and_copied_to_the_node_once(run_dir: RunDirectory, tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "deep").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "deep" / "weights").write_bytes(b"\0" * 1000)
    run_dir.publish(model, "student")
    copy = run_dir.local("student")
    assert (copy / "deep" / "weights").read_bytes() == b"\0" * 1000
    assert run_dir.local("student") == copy
    (model / "deep" / "weights").unlink()
    run_dir.publish(model, "student")
    newer = run_dir.local("student")
    assert newer != copy
    assert sorted(path.name for path in newer.rglob("*") if path.is_file()) == ["config.json"]


def test_a_single_file_is_copied_to_the_node(run_dir: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "table").write_bytes(b"rows")
    run_dir.publish(tmp_path / "table", "scores/table")
    assert run_dir.local("scores/table").read_bytes() == b"rows"
    assert Path(localize(run_dir.uri_of("scores/table"))).read_bytes() == b"rows"


def test_a_broken_off_copy_is_made_again(run_dir: RunDirectory) -> None:
    run_dir.write_bytes("table", b"rows")
    copy = run_dir.local("table")
    copy.write_bytes(b"ro")
    (copy.parent / ".complete").unlink()
    assert run_dir.local("table").read_bytes() == b"rows"


def test_deleting_takes_all_below_and_a_missing_place_is_no_error(run_dir: RunDirectory) -> None:
    run_dir.write_text("cache/one", "1")
    run_dir.write_text("cache/two", "2")
    run_dir.delete("cache")
    assert not run_dir.exists("cache/one")
    assert not run_dir.exists("cache/two")
    run_dir.delete("cache")


def test_a_finished_step_is_known_to_the_next_process(run_dir: RunDirectory) -> None:
    def work(_: str) -> StepResult:
        run_dir.write_text("out", "done")
        return StepResult(["out"], {})

    Manifest(run_dir).run("step", ["settings"], work)
    assert Manifest(run_dir).run("step", ["settings"], work)[1] is None


def test_a_missing_bucket_is_named(s3_bucket: str) -> None:
    with pytest.raises(StorageError, match=r"s3://no-such-bucket-here: there is no such bucket"):
        RunDirectory.open("s3://no-such-bucket-here/runs", "tiny")


def test_a_bucket_that_is_closed_to_us_is_named(s3_bucket: str, guarded: None) -> None:
    with pytest.raises(StorageError, match=rf"{s3_bucket}: cannot be used .*credentials"):
        RunDirectory.open(f"{s3_bucket}/runs", "tiny")


def test_a_missing_object_is_named_in_one_line(run_dir: RunDirectory) -> None:
    with pytest.raises(StorageError, match=r"s3://.*/nothing: no such file") as caught:
        run_dir.read_bytes("nothing")
    assert "\n" not in str(caught.value)
    with pytest.raises(StorageError, match="no such file or directory"):
        run_dir.local("nothing")
