from __future__ import annotations

import pytest

from pocl_ray.ray_cluster.capacity import trials_at_once


@pytest.mark.parametrize(
    ("nodes", "num_workers", "placement", "expected"),
    [
        ([{"CPU": 2.0}], 1, "PACK", 2),
        ([{"CPU": 2.0}], 2, "PACK", 1),
        ([{"CPU": 3.0}, {"CPU": 1.0}], 2, "PACK", 2),
        ([{"CPU": 3.0}, {"CPU": 1.0}], 2, "STRICT_PACK", 1),
        ([{"CPU": 3.0}, {"CPU": 1.0}], 2, "STRICT_SPREAD", 1),
        ([{"CPU": 3.0}, {"CPU": 3.0}], 2, "STRICT_SPREAD", 3),
        ([{"CPU": 0.5}, {"CPU": 0.5}], 1, "PACK", 0),
        ([{"memory": 1.0}], 1, "SPREAD", 0),
    ],
)
def test_as_many_trials_as_there_is_room_for(
    nodes: list[dict[str, float]], num_workers: int, placement: str, expected: int
) -> None:
    assert trials_at_once(nodes, {"CPU": 1.0}, num_workers, placement) == expected  # type: ignore[arg-type]


def test_the_scarcest_resource_counts() -> None:
    assert trials_at_once([{"CPU": 64.0, "GPU": 3.0}], {"CPU": 2.0, "GPU": 1.0}, 1, "PACK") == 3
    assert trials_at_once([{"CPU": 4.0}], {"CPU": 1.0, "GPU": 0.0}, 2, "PACK") == 2
