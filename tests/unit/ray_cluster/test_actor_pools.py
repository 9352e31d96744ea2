"""The resources that a pool of actors requests from Ray, and its number of actors."""

from __future__ import annotations

from typing import Any

import pytest

from pocl_ray.config import ScalingConfig
from pocl_ray.errors import ResourceError
from pocl_ray.ray_cluster import capacity
from pocl_ray.ray_cluster.actor_pools import plan_pools


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
