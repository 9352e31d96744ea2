"""Freed buffers are kept for the next step, where the C library is glibc."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from pocl_ray.distill import host_memory

FAULTS_OF_TEN_BUFFERS = """
import resource
import torch
from pocl_ray.distill.host_memory import keep_freed_memory

if {keep}:
    assert keep_freed_memory()
torch.zeros(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.zeros(1 << 24)  # 64 MiB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt(3) is glibc's")
def test_a_buffer_that_is_asked_for_again_costs_no_page_faults() -> None:
    faults = [
        int(
            subprocess.run(
                [sys.executable, "-c", FAULTS_OF_TEN_BUFFERS.format(keep=keep)], capture_output=True, check=True
            ).stdout
        )
        for keep in (False, True)
    ]
    assert faults[1] < faults[0] / 5


def test_another_c_library_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda _: object())
    assert not host_memory.keep_freed_memory()
