"""The cost model of large runs: its formulas by hand, its limits, and its fit."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from scale_model import (
    STUDENT_05B,
    TEACHER_7B,
    Machine,
    Model,
    Work,
    cache_bytes,
    fit,
    gpu_bytes,
    predict,
    stops_at,
    training_flops,
    training_step,
)

SMALL = Model(body=1000.0, hidden=10, layers=2, vocabulary=50, kv_bytes=8)


def test_parameters_of_the_two_models_add_up() -> None:
    assert pytest.approx(7.62e9, rel=0.01) == TEACHER_7B.body + 2 * TEACHER_7B.head  # untied
    assert pytest.approx(0.494e9, rel=0.01) == STUDENT_05B.body + STUDENT_05B.head  # tied


def test_flops_of_a_step_are_those_counted_by_hand() -> None:
    teacher = replace(SMALL, hidden=20)
    assert training_flops(SMALL, teacher, 100, 40) == 6 * 1000 * 100 + 8 * 500 * 40 + 4 * 1000 * 40


def test_the_cache_takes_two_bytes_a_number() -> None:
    assert cache_bytes(Work(rows=10, response=3), SMALL) == 10 * 3 * 10 * 2


def test_one_gpu_reduces_nothing_and_more_compute_faster() -> None:
    steps = [training_step(Work(), STUDENT_05B, TEACHER_7B, Machine(), n) for n in (1, 8, 64, 512)]
    assert steps[0].reduce == 0
    computing = [step.compute for step in steps]
    assert computing == sorted(computing, reverse=True)
    assert steps[1].compute > steps[0].compute / 8  # smaller micro-batches use a GPU less well


def test_more_gpus_than_rows_of_a_batch_do_not_help() -> None:
    work = Work(batch=64)
    assert training_step(work, STUDENT_05B, TEACHER_7B, Machine(), 512) == training_step(
        work, STUDENT_05B, TEACHER_7B, Machine(), 64
    )


def test_memory_falls_with_more_gpus_and_fits() -> None:
    memory = [gpu_bytes(Work(), STUDENT_05B, TEACHER_7B, n) for n in (1, 8, 64)]
    assert memory == sorted(memory, reverse=True)
    assert memory[0] < Machine().memory


def test_scoring_is_bound_by_storage_in_the_end() -> None:
    made = predict(Work(), STUDENT_05B, TEACHER_7B, Machine(), 4096)
    assert made.scoring == pytest.approx(made.cache / Machine().storage_total)


def test_it_stops_where_a_doubling_gains_too_little() -> None:
    assert stops_at([(1, 8.0), (2, 4.0), (4, 3.5), (8, 1.0)]) == 2
    assert stops_at([(1, 8.0), (2, 4.0)]) == 2


def test_the_fit_finds_rate_and_overhead() -> None:
    rate, overhead = fit([(flops, flops / 5e9 + 0.02) for flops in (1e8, 1e9, 4e9)])
    assert rate == pytest.approx(5e9)
    assert overhead == pytest.approx(0.02)
