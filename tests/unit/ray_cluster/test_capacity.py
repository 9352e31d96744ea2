"""The nodes that count, the room on them, and waiting for a cluster that grows; without a cluster."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pocl_ray.config import ScalingConfig
from pocl_ray.errors import ResourceError
from pocl_ray.ray_cluster import capacity
from pocl_ray.ray_cluster.capacity import carries, room_for, usable_nodes, wait_for_room, wants_gpu

CPU = {"CPU": 1.0}


class Cluster:
    """A cluster that grows by what comes at given seconds after it was first asked for anything."""

    def __init__(self, nodes: list[dict[str, Any]], comes: dict[float, dict[str, Any]] | None = None) -> None:
        self.here, self.comes = nodes, comes or {}
        self.now, self.asked_at = 0.0, float("inf")
        self.asked: list[tuple[list[dict[str, float]], list[dict[str, str]]]] = []

    def nodes(self) -> list[dict[str, Any]]:
        came = [node for after, node in self.comes.items() if self.now >= self.asked_at + after]
        everything = enumerate([*self.here, *came])
        return [{"NodeID": str(n), "Alive": True, "Labels": {}, "Resources": CPU, **node} for n, node in everything]

    def request(self, bundles: list[dict[str, float]], bundle_label_selectors: list[dict[str, str]]) -> None:
        self.asked.append((bundles, bundle_label_selectors))
        self.asked_at = min(self.asked_at, self.now)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a cluster in the place of Ray's; `alone`: it is this process's own."""

    def put(cluster: Cluster, alone: bool = False) -> Cluster:
        monkeypatch.setattr(capacity.ray, "nodes", cluster.nodes)
        monkeypatch.setattr(capacity, "request_resources", cluster.request)
        monkeypatch.setattr(capacity, "is_one_machine", lambda: alone)
        monkeypatch.setattr(capacity, "time", SimpleNamespace(monotonic=lambda: cluster.now, sleep=cluster.sleep))
        return cluster

    return put


def count() -> int:
    return room_for(CPU, list(usable_nodes({}).values()))


@pytest.mark.parametrize(
    ("selector", "chosen"),
    [("gpu", ["a"]), ("!gpu", ["b", "bare"]), ("in(gpu, spot)", ["a", "b"]), ("!in(gpu,other)", ["b", "bare"])],
)
def test_nodes_are_chosen_by_their_labels_as_ray_does(selector: str, chosen: list[str]) -> None:
    nodes = {"a": {"pool": "gpu"}, "b": {"pool": "spot"}, "bare": {}}
    assert [name for name, labels in nodes.items() if carries(labels, {"pool": selector})] == chosen


def test_dead_nodes_and_those_without_the_label_do_not_count(use: Any) -> None:
    use(Cluster([{"Alive": False}, {"Labels": {"pool": "gpu"}}, {}]))
    assert list(usable_nodes({})) == ["1", "2"]
    assert list(usable_nodes({"pool": "gpu"})) == ["1"]


def test_where_there_is_room_nothing_is_asked_for(use: Any) -> None:
    cluster = use(Cluster([{}, {}]))
    assert wait_for_room(count, 1, [CPU] * 8, ScalingConfig()) == 2
    assert cluster.asked == []


def test_a_cluster_is_asked_for_all_that_is_wanted_and_the_request_is_taken_back(use: Any) -> None:
    cluster = use(Cluster([], comes={5.0: {}, 20.0: {}}))
    scaling = ScalingConfig.model_validate({"labels": {"pool": "gpu"}})
    assert wait_for_room(count, 2, [CPU, CPU], scaling) == 2
    assert cluster.now == 20.0
    assert cluster.asked == [([CPU, CPU], [{"pool": "gpu"}] * 2), ([], [])]


def test_less_than_all_is_enough_once_nothing_more_comes(use: Any) -> None:
    cluster = use(Cluster([], comes={5.0: {}, 20.0: {}, 45.0: {}}))
    assert wait_for_room(count, 1, [CPU] * 8, ScalingConfig(start_timeout_s=600)) == 3
    assert 45.0 + capacity.SETTLE_S < cluster.now < 600.0


def test_waiting_ends_and_a_machine_alone_does_not_wait(use: Any) -> None:
    cluster = use(Cluster([]))
    assert wait_for_room(count, 1, [CPU], ScalingConfig(start_timeout_s=60)) == 0
    assert cluster.now == 60.0
    cluster = use(Cluster([]), alone=True)
    assert wait_for_room(count, 1, [CPU], ScalingConfig()) == 0
    assert (cluster.now, cluster.asked) == (0.0, [])


def test_a_gpu_that_is_asked_for_is_waited_for(use: Any) -> None:
    gpu = {"Resources": {"CPU": 8.0, "GPU": 1.0}}
    cluster = use(Cluster([{}], comes={100.0: gpu}))
    assert not wants_gpu(ScalingConfig())
    assert not wants_gpu(ScalingConfig(use_gpu=False))
    assert wants_gpu(ScalingConfig(use_gpu=True, start_timeout_s=600))
    assert cluster.asked[0][0] == [{"GPU": 1.0}]
    assert wants_gpu(ScalingConfig())
    with pytest.raises(ResourceError, match="no GPU on nodes labelled pool=spot; set it to false"):
        wants_gpu(ScalingConfig.model_validate({"use_gpu": True, "labels": {"pool": "spot"}}))


@pytest.mark.parametrize(
    ("placement", "num_workers"), [("PACK", 3), ("SPREAD", 3), ("STRICT_PACK", 2), ("STRICT_SPREAD", 2)]
)
def test_a_worker_is_not_cut_across_nodes(placement: str, num_workers: int) -> None:
    nodes = [{"CPU": 5.0, "GPU": 4.0}, {"CPU": 3.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 8.0}]
    assert room_for({"CPU": 2.0, "GPU": 1.0}, nodes, placement) == num_workers
