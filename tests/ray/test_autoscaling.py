"""A cluster that starts as a head without CPUs, and buys its nodes when a run asks for them; Ray's own autoscaler."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen

import pytest
from faults import DISTILLED, WEIGHTS, long_form, started
from ray._private.services import get_node_ip_address
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE
from tiny import FullRun, sha256
from two_nodes import START_S, end, free_ports, ray_start

from pocl_ray.config.loading import dump_config

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800), long_form]

POOL = "pocl-ray/pool"


def node_types() -> dict[str, object]:
    """Two kinds of nodes, which only their label tells apart."""
    kinds = {
        pool: {"min_workers": 0, "max_workers": 2, "resources": {"CPU": 1}, "labels": {POOL: pool}, "node_config": {}}
        for pool in ("wanted", "other")
    }
    return {FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}, **kinds}


@pytest.fixture
def growing() -> Iterator[str]:
    """The address of the cluster; its nodes are processes of this machine."""
    (port,) = free_ports(1)
    address = f"{get_node_ip_address()}:{port}"
    config = {
        "cluster_name": "growing",
        "upscaling_speed": 100.0,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
        "max_workers": 4,
        "idle_timeout_minutes": 10,
        "provider": {"type": "fake_multinode", "gcs_address": address, "launch_multiple": True},
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "available_node_types": node_types(),
    }
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env = {
        **inherited,
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",  # else it depends on whether this machine has a token
        "RAY_FAKE_CLUSTER": "1",
        "RAY_worker_niceness": "0",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": str(int(START_S)),
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as scratch:
        path = Path(scratch) / "cluster.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        options = ["--head", f"--port={port}", "--num-cpus=0", "--object-store-memory=100000000", "--block"]
        options += [f"--temp-dir={scratch}", f"--autoscaling-config={path}", "--include-dashboard=false"]
        head = ray_start(options, env, Path(scratch) / "head.log")
        try:
            _wait_for_head(address, head, Path(scratch) / "head.log")
            yield address
        finally:
            end(head)


def _wait_for_head(address: str, head: Popen[bytes], log: Path) -> None:
    """Wait until `ray start` says that the head stands."""
    deadline = time.monotonic() + START_S
    while "Ray runtime started" not in log.read_text(errors="replace"):
        assert head.poll() is None, log.read_text(errors="replace")
        assert time.monotonic() < deadline, f"no head at {address} within {START_S:.0f} s"
        time.sleep(0.5)


def test_a_run_on_a_cluster_without_nodes_has_it_grow_by_those_that_it_asks_for(
    full_run: FullRun, growing: str, tmp_path: Path
) -> None:
    changes = {"scaling__start_timeout_s": 300, "scaling__labels": {POOL: "wanted"}}
    config, run = full_run.copy(tmp_path, ("scores", "scores.parquet", "teacher_cache", *DISTILLED), **changes)
    path, log = tmp_path / "tiny.yaml", tmp_path / "log"
    path.write_text(dump_config(config), encoding="utf-8")
    with started("distill", str(path), log=log, RAY_ADDRESS=growing, RAY_AUTH_MODE="disabled") as driver:
        assert driver.wait() == 0, log.read_text()
    assert "for the cluster to grow" in log.read_text()
    assert sha256(run / WEIGHTS) == sha256(full_run.run / WEIGHTS)
