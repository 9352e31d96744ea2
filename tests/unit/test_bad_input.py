"""A user's mistakes: exit code 2, one line that says where and what to do, nothing written, and nothing started."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import NUM_ROWS, config_tree, refused, tree_digest, write_config

from pocl_ray.config import Config
from pocl_ray.data.tokenization import train_tokenizer
from pocl_ray.models.building import build_model
from pocl_ray.models.loading import load_tokenizer
from pocl_ray.models.saving import save_model
from pocl_ray.pipeline import Pipeline
from pocl_ray.ray_cluster import session
from pocl_ray.tracking import run as tracking_run

LLAMA = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a student, one of another tokenizer, and one without weights."""
    folder = tmp_path_factory.mktemp("models")
    for name, texts, width in (
        ("teacher", ["copy apple river", "reverse stone cloud"], 16),
        ("student", ["copy apple river", "reverse stone cloud"], 8),
        ("foreign", ["quite another text", "of other words"], 8),
    ):
        train_tokenizer(texts, 280, folder / "tokenizer" / name)
        tokenizer = load_tokenizer(str(folder / "tokenizer" / name))
        keys = {**LLAMA, "hidden_size": width, "intermediate_size": 2 * width}
        save_model(build_model(keys, len(tokenizer), tokenizer.eos_token_id, None, 0), tokenizer, folder / name)
    shutil.copytree(folder / "student", folder / "empty")
    (folder / "empty" / "model.safetensors").unlink()
    return folder


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def started() -> None:
        pytest.fail("Ray was asked for, so the mistake was found too late")

    monkeypatch.setattr(session, "ray_session", started)


# What is wrong, and the words that the line must hold: the place and the remedy.
CONFIG_CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "misspelt key": ({"train__learning_rat": 1e-3}, ("train.learning_rat", "did you mean train.learning_rate")),
    "value out of range": ({"curriculum__num_buckets": 0}, ("curriculum.num_buckets", "greater than or equal to 1")),
    "kd_ratio of the wrong length": ({"curriculum__kd_ratio": [0.7, 0.8, 0.9]}, ("curriculum.kd_ratio", "2 stages")),
    "more buckets than rows": (
        {"curriculum__num_buckets": NUM_ROWS + 1},
        ("curriculum.num_buckets", f"{NUM_ROWS} or less"),
    ),
    "stage smaller than a global batch": (
        {"train__global_batch_rows": 64},
        ("stage 0 has 48 rows", "lower train.global_batch_rows"),
    ),
    "fine-tuning on fewer rows than a global batch": (
        {"student__sft": {"train": {"global_batch_rows": 128}}},
        ("student.sft", "lower train.global_batch_rows"),
    ),
    "unknown signal": ({"difficulty__signals": ["rouge_l", "ce_los"]}, ("difficulty.signals", "did you mean ce_loss")),
    "unknown loss": ({"distill__loss": "forward_kll"}, ("forward_kll", "did you mean 'forward_kl'")),
    "beta outside 0 to 1": (
        {"distill": {"loss": "generalized_jsd", "loss_args": {"beta": 1.5}}},
        ("distill.loss", "beta must be a number in [0, 1], not 1.5"),
    ),
    "a ramp that ends outside the loss's range": (
        {"distill": {"loss": "generalized_jsd", "loss_args": {"beta": {"start": 0, "end": 1.5, "by": "step"}}}},
        ("distill.loss", "beta must be a number in [0, 1] at every step, and its schedule reaches 1.5"),
    ),
    "a cache with rollouts": ({"rollout": {"mode": "on"}}, ("rollout.mode on", "set distill.teacher_cache to none")),
    "summaries without their column": (
        {"data__task": "summarization"},
        ("data.train:", "the document and its summary; found: input, instruction, output", "columns: {document"),
    ),
    "a further teacher that is not there": (
        {"other_teachers": [{"path": "nowhere-at-all"}]},
        ("other_teachers.0.path", "nowhere-at-all"),
    ),
    "DeepSpeed config at odds with train": (
        {"train__deepspeed": {"gradient_clipping": 7.0}},
        ("train.deepspeed.gradient_clipping", "change one of them"),
    ),
    "architecture of a misspelt key": (
        {"student__architecture": {**LLAMA, "hidden_szie": 16}},
        ("architecture.hidden_szie", "did you mean 'hidden_size'"),
    ),
    "adapters that match nothing in a cut student": (
        {
            "student__architecture": None,
            "student__num_layers": 1,
            "student__lora": {"target_modules": ["c_attn"]},
        },
        ("'c_attn' matches no linear layer of LlamaForCausalLM; it has q_proj",),
    ),
    "more layers than the teacher has": (
        {"student__architecture": None, "student__num_layers": 3},
        ("num_layers", "teacher with 2 layers"),
    ),
}


