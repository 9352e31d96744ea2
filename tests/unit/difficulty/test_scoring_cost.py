"""The work of a scoring as `plan` tells it: passes, FLOPs, and the time at the rate of an earlier one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pocl_ray.config import Config
from pocl_ray.difficulty.measured import passes_of
from pocl_ray.difficulty.scoring_cost import FLOPS, scoring_flops, scoring_lines
from pocl_ray.errors import ModelError
from pocl_ray.experiments.flops import size_of
from pocl_ray.models.shapes import config_on_this_machine, size_of_config, sizes_of
from pocl_ray.preview import print_plan
from pocl_ray.records import RowsSummary

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "head_dim": 8,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 100},
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "ffn_dim": 80,
        "max_position_embeddings": 64,
        "vocab_size": 100,
        "word_embed_proj_dim": 16,
        "pad_token_id": 1,
    },
    **{name: {**LLAMA, "pad_token_id": 0} for name in ("llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3")},
    **{name: {**LLAMA, "pad_token_id": 0} for name in ("granite", "phi3")},
}
TRAIN = RowsSummary("train", "rows/train.arrow", 10, 0, 100, 50, 9, "")
LENGTHS = {"max_prompt_tokens": 20, "max_tokens": 30}
DEV = RowsSummary("dev", "rows/dev.arrow", 2, 0, 20, 10, 9, "")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sizes_from_the_numbers_alone_are_those_of_the_model(family: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(family, **FAMILIES[family])
    config.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert size_of_config(content) == size_of(model)


def test_a_family_that_is_not_known_and_a_number_that_is_left_out_give_no_size() -> None:
    assert size_of_config({"model_type": "mamba", **LLAMA}) is None
    assert size_of_config({**LLAMA, "model_type": "qwen3", "head_dim": None}) is None
    assert size_of_config({"model_type": "gpt2", "n_embd": 32}) is None


def config_of(tmp_path: Path, **more: Any) -> Config:
    for name, layers in (("teacher", 3), ("student", 1)):
        (tmp_path / name).mkdir(exist_ok=True)
        content = {**LLAMA, "model_type": "llama", "num_hidden_layers": layers}
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    tree = {
        "name": "run",
        "storage_path": str(tmp_path / "runs"),
        "data": {"train": {"path": "train.jsonl"}, "dev": {"path": "dev.jsonl"}, **LENGTHS},
        "teacher": {"path": str(tmp_path / "teacher")},
        "student": {"path": str(tmp_path / "student")},
    }
    return Config.model_validate({**tree, **more})


def test_a_cut_student_has_its_own_number_of_layers(tmp_path: Path) -> None:
    config = config_of(tmp_path, student={"num_layers": 2})
    sizes = sizes_of(config.teacher, config.student, None)
    teacher, student = sizes["teacher"], sizes["student"]
    assert teacher is not None and student is not None
    assert (student.body_weights * 3, student.attention_width) == (teacher.body_weights * 2, 64)


def test_each_pass_has_its_flops(tmp_path: Path) -> None:
    config = config_of(tmp_path, difficulty={"signals": ["rouge_l", "teacher_student_kl"]})
    sizes = sizes_of(config.teacher, config.student, None)
    student, teacher = sizes["student"], sizes["teacher"]
    assert student is not None and teacher is not None
    flops = scoring_flops(config, passes_of(config, True), {"train": TRAIN, "dev": DEV}, True)
    assert flops is not None
    assert flops.answers == student.forward(300, 200, 30), "20 tokens beside a prompt of 10, in rows of at most 30"
    assert flops.student == student.forward(150, 50, 15) + student.head(50)
    assert flops.teacher == teacher.forward(150, 50, 15) + teacher.forward(30, 10, 15)
    cheap = config_of(tmp_path, difficulty={"signals": ["ce_loss"]})
    alone = scoring_flops(cheap, passes_of(cheap, False), {"train": TRAIN}, False)
    assert alone is not None and (alone.answers, alone.teacher) == (0, 0)
    assert alone.student == student.forward(150, 50, 15)


def test_further_teachers_read_all_rows_for_caches_of_their_own(tmp_path: Path) -> None:
    alone = config_of(tmp_path, difficulty={"signals": ["ce_loss"]})
    path = str(tmp_path / "teacher")
    two = config_of(tmp_path, difficulty={"signals": ["ce_loss"]}, teacher=[{"path": path}, {"path": path}])
    sets = {"train": TRAIN, "dev": DEV}
    one, both = (scoring_flops(config, passes_of(config, True), sets, True) for config in (alone, two))
    assert one is not None and both is not None and both.teacher == 2 * one.teacher
    told = scoring_lines(two, passes_of(two, True), 10, sets, True, None)
    assert "1 further teacher reads the same, for a cache each" in told[0] and "the teachers" in told[1]
    without_cache = scoring_flops(two, passes_of(two, False), sets, False)
    assert without_cache is not None and without_cache.teacher == 0
    (tmp_path / "teacher" / "config.json").unlink()
    assert scoring_flops(two, passes_of(two, True), sets, True) is None


def test_a_time_is_told_only_at_the_rate_of_a_scoring_of_the_same_kind(tmp_path: Path) -> None:
    config = config_of(tmp_path, difficulty={"signals": ["ce_loss"]})
    passes, sets = passes_of(config, False), {"train": TRAIN}
    flops = scoring_flops(config, passes, sets, False)
    assert flops is not None

    def told(earlier: dict[str, Any] | None) -> str:
        return scoring_lines(config, passes, 10, sets, False, earlier)[1]

    known = {"seconds": 60.0, "counts": {FLOPS: 2 * flops.total}}
    assert told(known).endswith("of the scoring in the run directory, 30 s")
    with_answers = {"seconds": 1.0, "counts": {FLOPS: 1e9, "num_unstopped_answers": 1}}
    for earlier in (None, {"seconds": 60.0, "counts": {}}, with_answers):
        assert "only a scoring of this kind in the run directory can say" in told(earlier)


def test_a_plan_says_what_scoring_computes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(config_of(tmp_path), 1000)
    printed = capsys.readouterr().out
    assert "scoring: the student answers 1,000 prompts, at most 30 tokens each; the student reads 1,000 rows" in printed
    assert "; the teacher reads 1,000 rows, and those of dev for its cache\n" in printed
    assert "its FLOPs are known once the rows are prepared" in printed
    assert "compared" not in printed
    lengths = {"signals": ["response_tokens"]}
    print_plan(config_of(tmp_path, distill={"teacher_cache": "none"}, difficulty=lengths), 1000)
    assert "scoring: asks no model" in capsys.readouterr().out


def test_a_plan_of_prepared_rows_counts_flops_and_takes_the_rate_of_the_run_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = config_of(tmp_path), tmp_path / "runs" / "run"
    (run / "rows").mkdir(parents=True)
    sets = {one.name: one.__dict__ for one in (TRAIN, DEV)}
    (run / "rows" / "summary.json").write_text(json.dumps({"sets": sets, "leaks": {}}))
    counts = {FLOPS: 10**6, "num_unstopped_answers": 3}
    entry = {"status": "done", "seconds": 2.0, "counts": counts}
    (run / "manifest.json").write_text(json.dumps({"steps": {"scores": entry}}))
    small = Config.model_validate(
        {
            **config.model_dump(mode="json"),
            "train": {"global_batch_rows": 2, "micro_batch_rows": 1},
            "curriculum": {"num_buckets": 2},
        }
    )
    print_plan(small, None)
    printed = capsys.readouterr().out
    assert "FLOPs (answers at most" in printed
    assert "at the 5e+05 FLOPs a second of the scoring in the run directory" in printed


def test_a_config_of_a_model_that_is_none_names_the_role(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    (tmp_path / "student" / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match=r"^student\.path: .*config\.json: is no config of a model"):
        config_on_this_machine("student", config.student)
