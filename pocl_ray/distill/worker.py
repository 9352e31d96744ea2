"""What each Ray Train worker runs: set up the student, go on from the last checkpoint, train, write the result."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray
import ray.train
import torch
import torch.distributed as dist

from pocl_ray.data.rows import RowStore
from pocl_ray.distill.checkpoints import Progress, read_progress
from pocl_ray.distill.dev import DevEvaluator
from pocl_ray.distill.engine import DTYPES, Engine
from pocl_ray.distill.feed import Feed
from pocl_ray.distill.loop import TrainingLoop
from pocl_ray.distill.losses import resolve_loss
from pocl_ray.distill.state import WEIGHT
from pocl_ray.distill.step import DistillationModule, StepSettings
from pocl_ray.distill.task import TrainTask
from pocl_ray.errors import UserError
from pocl_ray.models.head_files import load_head
from pocl_ray.models.heads import HeadWeights
from pocl_ray.models.hidden_cache import HiddenCache
from pocl_ray.models.live import LiveTeacher
from pocl_ray.models.loading import load_model, load_tokenizer
from pocl_ray.models.places import ModelRef
from pocl_ray.models.saving import save_model
from pocl_ray.records import RANK, RowsSummary
from pocl_ray.storage import localize

MIN_REPORT_INTERVAL_S = 0.25


def train_worker(config: dict[str, Any]) -> None:
    """Run one worker of a training run; the loop of `TorchTrainer`.

    A user's mistake is told to the board, not raised: Ray would try it again.

    Args:
        config: `task`, a TrainTask, and `board`, the handle of the ProgressBoard.
    """
    task, board = config["task"], config["board"]
    try:
        _train(task, board)
    except UserError as error:
        board.refuse.remote(error)


def _train(task: TrainTask, board: Any) -> None:
    device = ray.train.torch.get_device()
    loop = _set_up(task, board, device)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as directory:
            loop.restore(read_progress(Path(directory)), Path(directory))
    if loop.engine.rank == 0:
        board.begin.remote(task.num_steps, loop.progress.step)
    loop.run()
    _write_result(task, loop)


def _set_up(task: TrainTask, board: Any, device: torch.device) -> TrainingLoop:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    run_dir, train = task.run_dir, task.train
    tokenizer = load_tokenizer(str(run_dir.local(task.tokenizer)))
    head, live = _teacher(task, device)  # before the engine: ZeRO-3 must not partition it
    student = load_model(_local_ref(task.student), dtype=torch.float32, eval_mode=False)
    if task.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    module = DistillationModule(student, chunk_bytes=task.distill.chunk_mib << 20)
    engine = Engine(module, train, device, task.collective_timeout_s)
    if head is not None:
        engine.module.attach_teacher_head(head)
    pad_id = int(tokenizer.pad_token_id)
    rows, dev_rows = (RowStore.open(run_dir.local(made.path)) for made in (task.rows, task.dev_rows))
    feed, dev_feed = (
        Feed(store, pad_id, train.micro_batch_rows, rank, world_size, _cache(task, made), live)
        for made, store in ((task.rows, rows), (task.dev_rows, dev_rows))
    )
    divergence = resolve_loss(task.distill.loss, task.distill.loss_args, task.distill.scale_by_t_squared)
    settings = StepSettings(1.0, 0.5 if task.teacher is not None else 0.0, divergence)
    dev = DevEvaluator(
        engine, dev_feed, tokenizer, settings, task.dev_generation, task.max_dev_rows, task.max_tokens, task.seed
    )
    reporter = _Reporter(task, board, rank)
    return TrainingLoop(task, engine, feed, dev, _order(task, len(rows)), reporter.checkpoint, reporter.step)


def _teacher(task: TrainTask, device: torch.device) -> tuple[HeadWeights | None, LiveTeacher | None]:
    """Return what the loss needs of the teacher: its LM head, and itself only where nothing is cached."""
    if task.teacher is None:
        return None, None
    ref = _local_ref(task.teacher)
    if task.teacher_cache is not None:
        return load_head(ref, device=device), None
    live = LiveTeacher(ref, device)
    return live.head, live


def _cache(task: TrainTask, made: RowsSummary) -> HiddenCache | None:
    if task.teacher is None or task.teacher_cache is None:
        return None
    directory = task.run_dir.local(f"{task.teacher_cache}/{made.name}")
    return HiddenCache.open(directory, task.teacher_fingerprint, made.fingerprint, made.num_rows)


def _order(task: TrainTask, num_rows: int) -> np.ndarray:
    """Return the row ids from easy to hard."""
    if task.scores is None:
        return np.arange(num_rows)
    rank = pq.read_table(task.run_dir.local(task.scores), columns=[RANK])[RANK].to_numpy()
    assert len(rank) == num_rows, "scores.parquet belongs to other rows"
    return np.argsort(rank, kind="stable")


def _local_ref(ref: ModelRef) -> ModelRef:
    return ModelRef(**{**asdict(ref), "path": localize(ref.path)})


class _Reporter:
    """Takes checkpoints to Ray Train, and progress to the driver's board."""

    def __init__(self, task: TrainTask, board: Any, rank: int) -> None:
        self.task, self.board, self.rank = task, board, rank
        self.last_report = 0.0

    def checkpoint(self, progress: Progress, directory: Path | None) -> None:
        """Report a checkpoint, which Ray Train uploads; a barrier for all workers."""
        metrics = {"step": progress.step, "stage": progress.stage, "num_samples": progress.num_samples}
        checkpoint = None if directory is None else ray.train.Checkpoint.from_directory(directory)
        ray.train.report(metrics, checkpoint=checkpoint, delete_local_checkpoint_after_upload=True)
        if self.rank == 0:
            _write_metrics(self.task, progress)

    def step(self, progress: Progress, record: dict[str, Any]) -> None:
        """Show a record on the driver's board, a few times a second at most."""
        now = time.monotonic()
        is_evaluation = "train/loss" not in record
        if self.rank == 0 and (is_evaluation or now - self.last_report > MIN_REPORT_INTERVAL_S):
            self.last_report = now
            self.board.show.remote(progress.step, progress.num_tokens, record)


def _write_metrics(task: TrainTask, progress: Progress) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in progress.metrics)
    task.run_dir.write_text(task.metrics, lines)


def _write_result(task: TrainTask, loop: TrainingLoop) -> None:
    """Write the trained student as a Hugging Face directory; gathering is collective, rank 0 writes."""
    gathered = loop.state.gather((WEIGHT,))
    if loop.engine.rank != 0:
        for _ in gathered:
            pass
        return
    student = load_model(_local_ref(task.student), dtype=torch.float32)
    targets = dict(student.named_parameters())
    with torch.no_grad():
        for _, name, tensor in gathered:
            targets[name.removeprefix("student.")].copy_(tensor)
    student.to(DTYPES[task.train.precision])
    tokenizer = load_tokenizer(str(task.run_dir.local(task.tokenizer)))
    with tempfile.TemporaryDirectory() as scratch:
        save_model(student, tokenizer, Path(scratch) / "model")
        task.run_dir.publish(Path(scratch) / "model", task.output)
    _write_metrics(task, loop.progress)
