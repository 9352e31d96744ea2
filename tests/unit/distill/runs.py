"""Small training runs in processes of their own, without Ray: what the tests of engine, state and loop share."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from pocl_ray.config import DistillConfig, GenerationConfig, PlateauConfig, RolloutConfig, TrainConfig
from pocl_ray.data.row_store import ROWS_SCHEMA
from pocl_ray.data.rows import summarize_rows
from pocl_ray.data.tokenization import train_tokenizer
from pocl_ray.distill.checkpoint import PendingCheckpoint, Progress, read_progress
from pocl_ray.distill.task import TeacherTask, TrainTask
from pocl_ray.models.building import build_model
from pocl_ray.models.loading import load_tokenizer
from pocl_ray.models.places import ModelRef
from pocl_ray.models.saving import save_model
from pocl_ray.records import Stage
from pocl_ray.run_directory.storage import RunDirectory

WORDS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "red",
    "green",
    "blue",
    "tall",
    "small",
    "quick",
]
TRAIN = TrainConfig(
    global_batch_rows=8, micro_batch_rows=4, learning_rate=1e-2, precision="fp32", zero_stage=1, max_grad_norm=0.5
)
NUM_ROWS = 32
LATE_S = 0.02
"""A step takes less, so that some are done before a checkpoint is taken away."""


def stage(index: int, end: int, **changes: Any) -> Stage:
    made = Stage(
        index, tuple(range(index + 1)), 0, end, 2, end // 8, 1.0 + index, 0.5 + 0.25 * index, True, 0, end // 4
    )
    return replace(made, **changes)


STAGES = (stage(0, 16), stage(1, 32))


def prepare(folder: Path) -> TrainTask:
    """Write rows, tokenizer, teacher and student of a tiny run, and return its task."""
    run_dir = RunDirectory.open(str(folder), "run")
    rng = np.random.default_rng(0)
    phrases = [" ".join(rng.choice(WORDS, rng.integers(2, 7))) for _ in range(NUM_ROWS + 9)]
    train_tokenizer(phrases, 300, Path(run_dir.uri) / "tokenizer")
    tokenizer = load_tokenizer(str(run_dir.local("tokenizer")))
    sets = {"train": phrases[:NUM_ROWS], "dev": phrases[NUM_ROWS:]}
    summaries = {name: write_rows(run_dir, name, texts, tokenizer) for name, texts in sets.items()}
    sizes = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 2}
    teacher = {**sizes, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    student = {**sizes, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "tie_word_embeddings": True}
    for seed, (name, keys) in enumerate({"teacher": teacher, "student_init": student}.items()):
        model = build_model(keys, len(tokenizer), tokenizer.eos_token_id, None, seed)
        save_model(model, tokenizer, Path(run_dir.uri) / "models" / name)
    order = np.random.default_rng(1).permutation(NUM_ROWS) + 1
    pq.write_table(pa.table({"rank": order}), f"{run_dir.uri}/scores.parquet")
    return TrainTask(
        name="distill",
        fingerprint="f" * 64,
        run_dir=run_dir,
        stages=STAGES,
        student=ModelRef(run_dir.uri_of("models/student_init")),
        teachers=(TeacherTask(ModelRef(run_dir.uri_of("models/teacher")), cache=None, fingerprint="teacher"),),
        tokenizer="tokenizer",
        rows=summaries["train"],
        dev_rows=summaries["dev"],
        scores="scores.parquet",
        train=TRAIN,
        distill=DistillConfig(teacher_cache="none"),
        rollout=RolloutConfig(),
        hand_off="last",
        plateau=PlateauConfig(),
        dev_generation=GenerationConfig(sampling_temperature=0.0, max_new_tokens=6),
        max_dev_rows=4,
        max_tokens=64,
        gradient_checkpointing=False,
        seed=5,
        collective_timeout_s=60.0,
        output="student",
        metrics="metrics.jsonl",
    )


def with_teacher(task: TrainTask, **changes: Any) -> TrainTask:
    """The task with its only teacher changed."""
    (teacher,) = task.teachers
    return replace(task, teachers=(replace(teacher, **changes),))


def write_rows(run_dir: RunDirectory, name: str, texts: list[str], tokenizer: Any) -> Any:
    path = Path(run_dir.uri) / "rows" / f"{name}.arrow"
    path.parent.mkdir(exist_ok=True)
    prompts, responses = [text + " =>" for text in texts], [" ".join(reversed(text.split())) for text in texts]
    columns = {
        "id": pa.array(range(len(texts)), pa.int64()),
        "source_row": pa.array(range(1, len(texts) + 1), pa.int64()),
        "topic": pa.nulls(len(texts), pa.string()),
        "prompt": pa.array(prompts),
        "references": pa.array([[response] for response in responses]),
        "prompt_ids": pa.array([tokenizer(p)["input_ids"] for p in prompts], pa.list_(pa.int32())),
        "response_ids": pa.array(
            [[*tokenizer(r)["input_ids"], tokenizer.eos_token_id] for r in responses], pa.list_(pa.int32())
        ),
    }
    table = pa.table(columns, ROWS_SCHEMA)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return summarize_rows(name, path, 0)


@dataclass(frozen=True)
class Outcome:
    """The output of a run: its metric stream, its final weights and its checkpoints, the oldest first."""

    metrics: list[dict[str, Any]]
    weights: dict[str, torch.Tensor]
    checkpoints: list[Path]

    @property
    def losses(self) -> list[float]:
        return [record["train/loss"] for record in self.metrics if "train/loss" in record]

    @property
    def grad_norms(self) -> list[float]:
        return [record["train/grad_norm"] for record in self.metrics if "train/loss" in record]


def train(task: TrainTask, folder: Path, num_workers: int = 1, resume: Path | None = None) -> Outcome:
    """Run a task on `num_workers` processes, from a checkpoint if one is given."""
    return train_all([(task, folder, resume)], num_workers)[0]


def train_all(runs: list[tuple[TrainTask, Path, Path | None]], num_workers: int = 1) -> list[Outcome]:
    """Run tasks one after the other in the same processes, which saves their start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(_worker, (runs, num_workers, port), num_workers, start_method="forkserver")
    return [_outcome(folder) for _, folder, _ in runs]


