"""Set-up of a training loop from a task, on a worker with a process group. No Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from pocl_ray.answers.families import means_of
from pocl_ray.curriculum.schedule import bucket_ends
from pocl_ray.data.batching import Layout, random_order
from pocl_ray.data.dealing import check_budget
from pocl_ray.data.row_store import RowStore
from pocl_ray.distill.budget import find_budget
from pocl_ray.distill.checkpoint import DamagedCheckpointError, Progress, read_progress
from pocl_ray.distill.dev import DevEvaluator, measure_gaps
from pocl_ray.distill.engine import Engine, InferenceStudent
from pocl_ray.distill.feed import Feed, LoadedTeacher, load_teachers, teachers_of
from pocl_ray.distill.gaps import FrontierRows, RowGaps
from pocl_ray.distill.host_memory import keep_freed_memory
from pocl_ray.distill.kernels import resolve_divergence
from pocl_ray.distill.loop import LoopHooks, TrainingLoop
from pocl_ray.distill.rescoring import Rescorer
from pocl_ray.distill.rollout_writers import RolloutWriter, TransformersWriter, VllmWriter
from pocl_ray.distill.rollouts import Rollouts
from pocl_ray.distill.step import DistillationModule, StepSettings
from pocl_ray.distill.task import TrainTask
from pocl_ray.errors import StorageError
from pocl_ray.models.heads import check_split, head_of, split_model
from pocl_ray.models.loading import load_model, load_tokenizer
from pocl_ray.models.lora import add_adapters
from pocl_ray.models.packing import find_packing_obstacle
from pocl_ray.models.places import on_this_node
from pocl_ray.models.saving import stop_ids_of, try_saving
from pocl_ray.records import GAP, RANK, Order

DEV_KD_TEMPERATURE = 1.0  # one for all stages, so that the dev losses of stages can be compared


def set_up_loop(task: TrainTask, device: torch.device, hooks: LoopHooks) -> TrainingLoop:
    """Load student, teacher, rows and caches, and wrap them into a loop; collective.

    Raises:
        UserError: A model, a cache or the DeepSpeed config does not fit.
    """
    keep_freed_memory()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    train, tokenizer = task.train, load_tokenizer(str(task.run_dir.local(task.tokenizer)))
    pad_id = tokenizer.pad_token_id
    assert isinstance(pad_id, int)
    teachers = load_teachers(task, device)  # before the engine: ZeRO-3 must not partition them
    student = load_model(on_this_node(task.student), dtype=torch.float32, eval_mode=False)
    check_split(student, task.student.path)
    layout = Layout(pad_id, train.rows_at_once, is_packed=_packs(task, student, device, hooks))
    for teacher in teachers:
        _let_pack(task, teacher, layout, hooks)
    if rank == 0:
        try_saving(student, tokenizer, task.student.path)  # what fails now would fail after the last step
    num_logits = head_of(student).vocab_size
    if task.lora is not None:
        add_adapters(student, task.lora, task.seed)
    if task.gradient_checkpointing:
        # Non-reentrant: beneath frozen weights the input needs no gradient for the adapters behind it to get theirs.
        student.gradient_checkpointing_enable({"use_reentrant": False})
    module = DistillationModule(student, chunk_bytes=task.distill.chunk_mib << 20)
    engine = Engine(module, train, device, task.collective_timeout_s, 2 if task.rollout.beside_data else 1)
    engine.module.attach_teacher_heads(*(teacher.head for teacher in teachers))
    stores = [RowStore.open(task.run_dir.local(made.path)) for made in (task.rows, task.dev_rows)]
    feed, dev_feed = (
        Feed(store, layout, rank, world_size, teachers_of(task, made, teachers, num_logits))
        for store, made in zip(stores, (task.rows, task.dev_rows), strict=True)
    )
    _settle_budget(task, engine, layout, (feed, dev_feed), teachers)
    divergence = resolve_divergence(task.distill, device)
    settings = StepSettings(DEV_KD_TEMPERATURE, 0.5 if task.teachers else 0.0, divergence)
    copy = InferenceStudent(engine)
    if stores[1].has_prompts or task.rollout.is_on:
        means_of(copy.current())  # a family that cannot answer is refused here, and not after the first stage
    dev = DevEvaluator(
        engine, dev_feed, tokenizer, settings, task.dev_generation, task.max_dev_rows, task.max_tokens, task.seed, copy
    )
    writer = _writer(task, copy, stop_ids_of(student, tokenizer))
    rollouts = Rollouts(task.rollout, engine, writer, stores[0], layout, task.max_tokens, task.seed, task.num_steps)
    rescorer = None
    if task.rescoring is not None:
        head_of_first = teachers[0].head if teachers else None
        rescorer = Rescorer(task, task.rescoring, engine, feed, tokenizer, copy.current, head_of_first)
    orders = _orders(task, len(stores[0]))
    frontier = _frontier(task, engine, feed)
    return TrainingLoop(task, engine, feed, dev, rollouts, orders, hooks, rescorer, frontier)


def _packs(task: TrainTask, student: PreTrainedModel, device: torch.device, hooks: LoopHooks) -> bool:
    """Return whether rows are packed, which all workers decide alike, as they must run equally many micro-batches."""
    if task.train.packing == "off":
        return False
    parts = split_model(student)
    obstacle = find_packing_obstacle(student, parts.response_hidden, parts.logits, task.max_tokens)
    if obstacle is not None:
        hooks.warn(f"{task.name}: rows are padded, not packed ({type(student).__name__}: {obstacle})")
    flag = torch.tensor(float(obstacle is None), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


def _settle_budget(
    task: TrainTask, engine: Engine, layout: Layout, feeds: Sequence[Feed], teachers: Sequence[LoadedTeacher]
) -> None:
    """Set the token budget, which holds the longest row, or find the one that fills the GPUs; collective."""
    longest = task.max_tokens if task.rollout.is_on else max(int(feed.lengths.max()) for feed in feeds)
    budget = task.train.micro_batch_tokens
    if budget == "auto":
        num_rows = task.train.global_batch_rows // engine.world_size
        live = [teacher.live for teacher in teachers if teacher.live is not None]
        budget = find_budget(engine, longest, num_rows, layout.is_packed, live)
    check_budget(budget, longest, layout.is_packed)
    layout.micro_batch_tokens = budget


def _let_pack(task: TrainTask, teacher: LoadedTeacher, layout: Layout, hooks: LoopHooks) -> None:
    """Let a live teacher read packed rows as the student does, if it can."""
    if not layout.is_packed or teacher.live is None:
        return
    obstacle = teacher.live.try_packing(task.max_tokens)
    if obstacle is not None:
        hooks.warn(f"{task.name}: the teacher reads padded rows ({teacher.task.ref.path}: {obstacle})")


def _writer(task: TrainTask, student: InferenceStudent, stop_ids: list[int]) -> RolloutWriter:
    if task.rollout.backend == "vllm":
        directory = on_this_node(task.student).path
        return VllmWriter(task.rollout, student, stop_ids, task.seed, directory, task.max_tokens)
    return TransformersWriter(task.rollout, student, stop_ids, task.seed)


def _orders(task: TrainTask, num_rows: int) -> dict[Order, np.ndarray]:
    """Return the row ids in each order that a stage may be a slice of."""
    ranked: np.ndarray = np.arange(num_rows)
    if task.scores is not None:
        rank = task.run_dir.read_table(task.scores, [RANK])[RANK].to_numpy()
        assert len(rank) == num_rows, "scores.parquet belongs to other rows"
        ranked = np.argsort(rank, kind="stable")
    return {"rank": ranked, "random": random_order(num_rows, task.seed)}


def _frontier(task: TrainTask, engine: Engine, feed: Feed) -> FrontierRows | None:
    """The object that draws rows by their gaps, which at first are those of the untuned student."""
    if task.frontier is None:
        return None
    assert task.scores is not None, "the first scoring measures the gaps of the first stage"
    scores = task.run_dir.read_table(task.scores, [GAP, RANK])
    first_R, rank_R = scores[GAP].to_numpy(), scores[RANK].to_numpy()
    ends = bucket_ends(len(rank_R), len(task.stages[0].buckets))
    buckets_R = np.searchsorted(ends, rank_R - 1, side="right")
    gaps = RowGaps(first_R, feed.rows.response_lengths, engine.device)
    measure = partial(measure_gaps, engine, feed)
    return FrontierRows(task.frontier, gaps, buckets_R, task.train.global_batch_rows, task.seed, measure)


class StoredCheckpoint(Protocol):
    """A checkpoint in storage, as Ray Train hands it out."""

    path: str

    def as_directory(self) -> AbstractContextManager[str]:
        """Give a local directory of its files while the context lasts."""


@contextmanager
def newest_whole(
    checkpoints: Sequence[StoredCheckpoint], warn: Callable[[str], object]
) -> Iterator[tuple[Progress, Path] | None]:
    """Yield the newest checkpoint that is complete and undamaged.

    A node that dies while it writes, or a disk that loses a block, leaves a checkpoint that must not be trained on.
    Every file of a checkpoint has its digest in `progress.json`, so that this is seen, and the one before is used.

    Args:
        checkpoints: Checkpoints, the newest first.
        warn: Function that is called with a message about each skipped checkpoint.

    Yields:
        The progress and a local directory of the files; None if there are no checkpoints.

    Raises:
        StorageError: All of them are damaged, or another version wrote them.
    """
    for number, checkpoint in enumerate(checkpoints, 1):
        with ExitStack() as stack:
            try:
                directory = Path(stack.enter_context(checkpoint.as_directory()))
                progress = read_progress(directory)
            except (DamagedCheckpointError, FileNotFoundError) as error:
                reason = (
                    error if isinstance(error, DamagedCheckpointError) else f"{checkpoint.path}: no such checkpoint"
                )
                if number == len(checkpoints):
                    raise StorageError(
                        f"{reason}, and there is no whole one before it; delete {Path(checkpoint.path).parent} to "
                        "train from the start"
                    ) from None
                warn(f"{reason}; going on from the one before")
                continue
            yield progress, directory
            return
    yield None


def resume(
    loop: TrainingLoop,
    checkpoints: Sequence[StoredCheckpoint],
    share: Callable[[Any], Any],
    warn: Callable[[str], object],
) -> None:
    """Restore the newest whole checkpoint, or leave the loop at its start; collective.

    Rank 0 alone reads and checks, and tells the others what it found: they could not see different states, nor wait
    in a collective for one that gave up.

    Args:
        loop: New training loop.
        checkpoints: Checkpoints, the newest first; rank 0 reads them.
        share: Function that returns rank 0's argument on every worker; it may take as long as rank 0 needs to read.
        warn: Function that is called on rank 0 with a message about damaged checkpoints.

    Raises:
        StorageError: All checkpoints are damaged, or another version wrote them; it is raised on every worker.
    """
    with ExitStack() as stack:
        own: tuple[Progress, Path] | None = None
        told: Progress | StorageError | None = None
        if loop.engine.rank == 0:
            try:
                own = stack.enter_context(newest_whole(checkpoints, warn))
                told = None if own is None else replace(own[0], metrics=[])  # the stream is rank 0's to write
            except StorageError as error:
                told = error
        outcome = share(told)
        if isinstance(outcome, StorageError):
            raise outcome
        if own is not None:
            loop.restore(*own)
        elif outcome is not None:
            loop.restore(outcome, None)
