"""The messages for a wrong RAY_ADDRESS, and the end of a process that lost its node; without a connection."""

from __future__ import annotations

import importlib
import socket
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from pocl_ray.errors import ResourceError
from pocl_ray.ray_cluster import session
from pocl_ray.ray_cluster.internals import hide_process_counts


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://head:8265", "a dashboard's address, .* use `pocl-ray submit --address"),
        ("ray://head:10001", "the address of a Ray client"),
        ("head", "not of the form HOST:PORT"),
        ("head:http", "not of the form HOST:PORT"),
        ("127.0.0.1:99999", r"no Ray cluster answers there \(ports go from 1 to 65535\)"),
        ("127.0.0.1:0", "ports go from 1 to 65535"),
    ],
)
def test_an_address_of_another_form_is_told_what_it_should_be(address: str, words: str) -> None:
    with pytest.raises(ResourceError, match=words):
        session.check_address(address)


def test_an_address_where_nobody_listens_is_told_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "REACH_S", 0.0)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(ResourceError, match=rf"RAY_ADDRESS 127.0.0.1:{port}: no Ray cluster answers there"):
        session.check_address(f"127.0.0.1:{port}")


def test_an_address_where_somebody_listens_is_left_to_ray() -> None:
    session.check_address("auto")
    with socket.create_server(("127.0.0.1", 0)) as server:
        session.check_address(f"127.0.0.1:{server.getsockname()[1]}")


WORKER = """
import time
from pocl_ray.ray_cluster import session
from pocl_ray.ray_cluster.internals import hide_process_counts
session.LOOK_S = session.GRACE_S = 0.05
session.end_with_the_node()
print("up", flush=True)
time.sleep(300)
"""
RAYLET = """
import os, subprocess, sys, time
env = {**os.environ, "RAY_RAYLET_PID": sys.argv[1] or str(os.getpid())}
worker = subprocess.Popen([sys.executable, "-c", sys.argv[2]], env=env, stdout=subprocess.PIPE)
worker.stdout.readline()
print(worker.pid, flush=True)
time.sleep(300)
"""


@pytest.mark.parametrize(("raylet_pid", "ends"), [("", True), ("1", False)], ids=["its raylet", "another's"])
def test_a_process_ends_after_its_raylet(raylet_pid: str, ends: bool) -> None:
    raylet = subprocess.Popen([sys.executable, "-c", RAYLET, raylet_pid, WORKER], stdout=subprocess.PIPE)
    assert raylet.stdout is not None
    worker = psutil.Process(int(raylet.stdout.readline()))
    raylet.kill()
    raylet.communicate()
    try:
        deadline = time.monotonic() + (30 if ends else 1)
        while is_alive(worker) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert is_alive(worker) is not ends
    finally:
        if is_alive(worker):
            worker.kill()


def is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def test_the_raylets_count_of_processes_is_hidden_and_how_a_worker_died_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("ray._private.worker")
    monkeypatch.setattr(module, "print_to_stdstream", module.print_to_stdstream)  # put back after the test
    count = "WARNING: 8 PYTHON worker processes have been started on node: ab with address: 10.0.0.1, which is 4x ..."
    died = "A worker died or was killed while executing a task by an unexpected system error."
    hide_process_counts()
    hide_process_counts()
    for lines in ([count], [died], [count, "as the raylet says it"]):  # as ray's thread for the raylet's messages does
        module.print_to_stdstream({"lines": lines, "pid": "raylet", "is_err": False}, ignore_prefix=False)
    shown = capsys.readouterr().out
    assert "worker processes" not in shown
    assert shown.count(died) == 1 and shown.count("as the raylet says it") == 1
