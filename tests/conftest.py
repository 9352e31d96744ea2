"""Shared helpers of the tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def shared_dir() -> Path:
    """Return the folder of shared rows and parity numbers beside the checkout, or skip the test."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("POCL_SHARED", beside))
    if not folder.is_dir():
        pytest.skip(f"no shared rows and parity numbers at {folder} (set POCL_SHARED to point to them)")
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared rows and parity numbers."""
    return shared_dir()
