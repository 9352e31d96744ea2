"""A made-up run directory with curves that look like real ones, for the report's tests."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pocl_ray.records import Stage

TOPICS = (
    "copy a word", "first letter", "last word", "yes or no", "capital letters", "count letters", "reverse a word",
    "colour of a thing", "opposite", "plural", "past tense", "sort words", "add two numbers", "compare numbers",
    "subtract", "unit conversion", "find the name", "extract a date", "classify sentiment", "shorten a sentence",
)  # fmt: skip
EVIL = "<script>alert('x')</script> | `a` **b** $x_{$ & \"q\""
_WORDS = ("apple", "river", "stone", "cloud", "green", "seven", "market", "window", "silver", "garden", "bridge")
_SEEDS = (10, 20, 30, 40, 50)

CONFIG = """\
name: quickstart
data:
  train: {path: "samples://instructions", split: train}
  dev: {path: "samples://instructions", split: dev}
tokenizer: {train_vocab_size: 768}
teacher:
  architecture: {model_type: llama, hidden_size: 128, num_hidden_layers: 3}
  sft: {num_epochs: 12}
student:
  architecture: {model_type: llama, hidden_size: 64, num_hidden_layers: 2}
  sft: {num_epochs: 6}
curriculum: {interval_epochs: 3, optimizer: continuous}
distill: {loss: forward_kl}
train: {global_batch_rows: 32, learning_rate: 0.004}
control: {}
"""


class LocalFiles:
    """A run directory on the local disk, without the rest of storage.py."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def exists(self, rel: str) -> bool:
        return (self.root / rel).exists()

    def read_bytes(self, rel: str) -> bytes:
        return (self.root / rel).read_bytes()

    def write_bytes(self, rel: str, data: bytes) -> None:
        path = self.root / rel
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def write_text(self, rel: str, text: str) -> None:
        self.write_bytes(rel, text.encode())

    def write_json(self, rel: str, data: Any) -> None:
        self.write_text(rel, json.dumps(data))

    def uri_of(self, rel: str) -> str:
        return str(self.root / rel)


def make_run(
    root: Path, *, num_rows: int = 2048, num_stages: int = 4, num_sets: int = 1, topics: bool = True,
    control: bool = True, seed: int = 0,
) -> LocalFiles:  # fmt: skip
    """Write a whole run; tests take files away from it."""
    files, rng = LocalFiles(root), np.random.default_rng(seed)
    topic_codes = rng.integers(len(TOPICS), size=num_rows)
    curriculum = f"interval_epochs: 3, num_buckets: {num_stages}"
    files.write_text("config.yaml", CONFIG.replace("interval_epochs: 3", curriculum))
    files.write_json("environment.json", _environment())
    files.write_json("manifest.json", {"version": 1, "steps": _steps(num_rows, control)})
    scores = _scores(rng, topic_codes)
    _write_parquet(files, scores)
    _write_rows(files, rng, topic_codes, topics)
    stages = _write_plan(files, num_rows, num_stages)
    _write_metrics(files, "metrics.jsonl", rng, stages, best=61.2)
    if control:
        num_steps = sum(stage.num_steps for stage in stages)
        plain = Stage(0, (0,), 0, num_rows, 1, num_steps, 1.0, 1.0, True, 0, num_steps)
        _write_metrics(files, "control/metrics.jsonl", rng, [plain], best=63.0)
    files.write_json("evaluation.json", {"sets": {name: _set(rng, control) for name in _set_names(num_sets)}})
    rejects = [{"source": "train.jsonl", "row": row, "reason": reason} for row, reason in _REJECTS]
    files.write_text("rejects.jsonl", "".join(json.dumps(reject) + "\n" for reject in rejects))
    return files


_REJECTS = [(17, "not JSON"), (203, "empty output"), (204, "empty output"), (900, "output is a number"), (1001, EVIL)]


def _set_names(num_sets: int) -> list[str]:
    return ["dev", "dolly_eval", "self_instruct", "vicuna", "s_ni"][:num_sets]


