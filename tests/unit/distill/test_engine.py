"""The configuration of DeepSpeed, and the learning rate: pure functions of the config."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pocl_ray.config import TrainConfig
from pocl_ray.distill import engine
from pocl_ray.distill.deepspeed_import import check_precision
from pocl_ray.distill.engine import accumulation_steps, deepspeed_config, learning_rate
from pocl_ray.errors import ConfigError
from pocl_ray.records import Stage


def train(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({"global_batch_rows": 64, "micro_batch_rows": 8, **changes})


def stage(num_steps: int, first: int = 0, total: int | None = None) -> Stage:
    return Stage(0, (0,), 0, num_steps, 1, num_steps, 1.0, 1.0, True, first, total or num_steps)


def rates(config: TrainConfig, made: Stage) -> list[float]:
    return [learning_rate(config, made, step) / config.learning_rate for step in range(made.num_steps)]


# Accumulation


@pytest.mark.parametrize(
    ("rows", "micro", "world_size", "steps"),
    [(64, 8, 1, 8), (64, 8, 2, 4), (64, 8, 8, 1), (64, 64, 1, 1), (64, 128, 1, 1), (64, 12, 1, 6), (6, 4, 2, 1)],
)
def test_the_global_batch_is_accumulated_from_micro_batches(rows: int, micro: int, world_size: int, steps: int) -> None:
    assert accumulation_steps(train(global_batch_rows=rows, micro_batch_rows=micro), world_size) == steps


def test_with_a_token_budget_deepspeed_is_told_the_micro_batches_step_by_step() -> None:
    by_tokens = train(micro_batch_rows=None, micro_batch_tokens=512)
    assert accumulation_steps(by_tokens, 2, responses_per_row=2) == 1
    config = deepspeed_config(by_tokens, 2)
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (1, 1)


# DeepSpeed's config


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_deepspeed_is_told_what_train_says(zero_stage: int, precision: str) -> None:
    config = deepspeed_config(train(zero_stage=zero_stage, precision=precision, max_grad_norm=0.5), 2)
    assert config["zero_optimization"]["stage"] == zero_stage
    assert [key for key in ("bf16", "fp16") if config[key]["enabled"]] == [precision] * (precision != "fp32")
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (8, 4)
    assert config["gradient_clipping"] == 0.5
    assert "offload_optimizer" not in config["zero_optimization"]


def test_the_optimizer_can_be_offloaded_without_a_compiler() -> None:
    config = deepspeed_config(train(offload_optimizer="cpu"), 1)
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert config["zero_force_ds_cpu_optimizer"] is False


def test_a_users_keys_are_merged_at_every_depth() -> None:
    theirs = {
        "zero_optimization": {"stage": 1, "overlap_comm": True, "reduce_bucket_size": "auto", "sub": {"a": 1}},
        "bf16": {"enabled": "auto"},
        "gradient_clipping": 1,
        "train_micro_batch_size_per_gpu": "auto",
        "wall_clock_breakdown": True,
        "comms_logger": {"enabled": True},
    }
    config = deepspeed_config(train(deepspeed=theirs), 1)
    plain = deepspeed_config(train(), 1)
    assert config["zero_optimization"] == {"stage": 1, "overlap_comm": True, "sub": {"a": 1}}
    added = {"wall_clock_breakdown": True, "comms_logger": {"enabled": True}}
    assert config == {**plain, **added, "zero_optimization": config["zero_optimization"]}


@pytest.mark.parametrize(
    ("theirs", "place"),
    [
        ({"zero_optimization": {"stage": 2}}, "train.deepspeed.zero_optimization.stage is 2, but the keys of `train`"),
        ({"bf16": {"enabled": False}}, "train.deepspeed.bf16.enabled is False"),
        ({"fp16": {"enabled": True}}, "train.deepspeed.fp16.enabled is True"),
        ({"gradient_clipping": 0.3}, "train.deepspeed.gradient_clipping is 0.3"),
        ({"gradient_accumulation_steps": 2}, "train.deepspeed.gradient_accumulation_steps is 2"),
        ({"zero_optimization": 2}, "train.deepspeed.zero_optimization is 2"),
        ({"optimizer": {"type": "Adam"}}, "train.deepspeed.optimizer: the optimizer, its schedule and the batch"),
        ({"scheduler": "auto"}, "train.deepspeed.scheduler"),
        ({"train_batch_size": 64}, "train.deepspeed.train_batch_size"),
    ],
)
def test_a_conflict_is_refused_and_names_the_key(theirs: dict[str, Any], place: str) -> None:
    with pytest.raises(ConfigError) as error:
        deepspeed_config(train(deepspeed=theirs), 1)
    assert str(error.value).startswith(place) and "\n" not in str(error.value)


def test_a_users_json_file_is_read_and_a_bad_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"wall_clock_breakdown": True}), encoding="utf-8")
    assert deepspeed_config(train(deepspeed=str(path)), 1)["wall_clock_breakdown"] is True
    for content, says in ((b"{", "not readable JSON"), (b"[]", "holds no JSON object"), (b"\xff\xfe", "not readable")):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=says) as error:
            deepspeed_config(train(deepspeed=str(path)), 1)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"train\.deepspeed: no such file: none\.json"):
        deepspeed_config(train(deepspeed="none.json"), 1)


class Accelerator:
    def device_name(self) -> str:
        return "cpu"

    def is_bf16_supported(self) -> bool:
        return True

    def is_fp16_supported(self) -> bool | None:
        return None  # what DeepSpeed's says of a CPU without it


def test_a_precision_that_the_device_lacks_is_refused() -> None:
    for precision in ("fp32", "bf16"):
        check_precision(precision, Accelerator())
    with pytest.raises(ConfigError, match=r"^train\.precision: fp16 cannot be trained in on cpu; set bf16 or fp32$"):
        check_precision("fp16", Accelerator())


# The learning rate


def test_cosine_falls_from_the_peak_along_half_a_wave() -> None:
    assert rates(train(), stage(8)) == pytest.approx([(1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)])


def test_linear_falls_evenly_and_constant_stays() -> None:
    assert rates(train(lr_schedule="linear"), stage(4)) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert rates(train(lr_schedule="constant"), stage(4)) == [1, 1, 1, 1]


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_it_ends_above_the_given_floor(shape: str) -> None:
    made = rates(train(lr_schedule=shape, min_lr_ratio=0.1), stage(1000))
    assert made[0] == 1 and made[-1] == pytest.approx(0.1, abs=2e-3) and min(made) >= 0.1


def test_warm_up_rises_to_the_peak_and_the_schedule_follows() -> None:
    made = rates(train(lr_schedule="linear", warmup_ratio=0.4), stage(10))
    assert made == pytest.approx([0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert all(rate > 0 for rate in made)


@pytest.mark.parametrize("num_steps", [1, 2])
def test_a_stage_of_a_step_or_two_trains(num_steps: int) -> None:
    for warmup_ratio in (0.0, 0.99):
        assert max(rates(train(warmup_ratio=warmup_ratio), stage(num_steps))) == 1


def test_warm_up_takes_no_step_more_than_its_share() -> None:
    made = rates(train(lr_schedule="constant", warmup_ratio=0.07), stage(100))
    assert sum(rate < 1 for rate in made) == 6, "7 of 100 steps rise, the last of them to the peak"


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.3])
def test_a_continuous_schedule_goes_on_over_the_stages(warmup_ratio: float) -> None:
    config = train(warmup_ratio=warmup_ratio)
    parts = [stage(4, first=0, total=12), stage(8, first=4, total=12)]
    assert [rate for part in parts for rate in rates(config, part)] == rates(config, stage(12))


def test_wsd_stays_at_the_peak_and_falls_over_the_last_part_of_the_run() -> None:
    made = rates(train(lr_schedule="wsd", warmup_ratio=0.2), stage(10))
    assert made == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert rates(train(lr_schedule="wsd", decay_ratio=1.0), stage(4)) == rates(train(lr_schedule="linear"), stage(4))
    floored = rates(train(lr_schedule="wsd", min_lr_ratio=0.5), stage(1000))
    assert floored[599] == 1 and floored[-1] == pytest.approx(0.5, abs=2e-3)
    overlapping = rates(train(lr_schedule="wsd", warmup_ratio=0.8), stage(10))
    assert overlapping == pytest.approx([k / 8 for k in range(1, 9)] + [1, 0.5])


# The norm of the gradient and its clipping


@pytest.mark.parametrize(
    ("changes", "is_ours"),
    [
        ({"zero_stage": 1}, True),
        ({"zero_stage": 2, "precision": "fp16"}, True),
        ({"zero_stage": 0, "precision": "fp32"}, False),
        ({"zero_stage": 3}, False),
        ({"zero_stage": 1, "offload_optimizer": "cpu"}, False),
        ({"zero_stage": 2, "deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}}, False),
        ({"zero_stage": 1, "deepspeed": {"zero_optimization": {"compute_grad_norm": True}}}, False),
        ({"zero_stage": 1, "deepspeed": {"data_types": {"grad_accum_dtype": "fp32"}}}, False),
    ],
)
def test_deepspeed_leaves_the_norm_to_the_guard_where_it_can(changes: dict[str, Any], is_ours: bool) -> None:
    config = deepspeed_config(train(**changes), 1)
    changed = engine._without_norm(config)
    assert (changed is not None) == is_ours
    if changed is not None:
        assert (changed["gradient_clipping"], changed["zero_optimization"]["compute_grad_norm"]) == (0.0, False)
        assert config["gradient_clipping"] == 1.0 and "compute_grad_norm" not in config["zero_optimization"]


@pytest.mark.parametrize(("max_norm", "expected"), [(0.5, 0.5), (1e9, None), (0.0, None)])
def test_the_guard_clips_by_the_norm_of_all_pieces(
    max_norm: float, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(engine, "_PIECE", 64)
    weight = torch.nn.Parameter(torch.zeros(1000))
    adam = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.0)
    guard = engine._StepGuard(adam, object(), max_norm)
    weight.grad = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    norm = float(weight.grad.norm())
    guard.begin(1.0, None)
    adam.step()
    assert guard.grad_norm() == pytest.approx(norm, rel=1e-6) and weight.detach().abs().max() > 0.5
    assert float(weight.grad.norm()) == pytest.approx(expected or norm, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_guard_keeps_adam_from_a_gradient_that_is_not_finite(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.dist, "get_world_size", lambda: 1)
    weight = torch.nn.Parameter(torch.zeros(10))
    adam = torch.optim.AdamW([weight], lr=1.0)
    guard = engine._StepGuard(adam, object(), 1.0)
    weight.grad = torch.ones(10)
    weight.grad[3] = bad
    guard.begin(1.0, None)
    adam.step()
    assert not math.isfinite(guard.grad_norm()) and not weight.detach().any()
