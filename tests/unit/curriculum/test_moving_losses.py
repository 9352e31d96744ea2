"""Parameters of losses that move over a run: read from the config, planned, refused outside their range, shown."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from pocl_ray.config import Config, DistillConfig
from pocl_ray.curriculum.schedule import check_curriculum, loss_schedules, plan_control, plan_stages
from pocl_ray.distill.kernels import LigerLoss, divergences, resolve_divergence
from pocl_ray.distill.losses import even_jsd, generalized_jsd, resolve_loss
from pocl_ray.errors import ConfigError
from pocl_ray.fingerprints import distill_dependencies
from pocl_ray.preview import print_plan
from pocl_ray.records import Stage
from pocl_ray.report.page import argument, setting
from pocl_ray.report.plots import stage_settings
from pocl_ray.run_directory.digests import fingerprint
from pocl_ray.tuning.space import apply_settings

RISING = {"start": 0, "end": 0.5, "by": "step"}
NUM_ROWS = 1000


def config(loss_args: dict[str, Any], loss: str = "generalized_jsd", **more: Any) -> Config:
    tree = {
        "name": "run",
        "data": {"train": {"path": "train.jsonl"}, "dev": {"path": "dev.jsonl"}},
        "teacher": {"path": "teacher"},
        "student": {"path": "student"},
        "distill": {"loss": loss, "loss_args": loss_args},
    }
    return Config.model_validate({**tree, **more})


def over_all_steps(stages: tuple[Stage, ...], key: str = "distill.loss_args.beta") -> list[float]:
    return [stage.loss_args_at(step)[key] for stage in stages for step in range(stage.num_steps)]


def digest(made: Config) -> str:
    return fingerprint(distill_dependencies(made, "r", "s", plan_stages(made, NUM_ROWS)))


def test_by_step_a_parameter_moves_evenly_over_the_whole_run() -> None:
    values = over_all_steps(plan_stages(config({"beta": RISING}), NUM_ROWS))
    assert values == pytest.approx([0.5 * k / (len(values) - 1) for k in range(len(values))])
    assert (values[0], values[-1]) == (0.0, 0.5)


def test_by_stage_it_has_one_value_a_stage_and_a_list_has_as_many_as_stages() -> None:
    by_stage = plan_stages(config({"beta": {"start": 0, "end": 0.5}}), NUM_ROWS)
    assert [stage.loss_args_at(1, "distill") for stage in by_stage] == [{"beta": b} for b in (0, 0.17, 0.33, 0.5)]
    listed = config({"beta": [0, 0.1, 0.5]})
    with pytest.raises(ConfigError, match=r"^distill.loss_args.beta lists 3 values, but there are 4 stages"):
        check_curriculum(listed.curriculum, losses=loss_schedules(listed.distill, listed.rollout))


def test_the_control_is_trained_with_the_same_loss_over_its_one_stage() -> None:
    made = config({"beta": {"values": [0, 0.4, 0.2, 0.5]}}, control={})
    values = over_all_steps(plan_control(made, NUM_ROWS, 7))
    assert values == pytest.approx([0, 0.2, 0.4, 0.3, 0.2, 0.35, 0.5])


def test_rollouts_with_a_loss_of_their_own_have_parameters_of_their_own() -> None:
    rollout = {"mode": "on", "loss": "skewed_reverse_kl", "loss_args": {"alpha": {"start": 0.4, "end": 0.1}}}
    cache = {"teacher_cache": "none", "loss": "skewed_forward_kl", "loss_args": {"alpha": 0.1}}
    made = config({}, rollout=rollout, distill=cache)
    stages = plan_stages(made, NUM_ROWS)
    assert [stage.loss_args_at(0, "rollout") for stage in stages] == [{"alpha": a} for a in (0.4, 0.3, 0.2, 0.1)]
    assert stages[0].loss_args_at(0, "distill") == {}
    on_data, on_rollouts = divergences(made.distill, made.rollout)
    assert (on_data.at({}), on_rollouts.at({"alpha": 0.3}).params) == (on_data, {"alpha": 0.3})  # type: ignore[union-attr]


def test_a_constant_is_the_number_that_it_was_and_a_ramp_makes_another_run() -> None:
    plain = config({"beta": 0.5})
    written = config({"beta": {"shape": "constant", "start": 0.5}})
    assert written.distill.loss_args == {"beta": 0.5}
    assert digest(written) == digest(plain)
    assert len({digest(config({"beta": beta})) for beta in (0.5, RISING, {**RISING, "end": 0.4})}) == 3
    assert "loss_ramps" not in plan_stages(plain, NUM_ROWS)[0].to_json()
    assert isinstance(config({"k": 64}, "top_k_kl").distill.loss_args["k"], int)


def test_a_stage_comes_back_from_json_as_it_was() -> None:
    for stage in plan_stages(config({"beta": RISING}), NUM_ROWS):
        assert Stage.from_json(json.loads(json.dumps(stage.to_json()))) == stage


@pytest.mark.parametrize(
    ("loss", "args", "says"),
    [
        ("generalized_jsd", {"beta": {"start": 0, "end": 1.5}}, r"beta must be .*\[0, 1\] at every step, and .*1\.5"),
        ("js_distance", {"lam": {"start": 0.9, "end": 1, "by": "step"}}, r"lam must be .*\(0, 1\) at every step"),
        ("skewed_forward_kl", {"alpha": [0.1, -0.1, 0.2, 0.1]}, r"alpha must be .* reaches -0\.1"),
        ("top_k_kl", {"k": {"start": 2.5, "end": 8}}, "k must be a whole number .* reaches 2.5"),
        ("forward_kl", {"alpha": RISING}, "no parameter 'alpha'"),
    ],
)
def test_an_end_that_the_loss_does_not_allow_is_refused(loss: str, args: dict[str, Any], says: str) -> None:
    made = config(args, loss)
    with pytest.raises(ConfigError, match=f"^distill.loss: .*{says}") as caught:
        divergences(made.distill, made.rollout)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"start": 0}, "takes start and end"),
        ({"from": 0, "to": 1}, "from"),
        ("much", "finite number"),
        (True, "finite"),
    ],
)
def test_what_is_neither_a_number_nor_a_schedule_is_refused_at_its_key(value: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        config({"beta": value})
    assert "distill.loss_args.beta" in str(caught.value)


def test_a_small_end_of_a_ramp_by_step_is_not_rounded() -> None:
    args = DistillConfig.model_validate({"loss_args": {"lam": {"start": 0.001, "end": 0.999, "by": "step"}}}).loss_args
    assert resolve_loss("js_distance", args).params == {"lam": 0.999}


def test_dev_losses_are_taken_at_the_last_value_and_whole_numbers_stay_whole() -> None:
    jsd = resolve_divergence(config({"beta": RISING}).distill)
    assert not isinstance(jsd, LigerLoss)
    assert (jsd.params, jsd.function) == ({"beta": 0.5}, generalized_jsd)
    step = jsd.at({"beta": 0.125})
    assert (step.params, step.function) == ({"beta": 0.125}, even_jsd)
    top_k = resolve_divergence(config({"k": {"start": 4, "end": 8, "by": "step"}}, "top_k_kl").distill)
    assert top_k.at({"k": 5.6}).params == {"k": 6}  # type: ignore[union-attr]


def test_a_search_takes_the_ends_of_a_ramp_and_the_plan_and_the_report_show_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = apply_settings(config({"beta": RISING}), {"distill.loss_args.beta.end": 0.75})
    print_plan(made, NUM_ROWS)
    assert "beta" in capsys.readouterr().out
    stages = plan_stages(made, NUM_ROWS)
    assert stages[0].moving == {
        "kd_temperature": "kd_temperature",
        "kd_ratio": "kd_ratio",
        "distill.loss_args.beta": "beta",
    }
    assert setting(stages[-1], "distill.loss_args.beta").endswith(" to 0.75")
    assert setting(replace(stages[0], max_steps=1), "kd_ratio") == "0.7"
    assert len(stage_settings(stages).axes) == 3
    assert argument(made.distill.loss_args["beta"]) == "0 to 0.75 by step"
