"""The shares of a step's time: parts within parts, kinds of operations, and what no part accounts for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import step_shares
from step_shares import REST, Clock, kind_of, shares


def test_a_call_within_a_call_counts_for_the_inner_part_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 4.0, 10.0])  # the outer one begins, the inner one begins and ends, the outer one ends
    monkeypatch.setattr(step_shares.time, "process_time", lambda: next(times))
    clock = Clock()
    inner = clock.around("inner", lambda: None)
    clock.around("outer", inner)()
    assert dict(clock.seconds) == {"inner": 3.0, "outer": 7.0}


def test_a_part_that_fails_is_counted_and_leaves_no_call_open() -> None:
    clock = Clock()

    def fails() -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        clock.around("part", fails)()
    clock.around("other", lambda: None)()
    assert set(clock.seconds) == {"part", "other"}


def test_shares_are_of_the_whole_the_largest_first_with_the_rest() -> None:
    assert shares({"a": 1.0, "b": 2.0}, 4.0) == {"b": 0.5, "a": 0.25, REST: 0.25}
    assert list(shares({"a": 1.0, "b": 2.0}, 4.0)) == ["b", "a", REST]


@pytest.mark.parametrize("whole", [0.0, -1.0, float("nan"), 2.0])
def test_parts_that_are_no_parts_of_the_whole_are_refused(whole: float) -> None:
    with pytest.raises(ValueError, match="in a whole of"):
        shares({"a": 1.0, "b": 2.0}, whole)


def test_operations_have_kinds() -> None:
    assert kind_of("aten::mm") == kind_of("aten::addmm_") == "matrix products"
    assert kind_of("aten::_scaled_dot_product_flash_attention_for_cpu_backward") == "attention"
    assert kind_of("aten::_to_copy") == "copies and casts"
    assert kind_of("aten::silu") == REST