def _environment() -> dict[str, Any]:
    versions = {"pocl-ray": "0.1.0", "python": "3.11.2", "ray": "2.60.0", "torch": "2.13.0", "transformers": "5.23.0"}
    return {
        "versions": versions,
        "git_revision": "b945404c1d",
        "nodes": [{"cpus": 2, "gpus": 0, "memory_gib": 7.7}],
        "platform": "Linux-6.1",
    }


def _steps(num_rows: int, control: bool) -> dict[str, Any]:
    plan = {
        "rows": (3.1, num_rows, num_rows * 29), "teacher": (71.4, 25_600, 742_400), "student": (10.3, 12_800, 371_200),
        "scores": (24.8, num_rows, num_rows * 29 * 2), "plan": (0.02, num_rows, None),
        "distill": (58.6, None, 480 * 183), "control": (39.0, None, 480 * 183),
        "evaluation": (41.7, 6_000, 71_000),
    }  # fmt: skip
    return {
        name: {
            "status": "done", "fingerprint": "0" * 64, "outputs": [], "seconds": seconds,
            "counts": {
                **({"num_rows": rows} if rows else {"num_steps": 480}), **({"num_tokens": tokens} if tokens else {}),
            },
        }
        for name, (seconds, rows, tokens) in plan.items() if control or name != "control"
    }  # fmt: skip


def _scores(rng: np.random.Generator, topic_codes: np.ndarray) -> dict[str, np.ndarray]:
    n = len(topic_codes)
    hardness = topic_codes / len(TOPICS) + rng.normal(0, 0.18, n)
    rouge = np.clip(100 * (0.9 - hardness) + rng.normal(0, 25, n), 0, 100)
    ce = np.exp(rng.normal(-0.2, 0.4, n) + hardness)
    teacher_ce = np.exp(rng.normal(-2.2, 0.6, n) + 1.8 * np.clip(hardness, 0, None) ** 2)
    rrf = 1 / (61 + (-rouge).argsort(kind="stable").argsort()) + 1 / (61 + ce.argsort().argsort())
    rank = (-rrf).argsort(kind="stable").argsort() + 1
    return {
        "id": np.arange(n), "rouge_l": rouge, "ce_loss": ce, "teacher_ce_loss": teacher_ce,
        "teacher_student_kl": np.abs(ce - teacher_ce) * rng.uniform(0.6, 1, n),
        "teacher_entropy": teacher_ce * rng.uniform(0.7, 1.1, n), "rrf_score": rrf, "rank": rank,
        "num_prompt_tokens": rng.integers(12, 40, n), "num_response_tokens": 2 + rng.poisson(4, n),
    }  # fmt: skip


def _write_parquet(files: LocalFiles, scores: dict[str, np.ndarray]) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table(scores), sink)
    files.write_bytes("scores.parquet", sink.getvalue())


def _write_rows(files: LocalFiles, rng: np.random.Generator, topic_codes: np.ndarray, topics: bool) -> None:
    n = len(topic_codes)
    words = rng.choice(_WORDS, size=(n, 3))
    head = "Below is an instruction that describes a task. Write a response.\n\n### Instruction:\n"
    asks = [f"{TOPICS[code]}: {' '.join(row)}" for code, row in zip(topic_codes, words, strict=True)]
    columns: dict[str, Any] = {
        "id": pa.array(range(n), pa.int64()),
        "topic": pa.array([TOPICS[code] if topics else None for code in topic_codes], pa.string()),
        "prompt": pa.array([f"{head}{ask}\n\n### Response:\n" for ask in asks]),
        "references": pa.array([[str(row[0]), str(row[1])][: 1 + i % 2] for i, row in enumerate(words)]),
    }
    table = pa.table(columns)
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=512)
    files.write_bytes("rows/train.arrow", sink.getvalue())


