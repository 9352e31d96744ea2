"""Configs with two tokenizers: what they imply, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pocl_ray.config import Config, load_config
from pocl_ray.config.loading import dump_config
from pocl_ray.errors import ConfigError

BASE: dict[str, Any] = {
    "name": "bridged",
    "data": {"train": {"path": "train.jsonl"}, "holdout_rows": 10},
    "teacher": {"path": "teacher", "cross_tokenizer": "uld"},
    "student": {"path": "student"},
    "curriculum": {"kd_ratio": 0.6},
}


def config_of(folder: Path, *overrides: str, base: dict[str, Any] | None = None) -> Config:
    path = folder / "base.yaml"
    path.write_text(yaml.safe_dump(base or BASE), encoding="utf-8")
    return load_config(path, list(overrides))


def test_the_loss_is_uld_without_being_named_and_survives_being_written(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert config.distill.loss == "uld" and config.distill.teacher_cache == "hidden"
    assert config_of(tmp_path, "distill.chunk_mib=8").distill.loss == "uld"
    assert config_of(tmp_path, "distill.loss=uld") == config
    assert Config.model_validate(yaml.safe_load(dump_config(config))) == config
    listed = {**BASE, "teacher": [BASE["teacher"]]}
    assert config_of(tmp_path, base=listed) == config


def test_without_it_the_loss_is_what_it_was_and_uld_may_be_chosen_over_one_tokenizer(tmp_path: Path) -> None:
    assert config_of(tmp_path, "teacher.cross_tokenizer=null").distill.loss == "forward_kl"
    one = ["teacher.cross_tokenizer=null", "distill.loss=uld", "rollout.mode=on", "distill.teacher_cache=none"]
    with pytest.raises(ConfigError, match=r"rollout\.kd_ratio reaches 1"):
        config_of(tmp_path, *one)
    alone = config_of(tmp_path, *one, "rollout.kd_ratio=0.5")
    assert alone.distill.loss == "uld" and alone.rollout.is_on


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["teacher.cross_tokenizer=dskd"], r"teacher\.cross_tokenizer: Input should be 'uld' \(given: 'dskd'\)"),
        (["distill.loss=forward_kl"], "forward_kl compares token by token; leave distill.loss out"),
        (["distill.teacher_cache=topk"], "does not keep; set it to hidden or none"),
        (["distill.token_weight=teacher_entropy"], "do not share; set it to none"),
        (["rollout.mode=on", "distill.teacher_cache=none"], "set rollout.mode to off"),
        (["data.task=text", "difficulty.signals=[ce_loss]"], "set another data.task"),
        (
            ["difficulty.signals=[ce_loss, teacher_student_kl]"],
            "teacher_student_kl has no meaning over two vocabularies",
        ),
        (["other_teachers=[{path: second}]"], "bridges a teacher that is alone; remove it, or the other teachers"),
        (
            ["teacher.cross_tokenizer=null", "other_teachers=[{path: second, cross_tokenizer: uld}]"],
            "bridges a teacher that is alone",
        ),
        (
            ["teacher={architecture: {model_type: llama}, sft: {}, cross_tokenizer: uld}", "tokenizer.path=t"],
            "give teacher.path",
        ),
        (["student={num_layers: 2}"], "has its tokenizer; give student.path"),
        (["student={architecture: {model_type: llama}}"], "brings no tokenizer; set tokenizer.path or"),
        (["curriculum.kd_ratio={start: 0.7, end: 1.0}"], "curriculum.kd_ratio reaches 1, and loss uld alone"),
        (
            ["control={}"],
            "control.kd_ratio reaches 1, and loss uld alone does not say which token is right; set it lower",
        ),
        (
            ["teacher.cross_tokenizer=null", "distill={loss: uld, teacher_cache: topk}"],
            "loss uld sorts the teacher's whole",
        ),
    ],
)
def test_what_makes_no_sense_over_two_tokenizers_is_refused_in_one_line_with_the_remedy(
    tmp_path: Path, overrides: list[str], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason) as error:
        config_of(tmp_path, *overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["student.lora={rank: 4}"],
        ["data.responses=teacher"],
        ["difficulty.rescore=each_stage"],
        ["difficulty.signals=[teacher_ce_loss, teacher_entropy, num_response_tokens]"],
        ["student={architecture: {model_type: llama}}", "tokenizer.train_vocab_size=400"],
        ["distill.teacher_cache=none", "teacher.sharded=true"],
        ["teacher.sft={num_epochs: 1}", "student.sft={num_epochs: 1}"],
        ["control={kd_ratio: 0.5}"],
    ],
)
def test_what_each_model_does_for_itself_goes_with_it(tmp_path: Path, overrides: list[str]) -> None:
    assert config_of(tmp_path, *overrides).teacher.cross_tokenizer == "uld"
