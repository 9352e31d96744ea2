"""Files laid over a config: sections are merged, everything else is replaced as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from pocl_ray.config import Config, load_config
from pocl_ray.errors import ConfigError

BASE = """
name: run
data:
  train: {path: train.jsonl}
  dev: {path: dev.jsonl}
teacher: {path: teacher}
student: {num_layers: 2}
curriculum: {num_buckets: 3, kd_ratio: {shape: cosine, start: 0.1, end: 1.0, by: step}}
distill: {loss: skewed_reverse_kl, loss_args: {alpha: 0.2}, teacher_cache: none}
control: {kd_ratio: 0.5}
"""


def loaded(folder: Path, *layers: str) -> Config:
    """The base config with these layers over it; one with an equals sign is an override."""
    (folder / "base.yaml").write_text(BASE, encoding="utf-8")
    overrides = []
    for number, text in enumerate(layers):
        if "=" in text:
            overrides.append(text)
            continue
        (folder / f"layer{number}.yaml").write_text(text, encoding="utf-8")
        overrides.append(str(folder / f"layer{number}.yaml"))
    return load_config(folder / "base.yaml", overrides)


def test_a_layer_changes_its_own_keys_and_leaves_the_others_of_a_section(tmp_path: Path) -> None:
    config = loaded(tmp_path, "train: {learning_rate: 1e-3}\ncurriculum: {pacing: one_pass}\n")
    assert config.train.learning_rate == 1e-3
    assert (config.curriculum.pacing, config.curriculum.num_buckets) == ("one_pass", 3)


def test_free_mappings_and_schedules_are_replaced_as_a_whole(tmp_path: Path) -> None:
    config = loaded(
        tmp_path,
        "distill: {loss: js_distance, loss_args: {lam: 0.5}}\ncurriculum: {kd_ratio: {start: 0.5, end: 1.0}}\n",
    )
    assert config.distill.loss_args == {"lam": 0.5}
    assert config.distill.teacher_cache == "none"
    assert (config.curriculum.kd_ratio.shape, config.curriculum.kd_ratio.by) == ("linear", "stage")
    assert loaded(tmp_path, "distill: {loss: forward_kl, loss_args: {}}\n").distill.loss_args == {}


def test_null_takes_a_section_away(tmp_path: Path) -> None:
    assert loaded(tmp_path, "control: null\n").control is None


def test_layers_and_overrides_apply_in_the_order_given(tmp_path: Path) -> None:
    layer = "train: {learning_rate: 1e-3}\n"
    assert loaded(tmp_path, layer, "train.learning_rate=5e-4").train.learning_rate == 5e-4
    assert loaded(tmp_path, "train.learning_rate=5e-4", layer).train.learning_rate == 1e-3


def test_a_mistake_in_a_layer_is_refused_like_one_in_the_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key train\.learning_rat; did you mean train\.learning_rate"):
        loaded(tmp_path, "train: {learning_rat: 1}\n")
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(tmp_path / "base.yaml", [str(tmp_path / "missing.yaml")])
