"""Machines that run other code than the driver are named before anything is trained."""

from __future__ import annotations

import pytest

from pocl_ray.errors import ResourceError
from pocl_ray.versions import COMPARED, check_same, versions


def test_the_same_versions_pass() -> None:
    here = versions()
    assert set(here) == {"python", "pocl-ray", *COMPARED}
    check_same(here, dict(here), "node 10.0.0.4")


def test_what_differs_is_named_with_both_versions() -> None:
    other = {**versions(), "torch": "1.0", "pocl-ray": "0123"}
    with pytest.raises(ResourceError) as refused:
        check_same(versions(), other, "node 10.0.0.4")
    message = str(refused.value)
    assert message.startswith("node 10.0.0.4 runs other code: pocl-ray 0123 (here ")
    assert f"torch 1.0 (here {versions()['torch']})" in message
    assert "deepspeed" not in message


def test_a_node_without_the_project_is_named() -> None:
    with pytest.raises(ResourceError, match="pocl-ray none, or an older one"):
        check_same(versions(), {"pocl-ray": "none, or an older one"}, "node 10.0.0.4")