@pytest.mark.parametrize("case", CONFIG_CASES)
def test_a_config_that_cannot_work_is_refused(
    case: str, tmp_path: Path, no_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, words = CONFIG_CASES[case]
    path = write_config(tmp_path, **changes)
    before = tree_digest(tmp_path)
    line = refused(path, capsys)
    assert all(word in line for word in words), line
    assert tree_digest(tmp_path) == before


def without_output(row: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in row.items() if key != "output"}


def rename_output(row: dict[str, str]) -> dict[str, str]:
    return {"answer" if key == "output" else key: value for key, value in row.items()}


# How the training file is spoilt, and what the line must say.
DATA_CASES: dict[str, tuple[Callable[[list[dict[str, str]]], list[dict[str, str]]], tuple[str, ...]]] = {
    "a missing column": (
        lambda rows: [rename_output(row) for row in rows],
        ("data.train:", "found: answer, input, instruction", "columns: {prompt"),
    ),
    "no rows": (lambda rows: [], ("train.jsonl", "no rows")),
    "too many unusable rows": (
        lambda rows: [row if i % 4 else {**row, "output": ""} for i, row in enumerate(rows)],
        ("data.max_reject_share", "24 of 96"),
    ),
}


@pytest.mark.parametrize("case", DATA_CASES)
def test_rows_that_cannot_be_used_are_refused(
    case: str, tmp_path: Path, no_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, words = DATA_CASES[case]
    path, rows = write_config(tmp_path), tmp_path / "train.jsonl"
    spoilt = spoil([json.loads(line) for line in rows.read_text().splitlines()])
    rows.write_text("".join(json.dumps(row) + "\n" for row in spoilt))
    before = tree_digest(tmp_path)
    line = refused(path, capsys)
    assert all(word in line for word in words), line
    assert tree_digest(tmp_path) == before


def test_a_missing_file_is_named(tmp_path: Path, no_ray: None, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, data__train={"path": str(tmp_path / "trian.jsonl")})
    before = tree_digest(tmp_path)
    assert str(tmp_path / "trian.jsonl") in refused(path, capsys)
    assert tree_digest(tmp_path) == before


def test_a_missing_bucket_is_named(
    s3_bucket: str, tmp_path: Path, no_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, storage_path="s3://no-such-bucket-here/runs")
    assert "error: s3://no-such-bucket-here: there is no such bucket" in refused(path, capsys)


def test_a_search_of_a_misspelt_key_is_refused(
    tmp_path: Path, no_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, tune={"algorithm": "grid", "space": {"curriculum.num_bucket": {"grid": [1]}}})
    before = tree_digest(tmp_path)
    assert "curriculum.num_buckets" in refused(path, capsys, verb="tune")
    assert tree_digest(tmp_path) == before


MODEL_CASES = {
    "different tokenizers": ("teacher", "foreign", ("tokenizers differ", "needs one tokenizer")),
    "a teacher without weights": ("empty", "student", ("empty", "has no weights")),
    "a student without weights": ("teacher", "empty", ("empty", "has no weights")),
    "no such directory": ("teacher", "nowhere", ("nowhere", "neither a directory")),
}


@pytest.mark.parametrize("case", MODEL_CASES)
def test_models_that_do_not_fit_are_refused(
    case: str, models: Path, tmp_path: Path, no_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, student, words = MODEL_CASES[case]
    roles = {"teacher": {"path": str(models / teacher)}, "student": {"path": str(models / student)}}
    path = write_config(tmp_path, **roles, tokenizer={})
    before = tree_digest(tmp_path)
    line = refused(path, capsys)
    assert all(word in line for word in words), line
    assert tree_digest(tmp_path) == before


def test_adapters_that_match_nothing_are_refused_with_the_names_that_exist(
    models: Path, tmp_path: Path, no_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    student = {"path": str(models / "student"), "lora": {"target_modules": ["c_attn"]}}
    path = write_config(tmp_path, teacher={"path": str(models / "teacher")}, student=student, tokenizer={})
    before = tree_digest(tmp_path)
    line = refused(path, capsys)
    assert all(word in line for word in ("student.lora.target_modules", "'c_attn'", "q_proj", "down_proj")), line
    assert tree_digest(tmp_path) == before


def test_a_tokenizer_of_the_config_that_is_not_the_teachers_is_refused(
    models: Path, tmp_path: Path, no_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    roles = {"teacher": {"path": str(models / "teacher")}, "student": {"path": str(models / "foreign")}}
    path = write_config(tmp_path, **roles, tokenizer={"path": str(models / "foreign")})
    before = tree_digest(tmp_path)
    line = refused(path, capsys)
    assert "tokenizers differ" in line and "teacher.cross_tokenizer: uld bridges two" in line
    assert tree_digest(tmp_path) == before


def test_a_student_larger_than_its_teacher_is_warned_of_and_goes_on(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roles = {"teacher": {"path": str(models / "student")}, "student": {"path": str(models / "teacher")}}
    config = Config.model_validate(config_tree(tmp_path, **roles, tokenizer={}))
    assert len(Pipeline(config).stages) == 2
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning:" in line]
    assert sum("student.path" in line for line in warnings) == 1, "beside those of rows that are cut"


def test_a_tracker_without_its_package_is_refused(
    tmp_path: Path, no_ray: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(tracking_run.PACKAGES, "wandb", "no_such_package")
    path = write_config(tmp_path, tracking=["tensorboard", "wandb"])
    before = tree_digest(tmp_path)
    line = refused(path, capsys)
    assert (
        "tracking: wandb needs the package" in line and "run pip install 'pocl-ray[wandb]', or leave wandb out" in line
    )
    assert tree_digest(tmp_path) == before


def test_a_place_that_cannot_be_written_is_refused(
    tmp_path: Path, no_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, storage_path=str(tmp_path / "train.jsonl" / "runs"))
    before = tree_digest(tmp_path)
    line = refused(path, capsys)
    assert "storage_path" in line
    assert tree_digest(tmp_path) == before


def prepared_run(folder: Path) -> Path:
    """A run whose rows are prepared and whose training has begun."""
    pipeline = Pipeline(Config.model_validate(config_tree(folder)))
    assert pipeline.stages
    pipeline.run_dir.write_text("checkpoints/begun", "")
    return write_config(folder)


def test_the_name_of_another_run_is_refused_and_says_what_differs(
    tmp_path: Path, no_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = prepared_run(tmp_path)
    before = tree_digest(tmp_path)
    line = refused(path, capsys, "curriculum.interval_epochs=3")
    assert "curriculum.interval_epochs: 4 -> 3" in line
    assert "another name" in line
    assert tree_digest(tmp_path) == before


def test_a_refused_change_leaves_the_config_of_the_run(
    tmp_path: Path, no_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = prepared_run(tmp_path)
    before = tree_digest(tmp_path)
    assert "unknown signal" in refused(path, capsys, "difficulty.signals=[luck]", "--resume-with-changes")
    assert tree_digest(tmp_path) == before


def test_the_corrected_config_may_use_the_name(
    tmp_path: Path, no_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(write_config(tmp_path), capsys, "train.global_batch_rows=64")
    assert Pipeline(Config.model_validate(config_tree(tmp_path))).stages
