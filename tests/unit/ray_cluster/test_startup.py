"""Garbage collection waits while a process imports, and comes back in any case; torch is told how to use memory."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pocl_ray.ray_cluster import session, startup

HUGE, CAPACITY = "THP_MEM_ALLOC_ENABLE", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (HUGE, CAPACITY):
        monkeypatch.setenv(name, "")  # so that it is taken back
        monkeypatch.delenv(name)
    yield
    startup.collect_again()
    gc.unfreeze()
    gc.enable()


def test_collections_come_back_when_imports_are_over() -> None:
    startup.put_off_collections()
    assert not gc.isenabled()
    startup.collect_again()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0, "what is imported is not looked through any more"


def test_they_come_back_by_themselves() -> None:
    startup.put_off_collections(at_most_s=0.01)
    deadline = time.monotonic() + 60
    while not gc.isenabled():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_user_who_collects_nothing_is_left_alone() -> None:
    gc.disable()
    startup.put_off_collections()
    startup.collect_again()
    assert not gc.isenabled()


def test_a_process_of_ray_puts_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for of_the_cluster in ("know_the_cluster", "end_with_the_node"):
        monkeypatch.setattr(session, of_the_cluster, lambda: None)
    session.set_up_worker()
    assert not gc.isenabled()
    assert CAPACITY in os.environ and (HUGE in os.environ) == startup.HUGE_PAGES.exists()


def test_memory_is_as_the_user_has_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HUGE, "0")
    monkeypatch.setenv(CAPACITY, "1024")
    startup.set_up_memory()
    assert (os.environ[HUGE], os.environ[CAPACITY]) == ("0", "1024")


def test_huge_pages_are_asked_for_only_where_the_kernel_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup, "HUGE_PAGES", tmp_path / "none")
    startup.set_up_memory()
    assert HUGE not in os.environ and CAPACITY in os.environ
    (tmp_path / "none").write_text("always [madvise] never\n")
    startup.set_up_memory()
    assert os.environ[HUGE] == "1"
