"""The training loop: stages, steps, evaluations, checkpoints and hand-offs, in the order in which they happen.

Torch and DeepSpeed only. The hooks decide what happens to metrics and checkpoints.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pocl_ray.curriculum.hand_off import has_converged
from pocl_ray.distill.averaging import WeightAverage
from pocl_ray.distill.checkpoint import (
    BEST,
    STATE,
    CheckpointWriter,
    PendingCheckpoint,
    Progress,
    complete,
    make_scratch,
    state_reader,
    write_state,
)
from pocl_ray.distill.dev import DevEvaluator
from pocl_ray.distill.engine import Engine, StepLosses, learning_rate
from pocl_ray.distill.feed import Feed, GlobalBatch
from pocl_ray.distill.gaps import FrontierRows
from pocl_ray.distill.kernels import divergences
from pocl_ray.distill.rescoring import Rescorer, shared_order, write_order
from pocl_ray.distill.rollouts import Rollouts
from pocl_ray.distill.state import KINDS, WEIGHT, TrainingState
from pocl_ray.distill.step import RolloutSettings, StepSettings
from pocl_ray.distill.task import TrainTask
from pocl_ray.distill.token_weights import TokenWeight
from pocl_ray.errors import DivergedError
from pocl_ray.records import Order, Stage
from pocl_ray.run_directory.disk import GIB


@dataclass(frozen=True)
class LoopHooks:
    """Functions that the loop calls. Every worker calls each hook at the same point, so a hook may be collective.

    Without any, metrics are kept in the progress and checkpoints go nowhere.

    Attributes:
        on_checkpoint: Receives a copy of the progress and, on rank 0, the checkpoint that is being written.
        on_step: Receives the progress and each record of the metric stream, including records that are not logged.
        asks_for_checkpoint: Returns whether to save a checkpoint after this step although none is due; every worker
            gets the same answer.
        wait_for_uploads: Waits until the last checkpoint of this worker has arrived in storage.
        meet: Waits for all workers without a time limit: a collective would take a long upload for a hang.
        warn: Receives a warning for the user.
    """

    on_checkpoint: Callable[[Progress, PendingCheckpoint | None], None] = lambda progress, written: None
    on_step: Callable[[Progress, dict[str, Any]], None] = lambda progress, record: None
    asks_for_checkpoint: Callable[[Progress], bool] = lambda progress: False
    wait_for_uploads: Callable[[], None] = lambda: None
    meet: Callable[[], None] = lambda: None
    warn: Callable[[str], None] = lambda text: None


class TrainingLoop:
    """The loop over the stages of a plan; every worker runs the same loop."""

    def __init__(
        self,
        task: TrainTask,
        engine: Engine,
        feed: Feed,
        dev: DevEvaluator,
        rollouts: Rollouts,
        orders: Mapping[Order, np.ndarray],
        hooks: LoopHooks,
        rescorer: Rescorer | None = None,
        frontier: FrontierRows | None = None,
    ) -> None:
        """Set the loop up.

        Args:
            task: Plan and settings.
            engine: Engine with the student.
            feed: Feed of the training rows.
            dev: Evaluator of the dev set.
            rollouts: Source of the student's own responses.
            orders: Row ids in each order that a stage may be a slice of.
            hooks: Functions that receive records and checkpoints.
            rescorer: Object that ranks the rows again before the stages that need it.
            frontier: Object that draws the rows of stages in order `frontier`.
        """
        self.task, self.engine, self.feed, self.dev, self.orders = task, engine, feed, dev, dict(orders)
        self.rollouts, self.rescorer, self.frontier = rollouts, rescorer, frontier
        self.hooks = hooks
        self.state = TrainingState(engine)
        self.average = WeightAverage(self.state, task.train)
        found = feed.layout.micro_batch_tokens if task.train.micro_batch_tokens == "auto" else None
        self.progress = Progress(is_packed=feed.layout.is_packed, micro_batch_tokens=found)
        self._num_nonfinite = 0  # steps up to this one, in a row, that were skipped
        self.divergence, self.rollout_divergence = divergences(task.distill, task.rollout, engine.device)
        self.token_weight = TokenWeight.of(task.distill)
        self._scratch = make_scratch()
        self._writer = CheckpointWriter(round(task.train.checkpoint_buffer_gib * GIB))

    def restore(self, progress: Progress, directory: Path | None) -> None:
        """Go on from a checkpoint: weights, moments, cursor and metric stream; collective, rank 0 reads `directory`."""
        # Rank 0 reads and broadcasts: the others may be on nodes that do not have the files.
        source = directory if self.engine.rank == 0 else None
        self.progress = progress
        if self.feed.layout.is_packed and not progress.is_packed:
            self.hooks.warn(f"{self.task.name}: goes on with padded rows, which it began with")
        progress.is_packed = self.feed.layout.is_packed = progress.is_packed and self.feed.layout.is_packed
        if self.task.train.micro_batch_tokens == "auto":
            self._keep_budget(progress)
        self.average.restore(progress.average, source)
        self.state.load(state_reader(source / STATE if source else None), KINDS, progress.num_adam_steps)
        self.state.set_loss_scaler(progress.loss_scaler)
        self.rollouts.restore(progress.rollout, source)
        # Copied: the next checkpoint and the hand-off read it when this directory is gone.
        if source is not None and (source / BEST).exists():
            shutil.copytree(source / BEST, self._scratch / BEST)
        if self.rescorer is not None:
            self.orders["rank"] = shared_order(source, self.engine.device)
        if self.frontier is not None:
            self.frontier.restore(source)

    def _keep_budget(self, progress: Progress) -> None:
        """Go on with the token budget that was found at first, unless less fits now."""
        layout = self.feed.layout
        assert layout.micro_batch_tokens is not None, "it is found before a checkpoint is read"
        if progress.micro_batch_tokens is not None:
            layout.micro_batch_tokens = min(layout.micro_batch_tokens, progress.micro_batch_tokens)
        progress.micro_batch_tokens = layout.micro_batch_tokens

    @property
    def is_paused(self) -> bool:
        """Whether training has come to the step at which the task lets it pause."""
        return self.progress.step == self.task.until

    def dev_row_losses(self) -> dict[str, np.ndarray]:
        """Return the losses of each dev row, of the average of the weights where one is kept; collective."""
        with self.average.applied():
            return self.dev.row_losses()

    def run(self) -> None:
        """Train all stages, from wherever the progress stands; the student then holds the result.

        A task with `until` ends there instead, with a checkpoint. The same task with another `until` goes on from it,
        and ends with the bits of a run that never paused.
        """
        try:
            if self.progress.step == 0 and self.progress.num_samples == 0:
                if self.rescorer is not None:
                    self.rescorer.clear()
                self._evaluate()  # the figures of the untrained student, which the report compares with
                self._reset_best()  # but no stage hands them on: the best is that of what the stage trained
            for stage in self.task.stages[self.progress.stage :]:
                if not self.is_paused:
                    self._run_stage(stage)
            self._settle()
        finally:
            self._writer.close()
            # Also where training failed: the upload needs the scratch files, and saves the work until then.
            self.hooks.wait_for_uploads()
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _settle(self) -> None:
        """Wait until all uploads of all workers are finished."""
        # In this order: an upload waits for files that the writer writes, and `meet` for the slowest upload.
        self._writer.join()
        self.hooks.wait_for_uploads()
        self.hooks.meet()

    def _run_stage(self, stage: Stage) -> None:
        progress, batch_rows = self.progress, self.task.train.global_batch_rows
        # What begins a stage happens at num_samples 0 only. A run that resumes within the stage must not repeat it: its
        # moments, its order and its drawn rows are in the checkpoint.
        if progress.num_samples == 0 and stage.restart_optimizer and stage.index > 0:
            self.state.reset_moments()
        if progress.num_samples == 0 and stage.rescore:
            assert self.rescorer is not None, "the task says how rows are ranked again"
            self.orders["rank"] = self.rescorer.order(stage, self.orders["rank"])
        rows = self._rows(stage)
        # The cursor counts rows over all workers, so it means the same on another number of them.
        step = progress.num_samples // batch_rows
        started = time.monotonic()
        respond = self._respond if self.task.rollout.is_on else None
        # Closed here, as a stage that has converged leaves while the feed's thread still reads ahead.
        with closing(self.feed.stage(stage, rows, batch_rows, self.task.seed, step, respond)) as batches:
            while not self.is_paused and not self._is_over(stage, step):
                started = self._step(stage, step, next(batches), started)
                step += 1
                if self._evaluation_is_due(stage, step):
                    self._evaluate()
                    self._checkpoint()
                    started = time.monotonic()
                elif self._checkpoint_is_due():
                    self._settle()  # one checkpoint is on its way at a time; `_evaluate` has settled above
                    self._checkpoint()
                    started = time.monotonic()
        if not self.is_paused:  # at a stage's end the hand-off is the first that comes when training goes on
            self._hand_off()

    def _rows(self, stage: Stage) -> np.ndarray:
        """The row ids of a stage; with frontier pacing the rows drawn when it began, which checkpoints hold."""
        if stage.order != "frontier":
            return self.orders[stage.order][stage.first_rank : stage.end_rank]
        assert self.frontier is not None, "the task says how rows are drawn"
        if self.progress.num_samples == 0:
            self.frontier.begin(stage)
            position = {"step": self.progress.step, "curriculum/stage": stage.index}
            record = {**position, **self.frontier.figures()}
            self.progress.metrics.append(record)
            self.hooks.on_step(self.progress, record)
        return self.frontier.drawn

    def _is_over(self, stage: Stage, steps_done: int) -> bool:
        """Return whether the stage ends here. The progress alone decides, so that a resumed run decides the same."""
        if steps_done == stage.num_steps:
            return True
        # Only where figures are new; between evaluations the answer would be the same as before.
        is_evaluated = steps_done > 0 and self._evaluation_is_due(stage, steps_done)
        return is_evaluated and has_converged(stage, steps_done, self.progress.metrics, self.task.plateau)

    def _step(self, stage: Stage, step: int, batch: GlobalBatch, started: float) -> float:
        """Take a step and return the time of its end. Logging it counts toward the next one, so no time is left out."""
        progress = self.progress
        self._seed_dropout()
        lr = learning_rate(self.task.train, stage, step)
        settings = self._settings(stage, step)
        gaps = None if self.frontier is None else self.frontier.step_gaps
        losses = self.engine.train_step(batch.micro_batches, settings, lr, batch.num_response_tokens, gaps)
        # The progress moves after the step and in one piece: a checkpoint never stands between the two.
        if gaps is not None:
            gaps.end_step(progress.step)
        if not losses.is_skipped:
            self.average.see_step()
        progress.num_samples += batch.num_rows
        progress.step += 1
        progress.num_tokens += batch.num_response_tokens
        ended = time.monotonic()
        moving = {key.replace(".", "/"): value for key, value in stage.loss_args_at(step).items()}
        self._log(stage, settings, losses, lr, {**moving, **self.rollouts.figures(batch)}, ended - started)
        self._count_nonfinite(losses)
        return ended

    def _count_nonfinite(self, losses: StepLosses) -> None:
        """Warn of a skipped step, and raise after as many in a row as the config allows; all workers agree."""
        progress = self.progress
        if not losses.is_skipped:
            self._num_nonfinite = 0
            return
        self._num_nonfinite += 1
        what = f"the loss is {losses.loss}" if not math.isfinite(losses.loss) else "the gradient is not finite"
        self.hooks.warn(f"{self.task.name}: step {progress.step} is skipped, since {what}")
        if self._num_nonfinite >= self.task.train.max_nonfinite_steps:
            raise DivergedError(
                f"{self.task.name}: {what} at step {progress.step}, the last of {self._num_nonfinite} in a "
                "row that are not finite (train.max_nonfinite_steps); the last checkpoint is kept. Lower "
                "train.learning_rate, set train.precision to bf16 or fp32, or set teacher.dtype to bfloat16 or float32"
            )

    def _respond(self, batch: GlobalBatch) -> GlobalBatch:
        return self.rollouts.respond(batch, self.progress.step)

    def _settings(self, stage: Stage, step: int) -> StepSettings:
        temperature, kd_ratio = stage.kd_temperature_at(step), stage.kd_ratio_at(step)
        own = self.task.rollout.kd_ratio  # None: rollouts follow the stage's ratio
        kd = self.divergence.at(stage.loss_args_at(step, "distill"))
        written = "distill" if self.task.rollout.loss is None else "rollout"
        kd_on_rollouts = self.rollout_divergence.at(stage.loss_args_at(step, written))
        on_rollouts = RolloutSettings(kd_ratio if own is None else own, kd_on_rollouts)
        return StepSettings(temperature, kd_ratio, kd, self.token_weight, on_rollouts)

    def _seed_dropout(self) -> None:
        """Seed torch as a function of seed, step and worker: no generator state needs to be stored."""
        # By worker too, or all workers would drop the same units at the same places of their batches.
        sequence = np.random.SeedSequence([self.task.seed, self.progress.step, self.engine.rank])
        seed = int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
        # Not torch.manual_seed: it seeds each kind of device that there might be, which takes a millisecond.
        torch.default_generator.manual_seed(seed)
        if self.engine.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _log(
        self,
        stage: Stage,
        settings: StepSettings,
        losses: StepLosses,
        lr: float,
        more: dict[str, Any],
        seconds: float,
    ) -> None:
        figures = asdict(losses)
        figures.pop("is_skipped")
        num_tokens = figures.pop("num_response_tokens")
        record = {
            "step": self.progress.step,
            **{f"train/{key}": value for key, value in figures.items()},
            "train/lr": lr,
            "curriculum/stage": stage.index,
            "curriculum/kd_temperature": settings.kd_temperature,
            "curriculum/kd_ratio": settings.kd_ratio,
            **more,
            "num_response_tokens": num_tokens,
            "num_workers": self.engine.world_size,
            "step_s": round(seconds, 4),
        }
        if self.progress.step % self.task.train.log_every_steps == 0:
            self.progress.metrics.append(record)
        # Records that are not logged go to the hook too: the driver shows progress by them.
        self.hooks.on_step(self.progress, record)

    def _evaluation_is_due(self, stage: Stage, steps_done: int) -> bool:
        if steps_done == stage.num_steps:  # always at a stage's end, as the hand-off needs its figures
            return True
        epoch, within = divmod(steps_done, stage.steps_per_epoch)
        return within == 0 and epoch % self.task.train.eval_every_epochs == 0

    def _checkpoint_is_due(self) -> bool:
        every = self.task.train.checkpoint_every_steps
        is_due = self.is_paused or (every is not None and self.progress.step % every == 0)
        return is_due or self.hooks.asks_for_checkpoint(self.progress)

    def _evaluate(self) -> None:
        """Evaluate the student, or the average of its weights where one is kept, and note the best of the stage."""
        if self.progress.step > 0:
            self.average.see_evaluation()
        with self.average.applied():
            figures = self.dev.evaluate()
            self.rollouts.observe(figures)
            progress = self.progress
            position = {"step": progress.step, "curriculum/stage": progress.stage, "num_tokens": progress.num_tokens}
            record = {**position, **figures, **self._gaps()}
            self.progress.metrics.append(record)
            self.hooks.on_step(self.progress, record)
            # Before the best state and the checkpoint that follows: one is on its way at a time.
            self._settle()
            is_best = self.task.hand_off == "best" and progress.note_best(figures)
            if is_best and not self._goes_on:
                write_state(self.state, (WEIGHT,), self._scratch / BEST, self._writer)
        if is_best and self._goes_on:
            self.progress.best_adam_steps = self.state.num_adam_steps
            self.progress.best_average = self.average.numbers()
            write_state(self.state, KINDS, self._scratch / BEST, self._writer)
            self.average.write(self._scratch / BEST, self._writer)

    def _gaps(self) -> dict[str, float]:
        """The mean gap of each bucket with frontier pacing, which knows the gaps of all rows; collective."""
        if self.frontier is None:
            return {}
        num_buckets = 1 + max(bucket for stage in self.task.stages for bucket in stage.buckets)
        means = self.frontier.gaps_by_bucket(self.orders["rank"], num_buckets)
        return {f"curriculum/gap_bucket_{bucket}": mean for bucket, mean in enumerate(means)}

    @property
    def _goes_on(self) -> bool:
        """Whether a stage goes on with the moments of the one before, and not from its weights alone."""
        return not all(stage.restart_optimizer for stage in self.task.stages)

    def _checkpoint(self) -> None:
        """Gather a checkpoint and have it written; nothing else may be on its way, but the best state before it.

        At the end of a stage it is taken before the hand-off, which a resumed run repeats.
        """
        if self._num_nonfinite:  # the state is that of the last finite step, and the older checkpoints may be needed
            return
        self.progress.num_adam_steps = self.state.num_adam_steps
        self.progress.loss_scaler = self.state.loss_scaler()
        self.progress.rollout = self.rollouts.state()
        self.progress.average = self.average.numbers()
        # A copy: the writer's thread stores it while steps go on and change the progress.
        progress, written = self.progress.snapshot(), None
        directory = Path(tempfile.mkdtemp(dir=self._scratch)) if self.engine.rank == 0 else None
        # All workers gather, as a partitioned parameter needs each of them; only rank 0 has a directory and writes.
        write_state(self.state, KINDS, (directory or self._scratch) / STATE, self._writer)
        self.average.write(directory or self._scratch, self._writer)
        if self.frontier is not None:
            self.frontier.gaps.settle()  # collective: each worker has seen the gaps of its own rows
        if directory is not None:
            if self.frontier is not None:
                self.frontier.write(directory)
            self.rollouts.write(directory)
            if self.rescorer is not None:
                write_order(self.orders["rank"], directory)
            # Last in the queue: `complete` writes the digests of all files, and the progress that makes it valid.
            whole = self._writer.submit(partial(complete, progress, directory, self._scratch / BEST))
            written = PendingCheckpoint(directory, whole)
        self.hooks.on_checkpoint(progress, written)

    def _hand_off(self) -> None:
        if self.task.hand_off == "best" and self.progress.best_figure is not None:
            best = self._scratch / BEST if self.engine.rank == 0 else None
            # The files must be written before they are read, and the others wait without a limit while rank 0 writes.
            self._writer.join()
            self.hooks.meet()
            if self._goes_on:
                self.average.restore(self.progress.best_average, best)
                self.state.load(state_reader(best), KINDS, self.progress.best_adam_steps)
            else:  # these are the averaged weights, where an average is kept
                self.state.load(state_reader(best), (WEIGHT,), None)
                self.average.reset()
        if not self._goes_on or self.progress.stage + 1 == len(self.task.stages):
            self.average.settle()
        self._reset_best()  # figures of two stages are not compared: a harder stage may well begin below the last one
        self.progress.stage += 1
        self.progress.num_samples = 0

    def _reset_best(self) -> None:
        self._writer.join()  # a checkpoint that is being completed links the files that are deleted here
        self.progress.best_figure = self.progress.best_loss = None
        shutil.rmtree(self._scratch / BEST, ignore_errors=True)
