"""Freed buffers are kept for the next step, where the C library is glibc; what it brings is in docs/performance.md."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from pocl_ray.distill import host_memory

IN_ITS_OWN_PROCESS = """
from pocl_ray.distill.host_memory import keep_freed_memory

assert keep_freed_memory()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt(3) is glibc's")
def test_glibc_takes_the_settings() -> None:
    subprocess.run([sys.executable, "-c", IN_ITS_OWN_PROCESS], check=True)


def test_another_c_library_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda _: object())
    assert not host_memory.keep_freed_memory()
