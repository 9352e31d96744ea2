"""The configs that ship with the project, and what the documents say about them."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pocl_ray.config import Config, load_config
from pocl_ray.config.sources import SourceConfig
from pocl_ray.curriculum.schedule import plan_control, plan_sft, plan_stages
from pocl_ray.data.readers import locate
from pocl_ray.distill.losses import resolve_loss
from pocl_ray.records import Stage

ROOT = Path(__file__).resolve().parents[3]
METHODS = ROOT / "configs" / "methods"  # files of some keys, to lay over a config
CONFIGS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if METHODS not in path.parents]
GPT2, OPT, QWEN, SMOLLM2 = (
    ROOT / "configs" / name
    for name in ("paper/gpt2-dolly.yaml", "paper/opt-dolly.yaml", "qwen2.5-cluster.yaml", "smollm2.yaml")
)
DOLLY_ROWS = 11_435  # what the authors' preprocessing leaves of Dolly
TYPICAL_ROWS = {GPT2: DOLLY_ROWS, OPT: DOLLY_ROWS, QWEN: 14_511, SMOLLM2: 731}  # others: 2,000
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile", *sorted((ROOT / "docs").glob("*.md"))]
NAMED_PATH = re.compile(
    r"(?<![\w/.-])((?:configs|docs|pocl_ray|tests|benchmarks|cluster)/[\w./-]+\.(?:yaml|py|md|sh|j2|json))"
)


def ids_of(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


def stages_of(path: Path, *overrides: str) -> tuple[Stage, ...]:
    return plan_stages(load_config(path, overrides), TYPICAL_ROWS.get(path, 2_000))


def sources_of(config: Config) -> list[SourceConfig]:
    data = config.data
    return [data.train, *([data.dev] if data.dev else []), *data.tests.values()]


@pytest.mark.parametrize("path", CONFIGS, ids=ids_of(CONFIGS))
def test_every_config_is_valid_and_can_be_planned(path: Path) -> None:
    config, stages = load_config(path), stages_of(path)
    curriculum = config.curriculum
    num_stages = curriculum.frontier.num_stages if curriculum.pacing == "frontier" else curriculum.num_buckets
    assert [stage.index for stage in stages] == list(range(num_stages))
    assert stages[-1].num_rows == TYPICAL_ROWS.get(path, 2_000)
    if config.control is not None:
        num_steps = sum(stage.num_steps for stage in stages)
        (control,) = plan_control(config, stages[-1].end_rank, num_steps)
        assert control.num_steps == num_steps
    for role in ("teacher", "student"):
        sft = getattr(config, role).sft
        if sft is not None:
            batch = config.sft_train(sft).global_batch_rows
            (stage,) = plan_sft(stages[-1].num_rows, sft.num_epochs, sft.max_steps, batch, f"{role}.sft")
            assert stage.num_steps > 0


@pytest.mark.parametrize("path", CONFIGS, ids=ids_of(CONFIGS))
def test_every_config_names_a_loss_and_sources_that_exist(path: Path) -> None:
    config = load_config(path)
    resolve_loss(config.distill.loss, config.distill.loss_args, config.distill.scale_by_t_squared)
    assert {locate(source).format for source in sources_of(config)} <= {"samples", "hub"}


@pytest.mark.parametrize("path", CONFIGS, ids=ids_of(CONFIGS))
def test_a_generation_section_that_is_given_says_what_its_default_would_have_said(path: Path) -> None:
    """A section replaces its default as a whole, so the paper's settings must be in it."""
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    difficulty = given.get("difficulty", {}).get("generation", {"sampling_temperature": 0.01})
    dev = given.get("evaluation", {}).get("dev_generation", {"sampling_temperature": 0.0})
    assert difficulty.get("sampling_temperature") == 0.01
    assert dev.get("sampling_temperature") == 0.0


def test_the_paper_config_reproduces_the_released_logs() -> None:
    stages = stages_of(GPT2)
    assert [stage.num_steps for stage in stages] == [352, 712, 1064, 1424]
    assert [stage.kd_temperature for stage in stages] == [1.0, 1.33, 1.67, 2.0]
    assert [stage.kd_ratio for stage in stages] == [0.7, 0.8, 0.9, 1.0]
    assert [stage.num_rows for stage in stages] == [2_858, 5_716, 8_574, 11_435]
    assert all(stage.restart_optimizer and stage.lr_num_steps == stage.num_steps for stage in stages)


def test_the_plan_command_prints_the_released_figures() -> None:
    command = [sys.executable, "-m", "pocl_ray", "plan", str(GPT2), "--num-rows", str(DOLLY_ROWS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r"\s*\d+\s+0", line)]
    assert [(row[4], row[5], row[6]) for row in rows] == [
        ("352", "1", "0.7"),
        ("712", "1.33", "0.8"),
        ("1064", "1.67", "0.9"),
        ("1424", "2", "1"),
    ]


def test_the_paper_config_has_the_papers_settings() -> None:
    config = load_config(GPT2)
    train, evaluation = config.train, config.evaluation
    assert (train.global_batch_rows, train.learning_rate, train.lr_schedule, train.warmup_ratio) == (
        64,
        1e-4,
        "cosine",
        0.0,
    )
    assert (train.weight_decay, train.max_grad_norm, train.precision, train.zero_stage) == (0.01, 1.0, "fp16", 1)
    assert (config.data.prompt_template, config.data.max_prompt_tokens, config.data.max_tokens) == ("alpaca", 256, 512)
    assert (config.difficulty.signals, config.difficulty.rrf_k) == ({"rouge_l": 1.0, "ce_loss": 1.0}, 60)
    assert (config.difficulty.generation.sampling_temperature, config.difficulty.generation.no_repeat_ngram_size) == (
        0.01,
        6,
    )
    assert evaluation.seeds == (10, 20, 30, 40, 50)
    assert (evaluation.generation.sampling_temperature, evaluation.generation.no_repeat_ngram_size) == (1.0, 6)
    assert (config.curriculum.hand_off, config.distill.loss, config.student.sft) == ("best", "forward_kl", None)


def test_smollm2_takes_other_rows_by_the_overrides_of_the_makefile(tmp_path: Path) -> None:
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    overrides = [f"data.{name}.path={tmp_path / name}.jsonl" for name in ("train", "dev")]
    config = load_config(SMOLLM2, overrides)
    assert [locate(source).format for source in sources_of(config)] == ["jsonl", "jsonl"]
    assert all(source.split is None and not source.columns for source in sources_of(config))


def test_the_config_reference_is_what_its_script_writes() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "make_config_reference.py"))
    written = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert written == script["render"](), "run python docs/make_config_reference.py"


def test_the_config_in_the_readme_is_valid(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "config.yaml").write_text(block, encoding="utf-8")
    assert len(plan_stages(load_config(tmp_path / "config.yaml"), 2_000)) == 4


def test_the_paper_map_names_tests_that_exist() -> None:
    written = (ROOT / "docs" / "paper_map.md").read_text(encoding="utf-8")
    there = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    named = set(re.findall(r"`(test_\w+)`", written))
    assert named and named <= there, f"unknown: {sorted(named - there)}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids_of(DOCUMENTS))
def test_documents_name_files_that_exist(path: Path) -> None:
    named = NAMED_PATH.findall(path.read_text(encoding="utf-8"))
    missing = sorted({name for name in named if not (ROOT / name).exists()})
    assert not missing, f"{path.name} names {missing}"
