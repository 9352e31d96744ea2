"""Garbage collection waits while a process imports, and comes back in any case."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator

import pytest

from pocl_ray.ray_cluster import session, startup


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
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