def _outcome(folder: Path) -> Outcome:
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    checkpoints = sorted((folder / "checkpoints").glob("*"))
    return Outcome(metrics, load_file(folder / "weights.safetensors"), checkpoints)


def _worker(rank: int, runs: list[tuple[TrainTask, Path, Path | None]], num_workers: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE=str(num_workers))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=num_workers)
    for task, folder, resume in runs:
        _run_one(rank, task, folder, resume)
    dist.barrier()
    dist.destroy_process_group()


class _Moves:
    """Takes checkpoints away as Ray Train does: late, in a thread, while training goes on."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pool = folder, ThreadPoolExecutor(1)
        self.last: Future[None] | None = None

    def take(self, progress: Progress, written: PendingCheckpoint | None) -> None:
        if written is not None:
            self.last = self.pool.submit(self._move, progress.step, written)

    def _move(self, step: int, written: PendingCheckpoint) -> None:
        time.sleep(LATE_S)
        shutil.move(written.wait(), self.folder / f"{step:05d}")

    def wait(self) -> None:
        if self.last is not None:
            self.last.result()

    def meet(self) -> None:
        if dist.get_world_size() > 1:
            dist.barrier()


def _run_one(rank: int, task: TrainTask, folder: Path, resume: Path | None) -> None:
    from pocl_ray.distill.loop import LoopHooks
    from pocl_ray.distill.setup import set_up_loop

    if rank == 0:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    moves = _Moves(folder / "checkpoints")
    sent: list[dict[str, Any]] = []

    def send(progress: Progress, record: dict[str, Any]) -> None:
        if progress.metrics and progress.metrics[-1] is record:
            sent.append(record)

    hooks = LoopHooks(on_checkpoint=moves.take, on_step=send, wait_for_uploads=moves.wait, meet=moves.meet)
    loop = set_up_loop(task, torch.device("cpu"), hooks)
    if resume is not None:
        loop.restore(read_progress(resume), resume)
    num_before = len(loop.progress.metrics)
    loop.run()
    assert sent == loop.progress.metrics[num_before:]  # trackers show all that metrics.jsonl holds
    weights = {name: tensor.clone() for _, name, tensor in loop.state.gather(("weight",))}
    if rank == 0:
        save_file(weights, folder / "weights.safetensors")
        (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in loop.progress.metrics))


Run = Callable[..., Outcome]
