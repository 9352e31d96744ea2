"""The run directory: files appear whole or not at all, on a disk and on an object store."""

from __future__ import annotations

import errno
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.fs as pafs
import pytest

from pocl_ray.errors import StorageError
from pocl_ray.run_directory import storage
from pocl_ray.run_directory.digests import file_digest, fingerprint
from pocl_ray.run_directory.storage import RunDirectory, cache_root, localize, replacing, replacing_file, resolve

BUCKET = "s3://bucket"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pafs.FileSystem]:
    """The object store in memory behind `s3://bucket`."""
    memory = fsspec.filesystem("memory")
    filesystem = pafs.PyFileSystem(pafs.FSSpecHandler(memory))

    def fake_resolve(path: str) -> tuple[pafs.FileSystem, str]:
        if path == BUCKET or path.startswith(f"{BUCKET}/"):
            return filesystem, path.removeprefix("s3:/")
        return resolve(path)

    monkeypatch.setattr(storage, "resolve", fake_resolve)
    monkeypatch.setattr(storage, "resolve", fake_resolve)
    monkeypatch.setenv("POCL_RAY_CACHE", str(tmp_path / "cache"))
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    yield filesystem
    memory.store.clear()


@pytest.fixture(params=["disk", "store"])
def run_dir(request: pytest.FixtureRequest, tmp_path: Path, store: pafs.FileSystem) -> RunDirectory:
    return RunDirectory.open(BUCKET if request.param == "store" else str(tmp_path / "disk"), "run")


def files_of(run_dir: RunDirectory) -> dict[str, str]:
    """Every file of a run, hidden and temporary ones too."""
    filesystem, base = storage.resolve(run_dir.uri)
    found = filesystem.get_file_info(pafs.FileSelector(base, recursive=True, allow_not_found=True))
    names = [f.path.removeprefix(f"{base}/") for f in found if f.type == pafs.FileType.File]
    return {name: run_dir.read_text(name) for name in sorted(names)}


