"""A tiny run of everything: rows, a config, and the command line, here or in a process of its own."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pocl_ray import cli as command_line
from pocl_ray.config import Config

ROOT = Path(__file__).resolve().parents[1]
WORDS = "apple river stone cloud green seven market window silver garden morning paper".split()  # noqa: SIM905
NUM_ROWS = 96
# Of the full run and its copies: two workers, where most others have one and so start fewer processes, and no
# fine-tuning of the student, which test_adapters.py has.
FULL: dict[str, Any] = {"scaling__num_workers": 2, "scaling__evaluation_actors": 2, "student__sft": None}

LLAMA = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
GENERATION = {"sampling_temperature": 0.0, "max_new_tokens": 6}
CONFIG: dict[str, Any] = {
    "name": "tiny",
    "seed": 3,
    "data": {"prompt_template": "{instruction} {input} =>", "max_prompt_tokens": 30, "max_tokens": 48},
    "tokenizer": {"train_vocab_size": 300},
    "teacher": {
        "architecture": {**LLAMA, "hidden_size": 32, "intermediate_size": 48},
        "sft": {"max_steps": 3},
    },
    "student": {
        "architecture": {**LLAMA, "hidden_size": 16, "intermediate_size": 24, "tie_word_embeddings": True},
        "sft": {"max_steps": 2},
    },
    "difficulty": {"generation": {**GENERATION, "sampling_temperature": 0.01}, "shard_rows": 32},
    "curriculum": {"num_buckets": 2, "interval_epochs": 4},  # 36 steps: enough to kill a worker among them
    "train": {
        "global_batch_rows": 16,
        "micro_batch_rows": 4,
        "learning_rate": 5e-3,
        "precision": "fp32",
        "eval_every_epochs": 2,
        "checkpoint_every_steps": 3,
    },
    "control": {},
    "scaling": {"num_workers": 1, "evaluation_actors": 1},
    "evaluation": {"seeds": [10], "generation": {"max_new_tokens": 6}, "dev_generation": GENERATION, "max_dev_rows": 8},
}


def write_rows(path: Path, count: int, seed: int) -> Path:
    """Write instructions to copy or to reverse a few words."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        words = list(rng.choice(WORDS, size=int(rng.integers(1, 5))))
        task, answer = ("Copy", words) if rng.random() < 0.5 else ("Reverse", words[::-1])
        lines.append(json.dumps({"instruction": task, "input": " ".join(words), "output": " ".join(answer)}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_texts(folder: Path) -> dict[str, Any]:
    """Write plain texts as the sets of the tiny config; return its changes for them."""
    rng = np.random.default_rng(0)
    _write_sets(folder, lambda: {"text": _some_words(rng, 24)})
    return {
        "data__task": "text",
        "data__prompt_template": None,
        "data__max_prompt_tokens": None,
        "data__max_tokens": 32,
        "difficulty": {"signals": ["ce_loss", "teacher_student_kl"], "shard_rows": 32},
    }


def write_summaries(folder: Path) -> dict[str, Any]:
    """Write articles with their first word as summary, as the sets of the tiny config; return its changes for them."""
    rng = np.random.default_rng(1)

    def one() -> dict[str, str]:
        article = _some_words(rng, 30)
        return {"article": article, "highlights": article.split()[0]}

    _write_sets(folder, one)
    return {"data__task": "summarization", "data__prompt_template": "Short: {document} =>"}


def _some_words(rng: np.random.Generator, most: int) -> str:
    return " ".join(rng.choice(WORDS, size=int(rng.integers(2, most))))


def _write_sets(folder: Path, one: Callable[[], dict[str, str]]) -> None:
    for name, count in (("train", 60), ("dev", 6), ("test", 6)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one()) + "\n" for _ in range(count)))


def config_tree(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return the tiny config with its rows and runs in `folder`; changes are dotted keys, with `__` for the dot."""
    tree = copy.deepcopy(CONFIG)
    for name, count, seed in (("train", NUM_ROWS, 0), ("dev", 10, 1), ("test", 10, 2)):
        path = folder / f"{name}.jsonl"
        if not path.exists():
            write_rows(path, count, seed)
    tree["storage_path"] = str(folder / "runs")
    tree["data"].update(train={"path": str(folder / "train.jsonl")}, dev={"path": str(folder / "dev.jsonl")})
    tree["data"]["tests"] = {"held_out": {"path": str(folder / "test.jsonl")}}
    for key, value in changes.items():
        *parents, leaf = key.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        if value is None:
            node.pop(leaf, None)
        else:
            node[leaf] = copy.deepcopy(value)  # a later change may be one within it
    return tree


def write_config(folder: Path, **changes: Any) -> Path:
    """Write the tiny config to `folder/tiny.yaml`."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config_tree(folder, **changes), sort_keys=False), encoding="utf-8")
    return path


def cli_environment() -> dict[str, str]:
    """The environment of a command: this checkout, a cluster of its own."""
    kept = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command(*arguments: str) -> list[str]:
    """The command line of `pocl-ray`."""
    return [sys.executable, "-m", "pocl_ray", *arguments]


def cli(*arguments: str, timeout_s: float = 1500) -> subprocess.CompletedProcess[str]:
    """Run `pocl-ray` to its end."""
    return subprocess.run(
        command(*arguments), cwd=ROOT, env=cli_environment(), capture_output=True, text=True, timeout=timeout_s
    )


def cli_here(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str]:
    """Run `pocl-ray` in this process, without the seconds of a new one; return its exit code and what it said."""
    return _exit_code(arguments), capsys.readouterr().err


def cli_in_fixture(*arguments: str) -> tuple[Any, str]:
    """`cli_here` for a fixture that outlives a test, which has no `capsys`."""
    with io.StringIO() as shown, redirect_stderr(shown):
        return _exit_code(arguments), shown.getvalue()


def _exit_code(arguments: Sequence[str]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pocl-ray", *arguments])
        with pytest.raises(SystemExit) as exited:
            command_line.main()
    return exited.value.code


def refused(path: Path, capsys: pytest.CaptureFixture[str], *arguments: str, verb: str = "run") -> str:
    """Run a command in this process, and return the one line of its error."""
    return one_line(*cli_here(capsys, verb, str(path), *arguments))


def one_line(code: Any, shown: str) -> str:
    """Check that a command ended as a user's mistake does, and return the line that says what it was."""
    assert code == 2, shown
    assert "Traceback" not in shown
    lines = [line for line in shown.splitlines() if line.strip()]
    assert [line for line in lines if "error:" in line] == [lines[-1]], shown
    return lines[-1]


def tree_digest(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file; directories stand with an empty digest."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def sha256(path: Path) -> str:
    """The sha256 of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def manifest(run: Path) -> dict[str, Any]:
    """The steps of a run's manifest."""
    steps: dict[str, Any] = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["steps"]
    return steps


@dataclass(frozen=True)
class FullRun:
    """A finished run of two workers: where its rows lie, its config file and directory, and changes beyond `FULL`."""

    folder: Path
    config: Path
    run: Path
    changes: dict[str, Any] = field(default_factory=dict)

    def copy(self, storage: Path, without: tuple[str, ...] = (), **changes: Any) -> tuple[Config, Path]:
        """Copy the run to another storage, less some outputs and their checkpoints; return its config and directory."""
        run = storage / self.run.name
        shutil.copytree(self.run, run)
        for pattern in without:
            for path in run.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        changes = {**FULL, **self.changes, "storage_path": str(storage), **changes}
        return Config.model_validate(config_tree(self.folder, **changes)), run
