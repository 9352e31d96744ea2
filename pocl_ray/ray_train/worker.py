"""The work of each Ray Train worker: set up the loop, resume from the last checkpoint, train, write the result."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import ray.train.collective
import torch
import torch.distributed as dist
from ray.train import CheckpointUploadMode, PreemptionInfo
from ray.train.torch import get_device
from ray.util.metrics import Gauge

from pocl_ray.distill.checkpoint import PendingCheckpoint, Progress, is_evaluation
from pocl_ray.distill.dev import write_row_losses
from pocl_ray.distill.engine import DTYPES
from pocl_ray.distill.loop import LoopHooks, TrainingLoop
from pocl_ray.distill.setup import resume, set_up_loop
from pocl_ray.distill.state import KINDS, WEIGHT
from pocl_ray.distill.task import TrainTask, open_stream, send
from pocl_ray.errors import DivergedError, UserError
from pocl_ray.heartbeat import beat
from pocl_ray.models.loading import load_model, load_tokenizer
from pocl_ray.models.lora import add_adapters, save_student
from pocl_ray.models.places import on_this_node
from pocl_ray.ray_cluster.versions import check_same, versions
from pocl_ray.ray_train.checkpoints import copy_checkpoint
from pocl_ray.ray_train.internals import get_train_context
from pocl_ray.run_directory.disk import check_free, check_free_at, machine_fault
from pocl_ray.tracking.stream import Stream

WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
SAVE_EVERY_S = 30.0
"""The seconds between checkpoints after a notice. Training goes on until the node is gone, which may take minutes."""


def watcher_is_on() -> bool:
    """Return whether Ray Train watches for notices in this run."""
    return os.environ.get(WATCHER, "1") != "0"


def announced_preemption() -> PreemptionInfo | None:
    """Return the notice of this worker, or None."""
    info: PreemptionInfo | None = get_train_context().preemption_context.preemption_info
    return info


class PreemptionNotices:
    """Decides when to save a checkpoint because a node will be taken away (a spot instance, `ray drain-node`).

    All workers decide the same at the same step. Ray Train's watcher informs each worker process separately, and its
    public function, `ray.train.get_preemption_info`, waits for all workers through an actor, which is too slow for
    every step. So each worker reads its own notice, and the workers agree by one reduction of a number.
    """

    def __init__(
        self,
        device: torch.device,
        on_notice: Callable[[Progress], object],
        told: Callable[[], PreemptionInfo | None] = announced_preemption,
    ) -> None:
        """Set up the decision for one worker.

        Args:
            device: Device of the process group.
            on_notice: Function that is called on every worker, with the progress, before a checkpoint is saved.
            told: Function that returns the notice of this worker.
        """
        self._device, self._on_notice, self._told = device, on_notice, told
        self._saved_at = float("-inf")

    def ask_for_checkpoint(self, progress: Progress) -> bool:
        """Return whether to save now: at the first notice, and every SAVE_EVERY_S after it; collective."""
        is_due = self._told() is not None and time.monotonic() - self._saved_at > SAVE_EVERY_S
        flag = torch.tensor(float(is_due), device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if not flag.item():
            return False
        self._saved_at = time.monotonic()
        self._on_notice(progress)
        return True


TAGS = ("run", "task")
GAUGES = {
    "pocl_stage": "stage of the curriculum, from 0",
    "pocl_step": "optimizer steps done",
    "pocl_kd_temperature": "temperature of the distillation loss",
    "pocl_kd_ratio": "share of distillation in the loss",
    "pocl_loss": "training loss, in nats a token",
    "pocl_samples_per_s": "rows trained on in a second, over all workers",
    "pocl_tokens_per_s": "response tokens trained on in a second, over all workers",
    "pocl_num_workers": "training workers",
    "pocl_dev_rouge_l": "ROUGE-L of the dev rows, from 0 to 100",
}
SHORTEST_STEP_S = 1e-4


def figures(record: dict[str, Any], global_batch_rows: int) -> dict[str, float]:
    """Return the values of the gauges that a record of the metric stream sets.

    Args:
        record: Record of a training step or of an evaluation.
        global_batch_rows: Rows of an optimizer step.
    """
    values: dict[str, Any] = {"pocl_step": record["step"], "pocl_stage": record["curriculum/stage"]}
    if "train/loss" in record:
        seconds = max(record["step_s"], SHORTEST_STEP_S)
        values |= {
            "pocl_kd_temperature": record["curriculum/kd_temperature"],
            "pocl_kd_ratio": record["curriculum/kd_ratio"],
            "pocl_loss": record["train/loss"],
            "pocl_samples_per_s": global_batch_rows / seconds,
            "pocl_tokens_per_s": record["num_response_tokens"] / seconds,
            "pocl_num_workers": record["num_workers"],
        }
    elif "eval/dev/rouge_l" in record:  # plain text has none
        values["pocl_dev_rouge_l"] = record["eval/dev/rouge_l"]
    return {name: float(value) for name, value in values.items()}


class Gauges:
    """The gauges of one task in one run, on rank 0, for Prometheus and `cluster/grafana-dashboard.json`."""

    def __init__(self, run: str, task: str, global_batch_rows: int) -> None:
        """Register the gauges with Ray's metrics agent of this node."""
        self._global_batch_rows = global_batch_rows
        self._gauges = {name: Gauge(name, description=text, tag_keys=TAGS) for name, text in GAUGES.items()}
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run, "task": task})

    def show(self, record: dict[str, Any]) -> None:
        """Set the gauges to the values of a record."""
        for name, value in figures(record, self._global_batch_rows).items():
            self._gauges[name].set(value)


