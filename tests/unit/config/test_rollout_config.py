"""The config of rollouts: its names, YAML's own idea of on and off, and combinations that make no sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pocl_ray.config import Config, RolloutConfig, load_config
from pocl_ray.config.loading import dump_config
from pocl_ray.errors import ConfigError
from pocl_ray.fingerprints import distill_dependencies

ROOT = Path(__file__).resolve().parents[3]
ON_POLICY = ("gkd", "gkd_on_policy", "distillm", "distillm2")
LIVE = "distill.teacher_cache=none"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tree = {
        "name": "run",
        "data": {"train": {"path": "train.jsonl"}, "dev": {"path": "dev.jsonl"}},
        "teacher": {"path": "teacher"},
        "student": {"num_layers": 2},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return tmp_path / "config.yaml"


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_without_the_section_nothing_is_written(file: Path) -> None:
    assert load_config(file).rollout.mode == "off"
    assert not load_config(file).rollout.is_on


@pytest.mark.parametrize(
    ("given", "mode"), [("on", "on"), ("off", "off"), ("mixed", "mixed"), ("adaptive", "adaptive")]
)
def test_modes_are_words_although_yaml_reads_two_of_them_as_booleans(file: Path, given: str, mode: str) -> None:
    assert load_config(file, [f"rollout.mode={given}", LIVE]).rollout.mode == mode
    file.write_text(file.read_text() + f"rollout: {{mode: {given}}}\n")
    assert load_config(file, [LIVE]).rollout.mode == mode


def test_lambda_is_written_as_in_the_paper_and_comes_back_from_the_resolved_config(file: Path, tmp_path: Path) -> None:
    config = load_config(file, ["rollout.mode=mixed", "rollout.lambda=0.25", LIVE])
    assert config.rollout.mix_probability == 0.25
    written = dump_config(config)
    assert "  lambda: 0.25\n" in written and "mix_probability" not in written
    (tmp_path / "again.yaml").write_text(written)
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize("share", ["-0.1", "1.1", "half"])
def test_lambda_is_a_probability(file: Path, share: str) -> None:
    assert "rollout.lambda" in refusal(file, "rollout.mode=mixed", f"rollout.lambda={share}", LIVE)


def test_a_misspelt_key_names_the_nearest(file: Path) -> None:
    assert "did you mean rollout.lambda?" in refusal(file, "rollout.lamda=0.5")


@pytest.mark.parametrize("mode", ["on", "mixed", "adaptive"])
def test_rollouts_with_a_teacher_cache_are_refused(file: Path, mode: str) -> None:
    line = refusal(file, f"rollout.mode={mode}")
    assert f"rollout.mode {mode}" in line and "set distill.teacher_cache to none" in line


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rollout.mode=mixed", "rollout.beside_data=true", LIVE], ("beside_data", "set mode to on")),
        (["rollout.mode=on", "rollout.loss_args={alpha: 0.1}", LIVE], ("loss_args", "rollout.loss")),
        (
            ["rollout.mode=adaptive", "rollout.buffer_rows=10", LIVE],
            ("rollout.buffer_rows (10)", "train.global_batch_rows (64)"),
        ),
        (["rollout.backend=vllm"], ("backend vllm", "mode off")),
        (
            ["rollout.mode=on", "rollout.backend=vllm", "scaling.use_gpu=false", LIVE],
            ("rollout.backend vllm", "scaling.use_gpu"),
        ),
        (["rollout.threshold_start=1.5"], ("rollout.threshold_start",)),
        (["rollout.top_p=0"], ("rollout.top_p",)),
        (["rollout.max_new_tokens=0"], ("rollout.max_new_tokens",)),
    ],
)
def test_what_makes_no_sense_is_refused(file: Path, overrides: list[str], words: tuple[str, ...]) -> None:
    line = refusal(file, *overrides)
    assert all(word in line for word in words), line


def test_runs_without_rollouts_keep_their_fingerprints_and_others_depend_on_the_section(file: Path) -> None:
    def depends(*overrides: str) -> list[Any]:
        return distill_dependencies(load_config(file, overrides), "ranking", "student", [])

    assert depends() == depends("rollout.top_p=0.5")
    assert depends(LIVE, "rollout.mode=on") != depends(LIVE)
    assert depends(LIVE, "rollout.mode=on") != depends(LIVE, "rollout.mode=on", "rollout.top_p=0.5")


@pytest.mark.parametrize("name", ON_POLICY)
@pytest.mark.parametrize("base", ["quickstart.yaml", "smollm2.yaml", "paper/gpt2-dolly.yaml", "qwen2.5-cluster.yaml"])
def test_an_on_policy_preset_is_valid_over_every_base(name: str, base: str) -> None:
    tree = yaml.safe_load((ROOT / "configs" / base).read_text(encoding="utf-8"))
    layer = yaml.safe_load((ROOT / "configs" / "methods" / f"{name}.yaml").read_text(encoding="utf-8"))
    for section, keys in layer.items():
        tree[section] = {**tree.get(section, {}), **keys}
    config = Config.model_validate(tree)
    assert config.rollout.is_on
    assert config.distill.teacher_cache == "none"


def test_presets_say_what_their_papers_do() -> None:
    layers = {name: yaml.safe_load((ROOT / "configs/methods" / f"{name}.yaml").read_text()) for name in ON_POLICY}
    rollouts = {name: RolloutConfig.model_validate(layer["rollout"]) for name, layer in layers.items()}
    assert {name: rollout.mode for name, rollout in rollouts.items()} == {
        "gkd": "mixed",
        "gkd_on_policy": "on",
        "distillm": "adaptive",
        "distillm2": "on",
    }
    assert layers["gkd"]["distill"]["loss"] == "generalized_jsd"
    adaptive = rollouts["distillm"]
    assert (adaptive.threshold_start, adaptive.threshold_rise, adaptive.buffer_rows) == (0.0, 0.1, 1000)
    assert rollouts["distillm2"].beside_data
    assert (layers["distillm2"]["distill"]["loss"], rollouts["distillm2"].loss) == (
        "skewed_forward_kl",
        "skewed_reverse_kl",
    )
