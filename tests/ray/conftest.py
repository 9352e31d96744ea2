"""One Ray cluster for the session, and a small run directory: rows, a tokenizer, two tiny models."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from matrix import LINE, table
from tiny import FULL, ROOT, FullRun, cli, write_config

from pocl_ray.config import DataConfig, SourceConfig
from pocl_ray.data.rows import prepare_rows
from pocl_ray.data.tokenization import train_tokenizer
from pocl_ray.models.building import build_model
from pocl_ray.models.loading import load_tokenizer
from pocl_ray.models.places import ModelRef
from pocl_ray.models.saving import save_model
from pocl_ray.ray_cluster.session import connect, set_up_worker
from pocl_ray.records import RowsSummary
from pocl_ray.run_directory.storage import RunDirectory

os.environ.setdefault("RAY_worker_niceness", "0")

MAX_TOKENS = 48
_WORDS = "apple river stone cloud green seven market window silver garden morning paper".split()  # noqa: SIM905
_SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the fault matrix where its tests were run, be it in another process."""
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    lines = [value for report in reports for name, value in report.user_properties if name == LINE]
    if lines:
        terminalreporter.section("fault matrix")
        terminalreporter.write_line("\n".join(table(lines)))


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A cluster of four logical CPUs; `RAY_ADDRESS` lets workers find it, not one that died."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    connect(
        None,
        num_cpus=4,
        runtime_env={
            "env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},  # this checkout, not an installed one
            "worker_process_setup_hook": set_up_worker,
        },
    )
    yield
    ray.shutdown()


@dataclass(frozen=True)
class TinyRun:
    """A run directory with everything that scoring and evaluation start from."""

    run_dir: RunDirectory
    train: RowsSummary
    dev: RowsSummary
    teacher: ModelRef
    student: ModelRef
    tokenizer: str = "tokenizer"


def write_rows(path: Path, count: int, seed: int) -> Path:
    """Write instructions to copy or to reverse a few words."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        words = list(rng.choice(_WORDS, size=int(rng.integers(1, 5))))
        task, answer = ("Copy:", words) if rng.random() < 0.5 else ("Reverse:", words[::-1])
        lines.append(f'{{"instruction": "{task}", "input": "{" ".join(words)}", "output": "{" ".join(answer)}"}}\n')
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Build it once; a test that writes there names a place of its own."""
    scratch = tmp_path_factory.mktemp("tiny")
    sources = {
        name: write_rows(scratch / f"{name}.jsonl", n, seed) for name, n, seed in (("train", 90, 0), ("dev", 20, 1))
    }
    run_dir = RunDirectory.open(str(scratch), "run")
    texts = [path.read_text(encoding="utf-8") for path in sources.values()]
    train_tokenizer(texts, 300, run_dir.local("tokenizer"))
    tokenizer = load_tokenizer(str(run_dir.local("tokenizer")))
    config = DataConfig(
        train=SourceConfig(path="unused"),
        holdout_rows=1,
        prompt_template="plain",
        max_prompt_tokens=30,
        max_tokens=MAX_TOKENS,
    )
    summaries = {}
    for name, path in sources.items():
        rows = run_dir.local(f"rows/{name}.arrow")
        summaries[name], _ = prepare_rows(name, SourceConfig(path=str(path)), config, tokenizer, rows)
    refs = {}
    for seed, (name, width) in enumerate({"teacher": 32, "student": 16}.items()):
        architecture = {
            "model_type": "llama",
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": 2,
        }
        model = build_model({**architecture, **_SIZES}, len(tokenizer), tokenizer.eos_token_id, None, seed)
        for parameter in model.parameters():
            parameter.data.mul_(2)
        refs[name] = ModelRef(str(save_model(model, tokenizer, run_dir.local(f"models/{name}"))))
    return TinyRun(run_dir, summaries["train"], summaries["dev"], refs["teacher"], refs["student"])


@pytest.fixture(scope="session")
def ready_made(tiny_run: TinyRun) -> dict[str, Any]:
    """Changes of the tiny config: a teacher that need not be trained first, and no fine-tuning of the student."""
    return {"teacher": {"path": tiny_run.teacher.path}, "tokenizer": {}, "student__sft": None}


@pytest.fixture(scope="session")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> FullRun:
    """The whole flow once, from the command line; tests that change something copy it."""
    folder = tmp_path_factory.mktemp("full")
    config = write_config(folder, **FULL)
    done = cli("run", str(config))
    assert done.returncode == 0, done.stderr
    return FullRun(folder, config, folder / "runs" / "tiny")