FORMAT = "%(asctime)s %(levelname)s %(message)s"


class WorkerLog(logging.LoggerAdapter):  # type: ignore[type-arg]
    """The log of a worker, in Ray's log directory: puts run, task, stage and rank before each message.

    Attributes:
        stage: Current stage, which is set when it changes.
    """

    def __init__(self, run: str, task: str, rank: int) -> None:
        """Begin the log of a worker on stderr, which Ray stores for each worker."""
        logger = logging.getLogger(f"pocl_ray.worker.{task}")
        if not logger.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter(FORMAT))
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
            logger.propagate = False
        super().__init__(logger, {})
        self.run, self.task, self.rank = run, task, rank
        self.stage = 0

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return the message with its prefix."""
        return f"run={self.run} task={self.task} stage={self.stage} rank={self.rank} {msg}", kwargs


MIN_SHOW_INTERVAL_S = 0.25


def train_worker(config: dict[str, Any]) -> None:
    """Run one worker of a training run; the loop of Ray Train's trainer.

    A user's mistake, or a loss that is not finite, is reported to the progress actor and not raised, because Ray would
    try again.

    Args:
        config: Mapping with `task`, the reference of a TrainTask; `progress_actor`, the handle of the ProgressActor;
            and `versions`, the driver's versions, or None on one machine.
    """
    progress_actor = config["progress_actor"]
    try:
        if config["versions"] is not None:
            check_same(config["versions"], versions(), f"node {ray.util.get_node_ip_address()}")
        _train(ray.get(config["task"]), progress_actor)
    except (UserError, DivergedError) as error:
        ray.get(progress_actor.refuse.remote(error))
    except Exception as error:
        fault = _fault(error)
        if fault is None:
            raise
        ray.get(progress_actor.refuse.remote(fault))


def _fault(error: BaseException) -> UserError | None:
    return machine_fault(error, f"training on node {ray.util.get_node_ip_address()}")


def _train(task: TrainTask, progress_actor: Any) -> None:
    beat("setting up")
    reporter = _Reporter(task, progress_actor, dist.get_rank())
    loop = set_up_loop(task, get_device(), _hooks(reporter))
    kept = _checkpoints(loop.engine.rank)
    if loop.engine.rank == 0:
        _check_disk(task, loop, len(kept))
    resume(loop, kept, ray.train.collective.broadcast_from_rank_zero, progress_actor.warn.remote)
    if loop.engine.rank == 0:
        evaluations = [record for record in loop.progress.metrics if is_evaluation(record)]
        progress_actor.begin.remote(
            task.last_step,
            loop.progress.step,
            evaluations,
            ray.get_runtime_context().get_node_id(),
            loop.progress.num_tokens,
        )
    reporter.begin(loop.progress, loop.engine.world_size)
    with reporter:
        loop.run()
    if loop.is_paused:
        _write_dev_rows(task, loop)
    else:
        _write_result(task, loop)
    if loop.engine.rank == 0:
        ray.get(progress_actor.finish.remote(loop.progress.step, loop.progress.num_tokens))


def _hooks(reporter: _Reporter) -> LoopHooks:
    hooks = LoopHooks(
        reporter.checkpoint, reporter.step, wait_for_uploads=reporter.wait, meet=reporter.meet, warn=reporter.warn
    )
    if not watcher_is_on():
        return hooks
    return replace(hooks, asks_for_checkpoint=PreemptionNotices(get_device(), reporter.node_leaves).ask_for_checkpoint)


def _checkpoints(rank: int) -> list[ray.train.Checkpoint]:
    """The kept checkpoints of this run, the newest first, on the rank that reads them."""
    if rank != 0 or ray.train.get_checkpoint() is None:
        return []
    return [reported.checkpoint for reported in reversed(ray.train.get_all_reported_checkpoints())]


def _check_disk(task: TrainTask, loop: TrainingLoop, num_kept: int) -> None:
    """Check that later checkpoints fit the disk: float32 weights, averages and moments, here and in the best state."""
    parameters = [p for p in loop.engine.module.student.parameters() if p.requires_grad]  # all, or adapters
    num_weights = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)  # under ZeRO-3 each worker has a part
    num_kinds = len(KINDS) + loop.average.most_copies
    each = num_weights * 4 * (2 * num_kinds if task.hand_off == "best" else num_kinds)
    missing = max(0, task.train.num_checkpoints - num_kept) + 1  # the oldest is deleted when the newest is complete
    remedy = "make room, lower train.num_checkpoints, or choose another storage_path"
    check_free(task.run_dir, missing * each, f"{missing} checkpoints", remedy)
    check_free_at(Path(tempfile.gettempdir()), each, "checkpoints on their way", "make room, or set TMPDIR")


class _Reporter:
    """Reports checkpoints to Ray Train, and progress to the driver's progress actor.

    Attributes:
        is_last_chance: Whether training waits until the next checkpoint is in storage.
    """

    def __init__(self, task: TrainTask, progress_actor: Any, rank: int) -> None:
        self.task, self.progress_actor, self.rank = task, progress_actor, rank
        self.last_shown = 0.0
        self.is_last_chance = False
        self._arrived: Future[None] | None = None
        run = task.run_dir.uri.rstrip("/").rpartition("/")[2]
        self.log = WorkerLog(run, task.name, rank)
        self.gauges = Gauges(run, task.name, task.train.global_batch_rows) if rank == 0 else None
        self.stream: Stream | None = None

    def begin(self, progress: Progress, num_workers: int) -> None:
        """Write the step of this start to the log, and open the trackers on the rank that has the metrics."""
        self.log.stage = progress.stage
        self.log.info("step %d of %d, %d workers", progress.step, self.task.num_steps, num_workers)
        if self.rank == 0:
            self.stream = open_stream(self.task, progress.metrics, self.warn)

    def __enter__(self) -> _Reporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait a limited time until the trackers have everything; a training that raises has failed there too."""
        if self.stream is not None:
            beat("closing trackers")
            self.stream.close(has_failed=kind is not None)

    def node_leaves(self, progress: Progress) -> None:
        """Tell the log and the user that a checkpoint is saved because a node will be taken away."""
        self.is_last_chance = True
        self.log.warning("a node is about to be taken away: saving a checkpoint at step %d", progress.step)
        if self.rank == 0:
            self.progress_actor.warn.remote("a node is about to be taken away; a checkpoint is saved first")

    def warn(self, text: str) -> None:
        """Tell the log and the user a warning."""
        self.log.warning(text)
        if self.rank == 0:
            self.progress_actor.warn.remote(text)

    def checkpoint(self, progress: Progress, written: PendingCheckpoint | None) -> None:
        """Report a checkpoint, which is uploaded while training goes on; all workers meet here."""
        metrics = {"step": progress.step, "stage": progress.stage, "num_samples": progress.num_samples}
        checkpoint = None if written is None else ray.train.Checkpoint.from_directory(str(written.directory))
        ray.train.report(
            metrics,
            checkpoint=checkpoint,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
            checkpoint_upload_fn=None if written is None else partial(self._upload, progress, written),
        )
        # Ray Train's thread handles one after the other: when this one is done, so is the checkpoint before it.
        self._arrived = get_train_context().checkpoint_upload_threadpool.submit(lambda: None)
        if self.is_last_chance or self.task.train.checkpoint_buffer_gib == 0:
            self.wait()
        self.is_last_chance = False

    def wait(self) -> None:
        """Wait until the last checkpoint is in storage, or its upload has failed."""
        if self._arrived is not None:
            self._arrived.result()

    def meet(self) -> None:
        """Wait for all workers without a time limit."""
        if dist.get_world_size() > 1:
            ray.train.collective.barrier()

    def _upload(
        self, progress: Progress, written: PendingCheckpoint, checkpoint: ray.train.Checkpoint, name: str
    ) -> ray.train.Checkpoint:
        """Upload a checkpoint, in Ray Train's thread, which reports an error to the controller."""
        storage = get_train_context().get_storage()
        target = storage.build_checkpoint_path_from_name(name)
        try:
            storage._check_validation_file()  # detects a local path that is not shared between nodes
            copy_checkpoint(written.wait(), storage.storage_filesystem, target)
            _write_metrics(self.task, progress)
        except Exception as error:
            fault = error if isinstance(error, UserError) else _fault(error)
            if fault is not None:
                ray.get(self.progress_actor.refuse.remote(fault))
            raise
        self.log.info("checkpoint at step %d", progress.step)
        return ray.train.Checkpoint(target, storage.storage_filesystem)

    def step(self, progress: Progress, record: dict[str, Any]) -> None:
        """Send a record to the driver's progress actor, at most a few times per second, and to the trackers."""
        now = time.monotonic()
        self.log.stage = progress.stage
        is_due = "train/loss" in record and now - self.last_shown > MIN_SHOW_INTERVAL_S
        if self.rank == 0 and (is_due or is_evaluation(record)):
            self.last_shown = now
            if self.gauges is not None:
                self.gauges.show(record)
            self.progress_actor.show.remote(progress.step, progress.num_tokens, record)
        if self.stream is not None:
            send(self.stream, progress.metrics, record)


