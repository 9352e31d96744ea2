"""What frontier pacing is told, planned and refused."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from pocl_ray.config import Config
from pocl_ray.curriculum.schedule import plan_stages
from pocl_ray.errors import ConfigError
from pocl_ray.fingerprints import distill_dependencies, reads_teacher
from pocl_ray.preview import frontier_notes, print_plan
from pocl_ray.records import Stage

TREE: dict[str, Any] = {
    "name": "run",
    "data": {"train": {"path": "train.jsonl"}, "dev": {"path": "dev.jsonl"}},
    "teacher": {"path": "teacher"},
    "student": {"path": "student"},
    "train": {"global_batch_rows": 32},
}


def config_of(curriculum: dict[str, Any] | None = None, **more: Any) -> Config:
    return Config.model_validate({**TREE, "curriculum": {"pacing": "frontier", **(curriculum or {})}, **more})


def test_it_has_defaults_of_its_own_that_a_user_s_words_go_before() -> None:
    made = config_of().curriculum
    assert (made.optimizer, made.hand_off, made.kd_ratio.bounds()) == ("continuous", "last", (1.0, 1.0))
    assert (made.kd_temperature.by, made.kd_temperature.bounds()) == ("step", (1.0, 2.0))
    assert config_of().difficulty.signals == {"teacher_student_kl": 1.0}
    own = config_of({"optimizer": "restart", "kd_temperature": 1.3}, difficulty={"signals": ["ce_loss"], "rrf_k": 3})
    assert own.curriculum.optimizer == "restart" and own.curriculum.kd_temperature.bounds() == (1.3, 1.3)
    assert own.difficulty.signals == {"ce_loss": 1.0}
    assert Config.model_validate(own.model_dump()) == own
    assert Config.model_validate(TREE).curriculum.optimizer == "restart"


def test_it_cuts_the_run_into_equal_stages_of_baby_step_s_length_or_of_the_steps_that_are_told() -> None:
    stages = plan_stages(config_of(), 3750)
    baby_step = plan_stages(Config.model_validate(TREE), 3750)
    assert len(stages) == 8 and {s.order for s in stages} == {"frontier"}
    assert sum(s.num_steps for s in stages) == sum(s.num_steps for s in baby_step)
    assert max(s.num_steps for s in stages) - min(s.num_steps for s in stages) <= 1
    assert {(s.num_rows, s.num_epochs, s.restart_optimizer) for s in stages[1:]} == {(3750, 1, False)}
    told = plan_stages(config_of({"num_steps": 10, "frontier": {"num_stages": 4}}), 3750)
    assert [s.num_steps for s in told] == [2, 3, 2, 3]
    assert told[-1].kd_temperature_at(2) == 2.0
    assert [Stage.from_json(s.to_json()) for s in told] == list(told)
    assert reads_teacher(config_of(), stages)
    with pytest.raises(ConfigError, match=r"num_stages: 8 stages cannot be made of 5 optimizer steps; set it to 5"):
        plan_stages(config_of({"num_steps": 5}), 3750)


def test_what_the_draw_depends_on_is_in_the_fingerprint() -> None:
    def depends(**keys: Any) -> Any:
        config = config_of({"frontier": keys})
        return distill_dependencies(config, "r", "s", plan_stages(config, 3750))

    assert depends() != depends(power=1.0) != depends(floor=0.1) != depends(saturation=0.2)


@pytest.mark.parametrize(
    ("curriculum", "more", "says"),
    [
        ({"kd_ratio": 0}, {}, "with kd_ratio 0 no teacher is read; set kd_ratio above 0, or pacing to none"),
        ({"pacing_args": {"power": 1}}, {}, "takes its parameters under curriculum.frontier; move them"),
        ({"advance": "plateau"}, {}, "stages of pacing frontier are of equal length; set it to interval"),
        ({"frontier": {"floor": 0}}, {}, "greater than 0"),
        ({"frontier": {"saturation": 0.01}}, {}, r"saturation \(0.01\) must be above floor \(0.02\)"),
        ({"frontier": {"rescore_rows": 5}}, {}, "set refresh to rescore, or remove rescore_rows"),
        (
            {"kd_ratio": 0.5},
            {"teacher": {"path": "teacher", "cross_tokenizer": "uld"}},
            "has no meaning over two tokenizers",
        ),
        (
            {},
            {"rollout": {"mode": "on"}, "distill": {"teacher_cache": "none"}},
            "no gap would ever be measured; set refresh to rescore, or rollout.beside_data to true",
        ),
    ],
)
def test_what_cannot_work_is_refused(curriculum: dict[str, Any], more: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        config_of(curriculum, **more)


def test_the_plan_tells_what_refreshing_costs_and_where_gaps_are_not_the_loss(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    def notes(frontier: dict[str, Any] | None = None, **distill: Any) -> str:
        config = config_of({"num_steps": 582, "frontier": frontier or {}}, distill=distill)
        return "\n".join(frontier_notes(config, plan_stages(config, 3750)))

    assert notes() == "gaps are refreshed by training itself: no further pass over the rows"
    assert "26,250 forward passes of rows before stages 1 to 7: about 47% of the FLOPs" in notes({"refresh": "rescore"})
    assert "3,500 forward passes" in notes({"refresh": "rescore", "rescore_rows": 500})
    assert "loss mine is a plug-in's: gaps stay KL(teacher || student)" in notes(loss="mine")
    assert "lower bounds of the KL" in notes(teacher_cache="topk")
    printed: list[str] = []
    monkeypatch.setattr(Console, "print", lambda self, *args, **kwargs: printed.extend(map(str, args)))
    print_plan(config_of(storage_path=str(tmp_path)), 3750)
    assert any("3750 rows drawn by their gaps" in line for line in printed)
    assert any("refreshed by training itself" in line for line in printed)
