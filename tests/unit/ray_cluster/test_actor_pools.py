"""The resources that a pool of actors requests from Ray, its number of actors, and the progress of a job."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from pocl_ray.config import ScalingConfig
from pocl_ray.console import Bar
from pocl_ray.errors import ResourceError
from pocl_ray.ray_cluster import actor_pools, capacity
from pocl_ray.ray_cluster.actor_pools import Work, plan_pools, stream


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put nodes in the place of the cluster's, which does not grow."""

    def put(*resources: dict[str, float], **labels: str) -> None:
        made = [{"NodeID": str(n), "Alive": True, "Labels": labels, "Resources": r} for n, r in enumerate(resources)]
        monkeypatch.setattr(capacity.ray, "nodes", lambda: made)
        monkeypatch.setattr(capacity, "is_one_machine", lambda: True)

    return put


def test_pools_share_what_there_is_and_no_actor_is_cut_across_nodes(nodes: Any) -> None:
    nodes({"CPU": 3.0}, {"CPU": 3.0})
    assert [pool.size for pool in plan_pools(ScalingConfig(), [2, 8], 100)] == [2, 4]
    assert [pool.size for pool in plan_pools(ScalingConfig(cpus_per_actor=2), [2, 8], 100)] == [1, 1]
    assert [pool.size for pool in plan_pools(ScalingConfig(), [2, 8], 1)] == [1, 1]


def test_actors_ask_for_what_the_config_says(nodes: Any) -> None:
    nodes({"CPU": 8.0, "GPU": 2.0, "accelerator_type:H100": 1.0, "fast_disk": 1.0}, pool="gpu")
    asked = {"accelerator_type": "H100", "labels": {"pool": "gpu"}, "resources_per_actor": {"fast_disk": 0.5}}
    (pool,) = plan_pools(ScalingConfig.model_validate(asked), [8], 100)
    assert pool.size == 2
    options = pool.options()
    assert options["num_gpus"] == 1.0
    assert options["accelerator_type"] == "H100"
    assert options["resources"] == {"fast_disk": 0.5}
    assert options["label_selector"] == {"pool": "gpu"}


def test_what_is_not_asked_for_is_not_said(nodes: Any) -> None:
    nodes({"CPU": 1.0})
    (pool,) = plan_pools(ScalingConfig(), [1], 1)
    assert set(pool.options()) == {"compute", "num_cpus", "batch_size", "batch_format"}


def test_too_little_room_is_told_with_the_labels_of_the_nodes(nodes: Any) -> None:
    nodes({"CPU": 8.0}, pool="cpu")
    with pytest.raises(ResourceError, match="room for 0 on nodes labelled pool=gpu; lower"):
        plan_pools(ScalingConfig.model_validate({"labels": {"pool": "gpu"}}), [1, 1], 1)


def test_another_kind_of_gpu_is_no_room(nodes: Any) -> None:
    nodes({"CPU": 8.0, "GPU": 8.0, "accelerator_type:A100": 1.0})
    with pytest.raises(ResourceError, match="accelerator_type:H100"):
        plan_pools(ScalingConfig(accelerator_type="H100"), [1], 1)


class SlowJob:
    """A data set whose actors get on for a while before the first of two results comes out."""

    def __init__(self, done: list[int], seen: list[int]) -> None:
        self.done, self.seen = done, seen

    def iter_batches(self, **_: Any) -> Iterator[pa.Table]:
        for number in (3, 7, 5):  # an actor that dies takes its count with it
            self.done[0] = number
            deadline = time.monotonic() + 20.0
            while number not in self.seen and number != 5 and time.monotonic() < deadline:
                time.sleep(0.01)
        yield pa.table({"id": [0, 1]})
        self.done[0] = 99
        while 12 not in self.seen and time.monotonic() < deadline:
            time.sleep(0.01)
        yield pa.table({"id": [2]})


def test_the_bar_follows_the_actors_before_a_result_comes_out_and_never_goes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[int] = []

    class Recorded(Bar):
        def update(self, done: int, total: int | None = None, note: str | None = None) -> None:
            super().update(done, total, note)
            shown.append(done)

    bar = Recorded("scores", 12, "passes", None)

    @contextmanager
    def recorded(name: str, total: int | None, unit: str) -> Iterator[Bar]:
        assert (name, total, unit) == ("scores", 12, "passes")
        yield bar

    monkeypatch.setattr(actor_pools, "progress_bar", recorded)
    monkeypatch.setattr(actor_pools, "PLAIN_INTERVAL_S", 0.02)
    done = [0]
    work = Work(12, "passes", lambda: done[0])
    job: Any = SlowJob(done, shown)
    tables = list(stream(job, "scores", 3, "rows", work))
    assert [table.num_rows for table in tables] == [2, 1]
    assert shown == sorted(shown) and {3, 7, 12} <= set(shown) and max(shown) == 12
    assert bar.note == "3 of 3 rows done" and bar.first == 3, "the rate begins with the first batch"


def test_a_job_that_counts_nothing_shows_the_rows_that_came_out(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[int, str]] = []
    monkeypatch.setattr(Bar, "update", lambda bar, done, *_: shown.append((done, bar.unit)))
    job: Any = SimpleNamespace(iter_batches=lambda **_: iter([pa.table({"id": [0, 1]}), pa.table({"id": [2]})]))
    assert sum(table.num_rows for table in stream(job, "responses", 3, "rows")) == 3
    assert shown == [(2, "rows"), (3, "rows")]