def _write_metrics(task: TrainTask, progress: Progress) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in progress.metrics)
    task.run_dir.write_text(task.metrics, lines)


def _write_dev_rows(task: TrainTask, loop: TrainingLoop) -> None:
    """Write the losses of the dev rows at the pause, from which a race is decided; measuring is collective."""
    losses = loop.dev_row_losses()
    if loop.engine.rank == 0:
        _write_metrics(task, loop.progress)
        write_row_losses(task.run_dir, task.dev_rows_file, losses)


def _write_result(task: TrainTask, loop: TrainingLoop) -> None:
    """Write the trained student as a Hugging Face directory; gathering is collective, rank 0 writes."""
    gathered = loop.state.gather((WEIGHT,))
    if loop.engine.rank != 0:
        for _ in gathered:
            pass
        return
    student = load_model(on_this_node(task.student), dtype=torch.float32)
    if task.lora is not None:
        add_adapters(student, task.lora, task.seed)
    targets = dict(student.named_parameters())
    with torch.no_grad():
        for _, name, tensor in gathered:
            targets[name.removeprefix("student.")].copy_(tensor)
    tokenizer = load_tokenizer(str(task.run_dir.local(task.tokenizer)))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save_student(
            student, tokenizer, DTYPES[task.train.precision], folder, task.lora, task.student.path, task.student.dtype
        )
        task.run_dir.publish(folder, task.output)
    _write_metrics(task, loop.progress)
