"""One training after the other in one process, which has imported torch, transformers and DeepSpeed once.

A process starts in ten seconds or more, and a small training takes as long. So a process here outlives its trainings:
each of them sets up a loop of its own (`distill.setup`) on a process group of one, and its student is judged before its
memory is released.
"""

from __future__ import annotations

import gc
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pocl_ray.distill.checkpoint import PendingCheckpoint, Progress, is_evaluation
from pocl_ray.distill.loop import LoopHooks, TrainingLoop
from pocl_ray.distill.setup import set_up_loop
from pocl_ray.distill.task import TrainTask, open_stream, send
from pocl_ray.models.loading import load_tokenizer
from pocl_ray.trainings.judge import Judge, JudgeTask

OnProgress = Callable[[int, int], object]
"""A function that receives the number of steps done and of tokens trained on."""
RowLosses = dict[str, dict[str, list[float]]]
"""`ce_loss`, and with a teacher `kl` -> step -> that loss of each dev row."""


@dataclass(frozen=True)
class Job:
    """One training of one arm.

    Attributes:
        name: Name of the record of its result.
        task: Training task.
        judged: Sets on which its student is judged.
        row_steps: Steps after which the loss of each dev row is measured.
    """

    name: str
    task: TrainTask
    judged: JudgeTask
    row_steps: tuple[int, ...] = ()


class TrainingProcess:
    """Runs jobs one after the other; the process group stays, engines and students do not."""

    def __init__(self, num_threads: int, use_gpu: bool) -> None:
        """Make the process group of one, without a port: nobody else joins it."""
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        torch.set_num_threads(num_threads)
        self.device = torch.device("cuda", 0) if use_gpu else torch.device("cpu")
        if not dist.is_initialized():
            dist.init_process_group("nccl" if use_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
        self._judge: Judge | None = None

    def run(self, job: Job, on_progress: OnProgress) -> dict[str, Any]:
        """Train and judge.

        Returns:
            `figures` by set, `curve` (dev figures at each evaluation), `losses` (thinned), `row_losses` (figure ->
            step -> dev rows), `num_steps`, `num_tokens`, `seconds`, `train_seconds`, and
            `warnings` for the user.

        Raises:
            UserError: A model, a cache or the rows do not fit.
            DivergedError: Loss or gradient are not finite in several consecutive steps.
        """
        started = time.monotonic()
        warnings: list[str] = []
        row_losses: RowLosses = {}
        loop = self._train(job, on_progress, row_losses, warnings.append)
        train_seconds = time.monotonic() - started
        figures = self._judge_of(job.judged).judge(loop.dev.student.current())
        metrics, progress = loop.progress.metrics, loop.progress
        result = {
            "figures": figures,
            "curve": [_dev_figures(record) for record in metrics if is_evaluation(record)],
            "losses": _thinned([record for record in metrics if "train/loss" in record]),
            "row_losses": row_losses,
            "num_steps": progress.step,
            "num_tokens": progress.num_tokens,
            "train_seconds": round(train_seconds, 2),
            "seconds": round(time.monotonic() - started, 2),
            "warnings": warnings,
        }
        loop.engine.deepspeed.destroy()
        del loop
        gc.collect()
        return result

    def _train(
        self, job: Job, on_progress: OnProgress, row_losses: RowLosses, warn: Callable[[str], object]
    ) -> TrainingLoop:
        stream = open_stream(job.task, (), warn)

        def on_step(progress: Progress, record: dict[str, Any]) -> None:
            on_progress(progress.step, progress.num_tokens)
            if stream is not None:
                send(stream, progress.metrics, record)
            if progress.step in job.row_steps and "train/loss" in record:
                for figure, losses_R in loop.dev_row_losses().items():
                    row_losses.setdefault(figure, {})[str(progress.step)] = losses_R.round(6).tolist()

        has_failed = True
        try:
            loop = set_up_loop(job.task, self.device, LoopHooks(on_checkpoint=_discard, on_step=on_step))
            loop.run()
            has_failed = False
        finally:
            if stream is not None:
                stream.close(has_failed=has_failed)
        return loop

    def _judge_of(self, task: JudgeTask) -> Judge:
        if self._judge is None or self._judge.task != task:
            self._judge = None  # free the one before: two teachers may not fit
            self._judge = Judge(task, load_tokenizer(str(task.run_dir.local(task.tokenizer))), self.device)
        return self._judge


def _discard(progress: Progress, written: PendingCheckpoint | None) -> None:
    """Delete a checkpoint: a training this short is run again from its start."""
    if written is not None:
        shutil.rmtree(written.wait(), ignore_errors=True)


def _dev_figures(record: dict[str, Any]) -> dict[str, Any]:
    figures = {key.removeprefix("eval/dev/"): value for key, value in record.items() if key.startswith("eval/dev/")}
    return {"step": record["step"], "num_tokens": record["num_tokens"], **figures}


def _thinned(records: list[dict[str, Any]], most: int = 100) -> list[dict[str, float]]:
    """Return step and mean loss of `most` equal parts of a training."""
    size = max(1, math.ceil(len(records) / most))
    parts = [records[start : start + size] for start in range(0, len(records), size)]
    return [
        {"step": part[-1]["step"], "loss": sum(record["train/loss"] for record in part) / len(part)} for part in parts
    ]