def _write_plan(files: LocalFiles, num_rows: int, num_stages: int) -> list[Stage]:
    size, batch = num_rows // num_stages, 32
    ends = [*(size * (k + 1) for k in range(num_stages - 1)), num_rows]
    steps = [end // batch for end in ends]
    ramp = [k / max(1, num_stages - 1) for k in range(num_stages)]
    stages = [
        Stage(
            index=k, buckets=tuple(range(k + 1)), first_rank=0, end_rank=ends[k], num_epochs=3,
            steps_per_epoch=steps[k], kd_temperature=round(1 + ramp[k], 2), kd_ratio=round(0.7 + 0.3 * ramp[k], 2),
            restart_optimizer=False, lr_first_step=3 * sum(steps[:k]), lr_num_steps=3 * sum(steps),
        )
        for k in range(num_stages)
    ]  # fmt: skip
    files.write_json("plan.json", {
        "num_rows": num_rows, "num_buckets": num_stages, "bucket_ends": ends, "global_batch_rows": batch,
        "stages": [stage.to_json() for stage in stages], "num_steps": 3 * sum(steps),
    })  # fmt: skip
    return stages


def _write_metrics(files: LocalFiles, rel: str, rng: np.random.Generator, stages: list[Stage], *, best: float) -> None:
    lines, step, total = [], 0, sum(stage.num_steps for stage in stages)
    for stage in stages:
        for within in range(stage.num_steps):
            step += 1
            done = step / total
            hard = 0.5 + 0.5 * stage.end_rank / stages[-1].end_rank
            kd = stage.kd_temperature * hard * (0.25 + 0.75 * np.exp(-5 * done)) * np.exp(rng.normal(0, 0.13))
            ce = hard * (0.75 + 0.8 * np.exp(-4 * done)) * np.exp(rng.normal(0, 0.1))
            common = {"step": step, "curriculum/stage": stage.index}
            lines.append({
                **common, "train/loss": (1 - stage.kd_ratio) * ce + stage.kd_ratio * kd, "train/kd_loss": kd,
                "train/ce_loss": ce, "train/lr": 4e-3 * (1 + np.cos(np.pi * done)) / 2,
                "train/grad_norm": float(rng.uniform(0.3, 1.2)), "num_response_tokens": int(rng.integers(150, 220)),
                "curriculum/kd_temperature": stage.kd_temperature, "curriculum/kd_ratio": stage.kd_ratio,
            })  # fmt: skip
            if (within + 1) % max(1, stage.num_steps // (3 if len(stages) > 1 else 12)) == 0:
                score = best - (best - 33) * np.exp(-5 * done) + rng.normal(0, 0.9)
                dev = 0.8 + 0.7 * np.exp(-4 * done)
                lines.append({
                    **common, "eval/dev/rouge_l": score, "eval/dev/ce_loss": dev + rng.normal(0, 0.01),
                    "eval/dev/kd_loss": 0.8 * stage.kd_temperature * (dev - 0.5),
                })  # fmt: skip
    files.write_text(rel, "".join(json.dumps(line) + "\n" for line in lines))


def _set(rng: np.random.Generator, control: bool) -> dict[str, Any]:
    base = float(rng.uniform(-6, 6))
    figures = {
        "student_before": (31.2, 20.4, 33.0), "student_kd": (56.9, 44.0, 64.9), "student": (60.1, 49.1, 61.3),
        "teacher": (71.5, 62.0, 74.2),
    }  # fmt: skip
    return {
        model: {
            "rouge_l": _sampled(rng, base + rouge), "exact_match": _sampled(rng, base + exact),
            "greedy": {"rouge_l": base + greedy, "exact_match": base + greedy - 9},
            "num_rows": 300, "unstopped_share": 0.04,
        }
        for model, (rouge, exact, greedy) in figures.items() if control or model != "student_kd"
    }  # fmt: skip


def _sampled(rng: np.random.Generator, mean: float) -> dict[str, Any]:
    values = mean + rng.normal(0, 0.9, len(_SEEDS))
    by_seed = {str(seed): float(value) for seed, value in zip(_SEEDS, values, strict=True)}
    return {"mean": float(values.mean()), "std": float(values.std(ddof=1)), "by_seed": by_seed}
