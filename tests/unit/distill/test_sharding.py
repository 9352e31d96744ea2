"""A live teacher split over two workers, in real DeepSpeed processes: it teaches as a whole one does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import STAGES, Outcome, prepare, train_all, with_teacher

from pocl_ray.config import Config
from pocl_ray.distill.task import TrainTask
from pocl_ray.errors import ModelError
from pocl_ray.models.frozen import _dtype_of, _inference_config
from pocl_ray.models.places import ModelRef

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STAGE = replace(STAGES[0], num_epochs=1, lr_num_steps=2)


def variants(task: TrainTask) -> dict[str, TrainTask]:
    short = replace(task, stages=(STAGE,), train=task.train.model_copy(update={"eps": 1e-5}))
    zero_3 = short.train.model_copy(update={"zero_stage": 3})
    (teacher,) = task.teachers
    in_bf16 = with_teacher(short, ref=replace(teacher.ref, dtype="bfloat16"))
    sharded = with_teacher(short, sharded=True)
    return {
        "whole": short,
        "sharded": sharded,
        "sharded_zero_3": replace(sharded, train=zero_3),
        "one_of_two": replace(short, teachers=(teacher, replace(teacher, sharded=True))),
        "whole_bf16": in_bf16,
        "sharded_bf16": with_teacher(in_bf16, sharded=True),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    root = tmp_path_factory.mktemp("sharding")
    tasks = variants(prepare(root))
    outcomes = train_all([(task, root / name, None) for name, task in tasks.items()], num_workers=2)
    return dict(zip(tasks, outcomes, strict=True))


@pytest.mark.parametrize("name", ["sharded", "sharded_zero_3", "one_of_two"])
def test_a_split_teacher_gives_the_losses_and_weights_of_a_whole_one(runs: dict[str, Outcome], name: str) -> None:
    assert_same(runs[name], runs["whole"], 1e-6, 1e-5)


def test_it_computes_in_the_teachers_dtype(runs: dict[str, Outcome]) -> None:
    assert_same(runs["sharded_bf16"], runs["whole_bf16"], 1e-4, 1e-3)
    assert runs["sharded_bf16"].losses != runs["sharded"].losses


def assert_same(run: Outcome, reference: Outcome, loss_error: float, weight_error: float) -> None:
    assert len(run.losses) == STAGE.num_steps
    assert run.losses == pytest.approx(reference.losses, abs=loss_error)
    figures, expected = (
        [m["eval/dev/kd_loss"] for m in r.metrics if "eval/dev/kd_loss" in m] for r in (run, reference)
    )
    assert figures == pytest.approx(expected, abs=loss_error) and len(figures) == 2
    for name, weight in run.weights.items():
        torch.testing.assert_close(weight, reference.weights[name], atol=weight_error, rtol=0)


class NoHalf:
    """A device without float16."""

    def is_fp16_supported(self) -> bool:
        return False

    def device_name(self) -> str:
        return "cpu"


def test_float16_where_it_cannot_be_is_refused_with_the_remedy() -> None:
    with pytest.raises(ModelError, match=r"cannot be sharded in float16 on cpu; set teacher\.dtype"):
        _inference_config(ModelRef("teacher"), torch.float16, NoHalf())


def test_the_dtype_is_the_one_that_the_weights_were_saved_in(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"dtype": "bfloat16"}')
    assert _dtype_of(ModelRef(str(tmp_path))) == torch.bfloat16
    assert _dtype_of(ModelRef(str(tmp_path), dtype="float32")) == torch.float32
    (tmp_path / "config.json").write_text("{}")
    assert _dtype_of(ModelRef(str(tmp_path))) == torch.float32


@pytest.mark.parametrize(
    ("teacher", "cache", "reason"),
    [
        ({"path": "t", "sharded": True}, "hidden", "training loads no teacher"),
        ({"path": "t", "sharded": True, "adapter": "a"}, "none", "merge the adapter"),
    ],
)
def test_what_cannot_be_split_is_refused(teacher: dict[str, object], cache: str, reason: str) -> None:
    tree = {"name": "run", "data": {"train": {"path": "t"}, "dev": {"path": "d"}}, "student": {"num_layers": 2}}
    with pytest.raises(ValueError, match=reason):
        Config.model_validate({**tree, "teacher": teacher, "distill": {"teacher_cache": cache}})
