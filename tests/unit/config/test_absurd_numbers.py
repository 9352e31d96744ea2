"""Numbers that nothing could be built of are refused in one line, before anything is."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pocl_ray.config import load_config
from pocl_ray.curriculum.schedule import check_curriculum, plan_stages
from pocl_ray.errors import UserError
from pocl_ray.models.building import build_model

QUICKSTART = Path(__file__).resolve().parents[3] / "configs" / "quickstart.yaml"
BIG, HUGE = "100000000", "1" + "0" * 20
SIZES = [
    f"curriculum.num_buckets={BIG}",
    f"curriculum.interval_epochs={BIG}",
    f"curriculum.interval_epochs={HUGE}",
    f"curriculum.num_steps={HUGE}",
    f"scaling.num_workers={BIG}",
    f"scaling.num_workers=[1,{HUGE}]",
    f"scaling.student_actors={HUGE}",
    f"data.max_tokens={HUGE}",
    f"data.max_prompt_tokens={BIG}",
    f"train.global_batch_rows={HUGE}",
    f"train.micro_batch_rows={HUGE}",
    f"train.seed={HUGE}",
    f"seed={HUGE}",
    f"evaluation.seeds=[{HUGE}]",
    f"evaluation.generation.max_new_tokens={HUGE}",
    f"distill.chunk_mib={HUGE}",
    f"distill.top_k={HUGE}",
    f"difficulty.batch_tokens={HUGE}",
    f"teacher.sft.num_epochs={HUGE}",
    "curriculum.kd_temperature=1e308",
    "curriculum.kd_temperature=[1.0,2.0,3.0,1e300]",
    "scaling.stall_timeout_s=1e300",
    f"curriculum.pacing_args.num_stages={HUGE}",
]


@pytest.mark.parametrize("override", SIZES)
def test_a_size_beyond_reason_is_refused_by_name(override: str) -> None:
    started = time.monotonic()
    with pytest.raises(UserError) as refused:
        plan_stages(load_config(QUICKSTART, [override]), num_rows=4000)
    assert time.monotonic() - started < 5
    key = override.partition("=")[0].rpartition(".")[2]
    assert {"num_stages": "pacing_args"}.get(key, key) in str(refused.value)


def test_so_is_a_plan_that_no_run_would_end() -> None:
    config = load_config(
        QUICKSTART, ["curriculum.pacing=baby_step", "curriculum.num_steps=null", "curriculum.interval_epochs=1000000"]
    )
    with pytest.raises(UserError, match=r"optimizer steps together.*interval_epochs"):
        plan_stages(config, num_rows=10_000_000)


def test_stages_of_a_rule_are_counted_before_they_are_made() -> None:
    arguments = ["curriculum.pacing=competence", f"curriculum.pacing_args={{num_stages: {BIG}}}"]
    with pytest.raises(UserError, match="num_stages must be a whole number from 1 to 10000"):
        check_curriculum(load_config(QUICKSTART, arguments).curriculum)


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 10**8), ("hidden_size", 10**12)])
def test_a_model_larger_than_any_is_refused_before_it_is_built(key: str, value: int) -> None:
    with pytest.raises(UserError, match=f"architecture.{key}: {value} is more than any model has"):
        build_model({"model_type": "llama", key: value}, 300, 0, None, 0)


def test_large_numbers_that_make_sense_are_taken() -> None:
    sensible = [
        "curriculum.num_buckets=1000",
        "data.max_tokens=1000000",
        "seed=9223372036854775807",
        "scaling.stall_timeout_s=864000",
    ]
    assert load_config(QUICKSTART, sensible).data.max_tokens == 1_000_000
