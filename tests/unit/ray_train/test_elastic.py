"""The number of workers of an elastic run, and the time of its changes; decisions alone, without a cluster."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision

from pocl_ray.errors import ResourceError
from pocl_ray.ray_train import policies
from pocl_ray.ray_train.policies import ElasticPolicy, largest_share

ONE = {"CPU": 1.0}


class Policy(ElasticPolicy):
    """A policy for which `nodes` are there; None: nobody answers."""

    nodes: list[dict[str, float]] | None

    def __init__(self, nodes: list[dict[str, float]] | None, patience_s: float = 100.0, **config: Any) -> None:
        given = {"num_workers": (2, 8), "elastic_resize_monitor_interval_s": 10.0, **config}
        super().__init__(ScalingConfig(**given), global_batch_rows=16, patience_s=patience_s)
        self.nodes = nodes

    def _maybe_send_resource_request(self) -> None:
        pass

    def _get_reserved_resources(self) -> Any:
        return None if self.nodes is None else dict(enumerate(self.nodes))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that sleeping moves on."""
    now = SimpleNamespace(s=1000.0)

    def sleep(seconds: float) -> None:
        now.s += seconds

    monkeypatch.setattr(policies, "time", SimpleNamespace(monotonic=lambda: now.s, sleep=sleep))
    return now


def running(policy: Policy, num_workers: int, has_checkpoint: bool) -> Any:
    report = SimpleNamespace(checkpoint="somewhere" if has_checkpoint else None)
    status = SimpleNamespace(worker_statuses={0: SimpleNamespace(training_report=report)})
    state = SimpleNamespace(start_time=0.0, num_workers=num_workers)
    return policy.make_decision_for_running_worker_group(state, status)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("possible", "least", "rows", "expected"),
    [(8, 1, 16, 8), (7, 1, 16, 4), (3, 2, 16, 2), (3, 3, 16, 0), (1, 2, 16, 0), (0, 1, 16, 0), (3, 2, 15, 3)],
)
def test_the_workers_share_a_batch_evenly(possible: int, least: int, rows: int, expected: int) -> None:
    assert largest_share(possible, least, rows) == expected


def test_it_starts_with_what_there_is_room_for(clock: SimpleNamespace) -> None:
    decision = Policy([{"CPU": 4.0}, {"CPU": 3.5}]).make_decision_for_non_running_worker_group()
    assert isinstance(decision, ResizeDecision)
    assert decision.num_workers == 4  # of the 7 that fit, since 7 do not divide 16


def test_placement_and_fractions_of_a_cpu_count(clock: SimpleNamespace) -> None:
    nodes = [{"CPU": 4.0}] * 3
    spread = Policy(nodes, placement_strategy="STRICT_SPREAD")
    assert spread._count_possible_workers(dict(enumerate(nodes))) == 2  # type: ignore[arg-type]
    tenth = Policy(nodes, resources_per_worker={"CPU": 0.1})
    assert tenth._count_possible_workers({0: {"CPU": 0.8}}) == 8  # type: ignore[dict-item]


def test_too_few_nodes_for_too_long_end_the_run_with_the_reason(clock: SimpleNamespace) -> None:
    policy = Policy([ONE], patience_s=5.0)
    for _ in range(5):
        assert isinstance(policy.make_decision_for_non_running_worker_group(), NoopDecision)
    clock.s += 1
    with pytest.raises(ResourceError, match="no room for 2 workers since 5 s"):
        policy.make_decision_for_non_running_worker_group()


def test_the_patience_begins_anew_after_a_start(clock: SimpleNamespace) -> None:
    policy = Policy([ONE], patience_s=5.0)
    assert isinstance(policy.make_decision_for_non_running_worker_group(), NoopDecision)
    policy.nodes = [ONE, ONE]
    assert isinstance(policy.make_decision_for_non_running_worker_group(), ResizeDecision)
    clock.s += 100
    policy.nodes = None
    assert isinstance(policy.make_decision_for_non_running_worker_group(), NoopDecision)


def test_it_grows_only_after_a_checkpoint() -> None:
    policy = Policy([ONE] * 4)
    assert isinstance(running(policy, 2, has_checkpoint=False), NoopDecision)
    grown = running(policy, 2, has_checkpoint=True)
    assert isinstance(grown, ResizeDecision)
    assert grown.num_workers == 4


def test_it_considers_growth_only_so_often() -> None:
    policy = Policy([ONE] * 2)
    assert isinstance(running(policy, 2, has_checkpoint=True), NoopDecision)  # as many as there are
    policy.nodes = [ONE] * 4
    assert isinstance(running(policy, 2, has_checkpoint=True), NoopDecision)  # a moment later