def make_tree(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def tree(folder: Path) -> dict[str, str]:
    """Every file, hidden and temporary ones too."""
    return {str(p.relative_to(folder)): p.read_text(encoding="utf-8") for p in folder.rglob("*") if p.is_file()}


def assert_one_line(error: pytest.ExceptionInfo[StorageError], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def full_disk(*args: Any, **options: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# Both kinds of places


def test_what_is_written_is_read_again(run_dir: RunDirectory) -> None:
    run_dir.write_json("deep/er/a.json", {"ä": [1, None]})
    run_dir.write_text("b.txt", "grün\n")
    run_dir.write_bytes("c", b"")
    assert run_dir.read_json("deep/er/a.json") == {"ä": [1, None]}
    assert run_dir.read_text("b.txt") == "grün\n"
    assert run_dir.read_bytes("c") == b""
    assert run_dir.exists("deep/er") and run_dir.exists("c") and not run_dir.exists("d")


def test_writing_again_replaces(run_dir: RunDirectory) -> None:
    run_dir.write_text("a", "a longer text")
    run_dir.write_text("a", "short")
    assert files_of(run_dir) == {"a": "short"}, "and leaves nothing next to it"


def test_a_missing_file_and_one_that_is_no_json_are_named(run_dir: RunDirectory) -> None:
    with pytest.raises(StorageError) as error:
        run_dir.read_bytes("none.json")
    assert_one_line(error, "run/none.json", "no such file")
    run_dir.write_text("bad.json", '{"a": 1')
    with pytest.raises(StorageError) as error:
        run_dir.read_json("bad.json")
    assert_one_line(
        error, "run/bad.json: cannot be read, it is damaged (Invalid JSON", "delete it to have it made again"
    )


def test_a_file_of_a_user_replaces_files_alone_and_a_link_stays(tmp_path: Path) -> None:
    """A rename over /dev/null, by root, would leave a plain file in its place on the whole machine."""
    pipe, folder, link = tmp_path / "pipe", tmp_path / "folder", tmp_path / "link"
    os.mkfifo(pipe)
    folder.mkdir()
    for place, why in (
        (pipe, "it is no file"),
        (folder, "it is a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(StorageError) as refused, replacing_file(place, "--out"):
            pytest.fail("the place was not looked at")
        assert str(refused.value) == f"{place}: cannot be written ({why}); choose another --out"
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    link.symlink_to(tmp_path / "page.html")
    with replacing_file(link, "--out") as new:
        new.write_text("page")
    assert link.is_symlink() and (tmp_path / "page.html").read_text() == "page"


def test_publish_replaces_a_directory_as_a_whole(run_dir: RunDirectory, tmp_path: Path) -> None:
    run_dir.publish(make_tree(tmp_path / "old", a="1", b__c="2"), "models/student")
    run_dir.publish(make_tree(tmp_path / "new", a="3", d="4"), "models/student")
    assert files_of(run_dir) == {"models/student/a": "3", "models/student/d": "4"}
    assert tree(tmp_path / "new") == {"a": "3", "d": "4"}, "what was published stays"


def test_publish_replaces_files_and_kinds(run_dir: RunDirectory, tmp_path: Path) -> None:
    files = make_tree(tmp_path / "files", one="1", two="2")
    for name in ("one", "two"):
        run_dir.publish(files / name, "out")
        assert files_of(run_dir) == {"out": (files / name).read_text()}
    run_dir.publish(files, "out")
    assert files_of(run_dir) == {"out/one": "1", "out/two": "2"}
    run_dir.publish(files / "one", "out")
    assert files_of(run_dir) == {"out": "1"}


def test_delete_takes_files_and_directories_and_minds_no_missing_one(run_dir: RunDirectory) -> None:
    run_dir.write_text("a", "1")
    run_dir.write_text("b/c", "2")
    for rel in ("a", "b", "none"):
        run_dir.delete(rel)
    assert files_of(run_dir) == {}


def test_local_gives_a_path_that_can_be_read(run_dir: RunDirectory, tmp_path: Path) -> None:
    run_dir.publish(make_tree(tmp_path / "made", a="1", b__c="2"), "rows")
    assert tree(run_dir.local("rows")) == {"a": "1", "b/c": "2"}
    assert run_dir.local("rows/a").read_text() == "1"
    assert run_dir.local("rows/a").name == "a", "the ending says what a file is"


# A local disk


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    run_dir = RunDirectory.open(str(tmp_path), "run")
    run_dir.write_text("a", "old")
    monkeypatch.setattr(os, fails, full_disk)
    with pytest.raises(StorageError) as error:
        run_dir.write_text("a", "new")
    assert_one_line(error, f"{run_dir.uri}/a", "cannot be written", "No space left on device")
    assert tree(tmp_path) == {"run/a": "old"}


@pytest.mark.parametrize("fails", ["copytree", "copyfile"])
def test_a_failing_publish_leaves_the_old_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    run_dir = RunDirectory.open(str(tmp_path), "run")
    old, new = make_tree(tmp_path / "old", a="1"), make_tree(tmp_path / "new", a="2")
    is_file = fails == "copyfile"
    run_dir.publish(old / "a" if is_file else old, "out")
    before = tree(Path(run_dir.uri))
    monkeypatch.setattr(storage.shutil, fails, full_disk)
    with pytest.raises(StorageError) as error:
        run_dir.publish(new / "a" if is_file else new, "out")
    assert_one_line(error, f"{run_dir.uri}/out", "No space left on device")
    assert tree(Path(run_dir.uri)) == before


def test_a_directory_half_copied_when_the_disk_fills_is_cleared_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = RunDirectory.open(str(tmp_path), "run")
    copied: list[str] = []
    copy = storage.shutil.copy2

    def fills_up(source: str, target: str, **options: Any) -> Any:
        copied.append(source)
        return copy(source, target, **options) if len(copied) == 1 else full_disk()

    made = make_tree(tmp_path / "made", a="1", b="2")
    monkeypatch.setattr(storage.shutil.copytree, "__defaults__", (False, None, fills_up, False, False))
    with pytest.raises(StorageError) as error:
        run_dir.publish(made, "out")
    assert str(error.value) == (
        f"{run_dir.uri}/out: cannot be written ([Errno 28] No space left on device); make room, or take another "
        "storage_path, and give the same command again"
    )
    assert tree(Path(run_dir.uri)) == {}


def test_a_read_only_disk_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    run_dir = RunDirectory.open(str(tmp_path), "run")
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StorageError) as error:
        run_dir.write_text("a", "new")
    assert_one_line(error, f"{run_dir.uri}/a: cannot be written", "Read-only file system", "mounted for writing")


def test_open_makes_the_directory_only_where_asked_to(tmp_path: Path) -> None:
    assert not Path(RunDirectory.open(str(tmp_path), "a", create=False).uri).exists()
    assert Path(RunDirectory.open(f"file://{tmp_path}", "b").uri).is_dir()


def test_open_expands_the_home_directory_and_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert RunDirectory.open("~/runs", "a").uri == str(tmp_path / "runs" / "a")
    assert RunDirectory.open("runs", "a").uri == str(tmp_path / "runs" / "a")


def test_a_place_that_cannot_be_made_or_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError) as error:
        RunDirectory.open(str(tmp_path / "file"), "run")
    assert_one_line(error, f"{tmp_path}/file/run", "set storage_path elsewhere")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(StorageError) as error:
        RunDirectory.open(str(tmp_path), "run")
    assert_one_line(error, f"{tmp_path}/run", "no permission to write", "set storage_path elsewhere")


# An object store


def test_a_remote_directory_is_opened_without_touching_it(store: pafs.FileSystem) -> None:
    assert RunDirectory.open(f"{BUCKET}/deep/", "run").uri == f"{BUCKET}/deep/run"
    assert files_of(RunDirectory(BUCKET + "/deep")) == {}


@pytest.mark.parametrize("call", ["write_text", "exists", "delete", "publish", "read_bytes", "local"])
def test_a_store_that_refuses_gives_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise OSError("When reading: AWS Error ACCESS_DENIED\nand much more")

    class Refusing:
        type_name = "s3"
        get_file_info = open_output_stream = open_input_file = staticmethod(refuse)

    monkeypatch.setattr(storage, "resolve", lambda path: (Refusing(), path.removeprefix("s3://")))
    run_dir = RunDirectory(f"{BUCKET}/run")
    arguments = {"write_text": ("a", "text"), "publish": (tmp_path, "a")}.get(call, ("a",))
    with pytest.raises(StorageError) as error:
        getattr(run_dir, call)(*arguments)
    assert_one_line(error, f"{BUCKET}/run/a", "ACCESS_DENIED")
    assert "much more" not in str(error.value)


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(StorageError) as error:
        RunDirectory.open("nowhere://bucket", "run").exists("a")
    assert_one_line(error, "nowhere://bucket")


@pytest.fixture
def copies(store: pafs.FileSystem, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The files that were copied from the store."""
    made: list[str] = []
    copy: Callable[..., None] = pafs.copy_files

    def counting(source: str, *args: Any, **options: Any) -> None:
        made.append(source)
        copy(source, *args, **options)

    monkeypatch.setattr(storage.pafs, "copy_files", counting)
    yield made


def write(**files: str) -> None:
    for name, text in files.items():
        RunDirectory(f"{BUCKET}/run").write_text(name.replace("__", "/"), text)


def test_localize_copies_once_and_again_when_the_file_changes(store: pafs.FileSystem, copies: list[str]) -> None:
    write(a="old")
    paths = {localize(f"{BUCKET}/run/a") for _ in range(3)}
    assert len(paths) == 1 and copies == ["/bucket/run/a"]
    write(a="a newer one")
    assert Path(localize(f"{BUCKET}/run/a")).read_text() == "a newer one"
    assert copies == ["/bucket/run/a"] * 2


def test_localize_copies_once_for_all_that_ask_at_the_same_time(store: pafs.FileSystem, copies: list[str]) -> None:
    write(rows__a="1", rows__b="2")
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(localize(f"{BUCKET}/run/rows"))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and len(set(found)) == 1
    assert copies == ["/bucket/run/rows"]
    assert tree(Path(found[0])) == {"a": "1", "b": "2"}


def test_a_copy_that_was_cut_short_is_made_again(
    store: pafs.FileSystem, monkeypatch: pytest.MonkeyPatch, copies: list[str]
) -> None:
    write(rows__a="1")
    with monkeypatch.context() as broken:
        broken.setattr(storage.pafs, "copy_files", full_disk)
        with pytest.raises(StorageError) as error:
            localize(f"{BUCKET}/run/rows")
    assert_one_line(error, f"{BUCKET}/run/rows", "No space left on device")
    assert tree(Path(localize(f"{BUCKET}/run/rows"))) == {"a": "1"}


def test_localize_leaves_local_paths_and_hub_ids_as_they_are(tmp_path: Path) -> None:
    assert localize(str(tmp_path)) == localize(f"file://{tmp_path}") == str(tmp_path)
    assert localize("owner/model") == "owner/model"


def test_localize_names_what_is_missing(store: pafs.FileSystem) -> None:
    with pytest.raises(StorageError) as error:
        localize(f"{BUCKET}/run/none")
    assert_one_line(error, f"{BUCKET}/run/none", "no such file or directory")


def test_the_cache_of_another_user_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCL_RAY_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(StorageError) as error:
        cache_root()
    assert_one_line(error, str(tmp_path), "belongs to another user")


def test_an_error_while_a_new_file_or_directory_is_made_leaves_the_old_one(tmp_path: Path) -> None:
    make_tree(tmp_path, file="old", folder__a="old")
    for name in ("file", "folder"):
        with pytest.raises(RuntimeError), replacing(tmp_path / name) as new:
            if name == "file":
                new.write_text("half")
            else:
                make_tree(new, a="half")
            raise RuntimeError
    assert tree(tmp_path) == {"file": "old", "folder/a": "old"}
    with replacing(tmp_path / "folder") as new:
        make_tree(new, b="new")
    assert tree(tmp_path) == {"file": "old", "folder/b": "new"}


def test_an_error_between_the_two_renames_of_a_directory_leaves_the_old_one(tmp_path: Path) -> None:
    make_tree(tmp_path, folder__a="old")
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "folder"):
        pass  # the new directory is missing, so the second rename fails
    assert tree(tmp_path) == {"folder/a": "old"}


def test_no_other_module_renames_files_by_hand() -> None:
    package = Path(storage.__file__).resolve().parents[1]
    by_hand = re.compile(
        r"os\.(replace|rename)\(|\.rename\(|\.move\(|shutil\.move|\.replace\((path|target|directory)\)"
    )
    found = {
        str(p.relative_to(package)) for p in package.rglob("*.py") if by_hand.search(p.read_text(encoding="utf-8"))
    }
    assert found == {"run_directory/storage.py"}


# Digests


def test_a_fingerprint_minds_values_and_not_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    different = [{"a": 1}, {"a": 2}, {"a": None}, {"a": "1"}, {"a": [1]}, {}, [], [{}]]
    assert len({fingerprint(value) for value in different}) == len(different)


def test_a_file_digest_minds_the_content_alone(tmp_path: Path) -> None:
    make_tree(tmp_path, a="1", b="1", c="2")
    assert file_digest(tmp_path / "a") == file_digest(tmp_path / "b") != file_digest(tmp_path / "c")


@pytest.mark.parametrize(
    ("path", "says"),
    [("~no-such-user-here/runs", "no such home directory; write the path in full"), ("a\0b", "no NUL character")],
)
def test_a_path_that_cannot_be_is_told_in_one_line(path: str, says: str) -> None:
    for use in (resolve, lambda path: RunDirectory.open(path, "run")):
        with pytest.raises(StorageError, match=says):
            use(path)
