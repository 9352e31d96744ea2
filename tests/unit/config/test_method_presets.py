"""The presets under configs/methods: each is valid over the configs that ship, and says what its method is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pocl_ray.config import load_config
from pocl_ray.curriculum.schedule import plan_stages
from pocl_ray.distill.losses import resolve_loss
from pocl_ray.errors import ConfigError
from pocl_ray.fingerprints import any_training_reads_teacher

ROOT = Path(__file__).resolve().parents[3]
METHODS = {path.stem: path for path in sorted((ROOT / "configs" / "methods").glob("*.yaml"))}
BASES = ("quickstart.yaml", "smollm2.yaml", "paper/gpt2-dolly.yaml")
READY_MADE = ("paper/gpt2-dolly.yaml", "qwen2.5-cluster.yaml")  # both models come with tokenizers of their own
NUM_ROWS = 2_000


def preset(name: str, base: str = "quickstart.yaml", *more: str) -> Any:
    return load_config(ROOT / "configs" / base, [*more, str(METHODS[name])])


@pytest.mark.parametrize(
    ("name", "base"), [(name, base) for name in METHODS for base in (READY_MADE if name == "uld" else BASES)]
)
def test_a_method_is_valid_over_every_base_and_can_be_planned(name: str, base: str) -> None:
    config = preset(name, base)
    resolve_loss(config.distill.loss, config.distill.loss_args, config.distill.scale_by_t_squared)
    assert plan_stages(config, NUM_ROWS)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_a_small_file_that_says_where_it_comes_from(name: str) -> None:
    text = METHODS[name].read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert len(text.splitlines()) <= 24
    assert not {"name", "student", "train", "scaling"} & set(yaml.safe_load(text)), "those are the base config's"


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("kd", "forward_kl"),
        ("reverse_kl", "reverse_kl"),
        ("js", "js_distance"),
        ("tvd", "tv_distance"),
        ("skew_kl", "skewed_forward_kl"),
        ("skew_rkl", "skewed_reverse_kl"),
        ("adaptive_kl", "adaptive_kl"),
    ],
)
def test_a_plain_method_is_its_loss_and_keeps_the_curriculum(name: str, loss: str) -> None:
    config, base = preset(name), load_config(ROOT / "configs" / "quickstart.yaml")
    assert config.distill.loss == loss
    assert config.model_copy(update={"distill": base.distill}) == base


def test_without_the_curriculum_there_is_one_stage_of_all_rows_at_the_same_steps() -> None:
    config = preset("kd", "quickstart.yaml", str(METHODS["plain"]))
    base = load_config(ROOT / "configs" / "quickstart.yaml")
    (stage,) = plan_stages(config, NUM_ROWS)
    assert (stage.num_rows, stage.kd_ratio, stage.kd_temperature) == (NUM_ROWS, 1.0, 1.0)
    assert stage.num_steps == sum(stage.num_steps for stage in plan_stages(base, NUM_ROWS))
    assert [*config.difficulty.signals] == ["ce_loss"]  # no answers are written for a ranking that nothing uses


@pytest.mark.parametrize(("name", "responses"), [("sft", "reference"), ("seqkd", "teacher")])
@pytest.mark.parametrize("base", BASES)
def test_supervised_methods_train_without_reading_the_teacher(name: str, responses: str, base: str) -> None:
    config = preset(name, base)
    stages = plan_stages(config, NUM_ROWS)
    assert config.data.responses == responses
    assert {stage.kd_ratio for stage in stages} == {0.0}
    assert not any_training_reads_teacher(config, stages)


def test_minillms_evaluation_is_our_default() -> None:
    default = load_config(ROOT / "configs" / "qwen2.5-cluster.yaml").evaluation
    named = preset("minillm_evaluation", "qwen2.5-cluster.yaml").evaluation
    assert named.seeds == default.model_fields["seeds"].default == (10, 20, 30, 40, 50)
    generation = type(default)().generation
    assert (generation.sampling_temperature, generation.top_p, generation.no_repeat_ngram_size) == (1.0, 1.0, 6)
    assert (named.generation.sampling_temperature, named.generation.top_p) == (1.0, 1.0)
    assert named.generation.no_repeat_ngram_size == 6


@pytest.mark.parametrize("base", READY_MADE)
def test_uld_keeps_cross_entropy_beside_it_at_the_papers_weight(base: str) -> None:
    config = preset("uld", base)
    assert (config.teacher.cross_tokenizer, config.distill.loss, config.distill.loss_args) == ("uld", "uld", {})
    assert {stage.kd_ratio for stage in plan_stages(config, NUM_ROWS)} == {0.6}  # CE + 1.5 ULD, divided by 2.5


@pytest.mark.parametrize(
    ("base", "reason"), [("quickstart.yaml", "set pacing to another"), ("smollm2.yaml", "student cut")]
)
def test_uld_over_models_of_one_tokenizer_is_refused(base: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        preset("uld", base)


def test_behind_uld_seqkd_takes_the_text_of_a_teacher_with_another_tokenizer() -> None:
    config = preset("seqkd", "qwen2.5-cluster.yaml", str(METHODS["uld"]))
    assert config.teacher.cross_tokenizer == "uld" and config.data.responses == "teacher"
    assert not any_training_reads_teacher(config, plan_stages(config, NUM_ROWS))
