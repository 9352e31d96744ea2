"""Sets up a training loop from a task, on a worker whose process group stands. No Ray."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from pocl_ray.data.batching import random_order
from pocl_ray.data.row_store import RowStore
from pocl_ray.distill.dev import DevEvaluator
from pocl_ray.distill.engine import Engine
from pocl_ray.distill.feed import Feed
from pocl_ray.distill.inference import InferenceStudent
from pocl_ray.distill.loop import OnCheckpoint, OnStep, TrainingLoop
from pocl_ray.distill.losses import resolve_loss
from pocl_ray.distill.rollouts import Rollouts
from pocl_ray.distill.step import DistillationModule, StepSettings
from pocl_ray.distill.task import TrainTask
from pocl_ray.distill.writers import TransformersWriter, VllmWriter, Writer
from pocl_ray.evaluation.generation import stop_ids_of
from pocl_ray.models.head_files import load_head
from pocl_ray.models.heads import HeadWeights, check_split
from pocl_ray.models.hidden_cache import HiddenCache
from pocl_ray.models.live import LiveTeacher
from pocl_ray.models.loading import load_model, load_tokenizer
from pocl_ray.models.places import ModelRef
from pocl_ray.records import RANK, Order, RowsSummary
from pocl_ray.storage import localize

DEV_KD_TEMPERATURE = 1.0  # one for all stages, so that the dev losses of stages can be compared


def set_up_loop(task: TrainTask, device: torch.device, on_checkpoint: OnCheckpoint, on_step: OnStep) -> TrainingLoop:
    """Load student, teacher, rows and caches, and wrap them into a loop; collective.

    Raises:
        UserError: A model, a cache or the DeepSpeed config does not fit.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    train, tokenizer = task.train, load_tokenizer(str(task.run_dir.local(task.tokenizer)))
    head, live = _teacher(task, device)  # before the engine: ZeRO-3 must not partition it
    student = load_model(local_ref(task.student), dtype=torch.float32, eval_mode=False)
    check_split(student)
    if task.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    module = DistillationModule(student, chunk_bytes=task.distill.chunk_mib << 20)
    engine = Engine(module, train, device, task.collective_timeout_s, 2 if task.rollout.beside_data else 1)
    engine.module.attach_teacher_head(head)
    stores = [RowStore.open(task.run_dir.local(made.path)) for made in (task.rows, task.dev_rows)]
    pad_id = tokenizer.pad_token_id
    assert isinstance(pad_id, int)
    feed, dev_feed = (
        Feed(store, pad_id, train.micro_batch_rows, rank, world_size, _cache(task, made), live)
        for store, made in zip(stores, (task.rows, task.dev_rows), strict=True)
    )
    divergence = resolve_loss(task.distill.loss, task.distill.loss_args, task.distill.scale_by_t_squared)
    settings = StepSettings(DEV_KD_TEMPERATURE, 0.5 if task.teacher is not None else 0.0, divergence)
    copy = InferenceStudent(engine)
    dev = DevEvaluator(
        engine, dev_feed, tokenizer, settings, task.dev_generation, task.max_dev_rows, task.max_tokens, task.seed, copy
    )
    writer = _writer(task, copy, stop_ids_of(student, tokenizer))
    rollouts = Rollouts(task.rollout, engine, writer, stores[0], pad_id, task.max_tokens, task.seed, task.num_steps)
    return TrainingLoop(task, engine, feed, dev, rollouts, _orders(task, len(stores[0])), on_checkpoint, on_step)


def local_ref(ref: ModelRef) -> ModelRef:
    """Return a reference whose path is on this node."""
    return ModelRef(**{**asdict(ref), "path": localize(ref.path)})


def _writer(task: TrainTask, student: InferenceStudent, stop_ids: list[int]) -> Writer:
    if task.rollout.backend == "vllm":
        directory = local_ref(task.student).path
        return VllmWriter(task.rollout, student, stop_ids, task.seed, directory, task.max_tokens)
    return TransformersWriter(task.rollout, student, stop_ids, task.seed)


def _teacher(task: TrainTask, device: torch.device) -> tuple[HeadWeights | None, LiveTeacher | None]:
    """Return what the loss needs of the teacher: its LM head, and itself only where nothing is cached."""
    if task.teacher is None:
        return None, None
    ref = local_ref(task.teacher)
    if task.teacher_cache is not None:
        return load_head(ref, device=device), None
    live = LiveTeacher(ref, device)
    return live.head, live


def _cache(task: TrainTask, made: RowsSummary) -> HiddenCache | None:
    if task.teacher is None or task.teacher_cache is None:
        return None
    directory = task.run_dir.local(f"{task.teacher_cache}/{made.name}")
    return HiddenCache.open(directory, task.teacher_fingerprint, made.fingerprint, made.num_rows)


def _orders(task: TrainTask, num_rows: int) -> dict[Order, np.ndarray]:
    """Return the row ids in each order that a stage may be a slice of."""
    ranked: np.ndarray = np.arange(num_rows)
    if task.scores is not None:
        rank = pq.read_table(task.run_dir.local(task.scores), columns=[RANK])[RANK].to_numpy()
        assert len(rank) == num_rows, "scores.parquet belongs to other rows"
        ranked = np.argsort(rank, kind="stable")
    return {"rank": ranked, "random": random_order(num_rows, task.seed)}
