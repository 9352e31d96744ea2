"""The driver's side of training: a Ray Train run with its failure budget, progress and errors."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyarrow.fs as pafs
import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig
from ray.train.v2.api.callback import RayTrainCallback
from ray.train.v2.api.config import ScalingConfig as RayScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util import remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.markup import escape

from pocl_ray.config import ScalingConfig
from pocl_ray.console import Bar, console, progress_bar
from pocl_ray.curriculum.hand_off import constant_figure, dev_loss
from pocl_ray.errors import StalledError, UserError
from pocl_ray.ray_cluster.capacity import is_one_machine, resources_per_worker, wait_for_workers, wants_gpu
from pocl_ray.ray_cluster.startup import collect_again
from pocl_ray.ray_cluster.versions import versions
from pocl_ray.ray_train.checkpoints import mend_snapshot, prune_orphans
from pocl_ray.ray_train.internals import DatasetsCallback, PlacementGroupCleanerCallback
from pocl_ray.ray_train.policies import (
    BackUpSnapshots,
    ElasticPolicy,
    OneMachinePolicy,
    ReportFailures,
    RetryPolicy,
    UpdateProgress,
    give_up,
)
from pocl_ray.ray_train.process_group import ProcessGroupConfig
from pocl_ray.ray_train.progress import ProgressActor, TrainingStatus
from pocl_ray.ray_train.watch import Silence, StallWatch

if TYPE_CHECKING:  # the controller's process imports this module as well, and has no use for torch
    from pocl_ray.distill.task import TrainTask

POLL_S = 0.3
ABORT_S = 20.0
CHECKPOINTS = "checkpoints"
CONTROLLER_FAILURE_LIMIT = 8
GROUP_START_TIMEOUT_S = 30
REFUSAL_PATIENCE_S = 15.0  # the others may wait for the worker that refused until their collective times out

RAY_TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    # A dead worker is seen at once; and a checkpoint is taken over only then, while the next one waits for it.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(GROUP_START_TIMEOUT_S),
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "300",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}
ONE_MACHINE_ENVIRONMENT = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}  # nobody takes this machine away
CLUSTER_ENVIRONMENT = {"RAY_TRAIN_ENABLE_STATE_TRACKING": "1"}  # the dashboard's Train page shows what it tracks

_environment_lock = threading.Lock()
_environment_users: list[int] = []
_environment_added: dict[str, str] = {}

Watch = Callable[[TrainingStatus], None]
Train = Callable[["TrainTask", ScalingConfig, Watch], TrainingStatus]


def run_training(task: TrainTask, scaling: ScalingConfig) -> TrainingStatus:
    """Train on the connected Ray cluster, from the last checkpoint of the same task if there is one.

    Args:
        task: Training task.
        scaling: Number of workers and their resources.

    Returns:
        The final status of the run, with steps and tokens.

    Raises:
        UserError: A worker found the user's input wrong.
        ResourceError: The cluster has no room for the workers.
        GaveUpError: The workers failed more often than `scaling.max_failures` allows.
        DivergedError: Loss or gradient are not finite in several consecutive steps.
    """
    with progress_bar(task.name, task.last_step, "steps") as bar:
        return train_watched(task, scaling, show_on(bar))


@contextmanager
def _ray_train_environment() -> Iterator[None]:
    """Set what Ray Train reads from the environment and the user has not set; the next run may use another cluster.

    Trainings that run at the same time share it, and the last of them takes it back.
    """
    of_this_cluster = ONE_MACHINE_ENVIRONMENT if is_one_machine() else CLUSTER_ENVIRONMENT
    with _environment_lock:
        if not _environment_users:
            wanted = {**RAY_TRAIN_ENVIRONMENT, **of_this_cluster}
            _environment_added.update({key: value for key, value in wanted.items() if key not in os.environ})
            os.environ.update(_environment_added)
        _environment_users.append(threading.get_ident())
    try:
        yield
    finally:
        with _environment_lock:
            _environment_users.remove(threading.get_ident())
            if not _environment_users:
                for key in _environment_added:
                    os.environ.pop(key, None)
                _environment_added.clear()


@_ray_train_environment()
def train_watched(task: TrainTask, scaling: ScalingConfig, watch: Watch, *progress_actors: Any) -> TrainingStatus:
    """Train as `run_training` does, and call `watch` with the training status a few times per second.

    An exception of `watch` ends the run: its workers are freed, and the exception is raised again.

    Args:
        task: Training task.
        scaling: Number of workers and their resources.
        watch: Function that is called with the training status.
        *progress_actors: Actors with a method `holds`, such as ProgressActor, that receive the run's placement group,
            and free it if this process dies.
    """
    use_gpu = wants_gpu(scaling)
    wait_for_workers(scaling, use_gpu)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    progress_actor = ProgressActor.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    trainer = _Trainer(
        _train_worker,
        # By reference: Ray Train's controller would otherwise unpack the task, and import torch for it.
        train_loop_config={
            "task": ray.put(task),
            "progress_actor": progress_actor,
            "versions": None if is_one_machine() else versions(),
        },
        backend_config=ProcessGroupConfig("nccl" if use_gpu else "gloo", int(scaling.collective_timeout_s)),
        scaling_config=RayScalingConfig(
            num_workers=scaling.num_workers,
            elastic_resize_monitor_interval_s=scaling.resize_interval_s,
            use_gpu=use_gpu,
            resources_per_worker=resources_per_worker(scaling, use_gpu),
            placement_strategy=scaling.placement,
            accelerator_type=scaling.accelerator_type,
            label_selector=dict(scaling.labels) or None,
        ),
        run_config=_run_config(
            task,
            scaling,
            UpdateProgress(task.name, progress_actor, *progress_actors),
            ReportFailures(progress_actor),
            StallWatch(progress_actor, scaling.stall_timeout_s, scaling.collective_timeout_s),
            BackUpSnapshots(task.run_dir, checkpoint_folder(task)),
        ),
    )
    trainer.has_watchdog = not (progress_actors or is_one_machine())
    trainer.global_batch_rows, trainer.patience_s = task.train.global_batch_rows, scaling.start_timeout_s
    silence = Silence(task.name, scaling.stall_timeout_s + scaling.start_timeout_s)
    mend_snapshot(task.run_dir, checkpoint_folder(task))
    prune_orphans(task.run_dir, checkpoint_folder(task))
    training_status = _fit(trainer, progress_actor, watch, silence, task.name)
    prune_orphans(task.run_dir, checkpoint_folder(task))
    ray.kill(progress_actor)
    return training_status


def _train_worker(config: dict[str, Any]) -> None:
    """Run a worker; torch and its companions are imported only there."""
    import deepspeed  # noqa: F401 (the engine needs it, and here no garbage is collected meanwhile)

    from pocl_ray.ray_train.worker import train_worker

    collect_again()
    train_worker(config)


def train_counted(task: TrainTask, scaling: ScalingConfig) -> dict[str, float]:
    """Run `run_training` and return its counts for the manifest."""
    return counts_of(run_training(task, scaling))


def counts_of(status: TrainingStatus) -> dict[str, float]:
    """Return the counts of a finished training for the manifest; what was done before it is told apart.

    Its seconds are not those of its step: it may have begun before, beside another one, or in an earlier start.
    """
    earlier = {"earlier_steps": status.earlier_steps, "earlier_tokens": status.earlier_tokens}
    counts = {"num_steps": status.step, "num_tokens": status.num_tokens, "training_s": round(status.seconds, 3)}
    return {**counts, **(earlier if status.earlier_steps else {})}


class _Trainer(DataParallelTrainer):
    """Ray Train's trainer with policies of our own, and its watchdog of placement groups where it is needed.

    It hands its workers no datasets (they read rows and caches by themselves), so the process that would split those is
    not started.

    Attributes:
        has_watchdog: Whether Ray Train's watchdog frees the placement groups. If it is off, the end of this process
            does (if the cluster ends with it), or a progress actor. The watchdog needs the State API, which a cluster
            without a dashboard lacks; `fit` would wait for it at the end.
        global_batch_rows: Rows of an optimizer step, which the workers share evenly.
        patience_s: Seconds that an elastic run waits for its minimum number of workers.
    """

    has_watchdog = True
    global_batch_rows = 1
    patience_s = 0.0

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
        unused = (DatasetsCallback,) if self.has_watchdog else (DatasetsCallback, PlacementGroupCleanerCallback)
        return [each for each in callbacks if not isinstance(each, unused)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        assert isinstance(self.scaling_config, RayScalingConfig)
        if self.scaling_config.elasticity_enabled:
            policy = ElasticPolicy(self.scaling_config, self.global_batch_rows, self.patience_s)
            arguments["scaling_policy"] = policy
        elif is_one_machine():
            arguments["scaling_policy"] = OneMachinePolicy(self.scaling_config)
        arguments["failure_policy"] = RetryPolicy(self.run_config.failure_config)  # type: ignore[arg-type]
        return super()._initialize_and_run_controller(**arguments)  # type: ignore[misc]


def checkpoint_folder(task: TrainTask) -> str:
    """Return the folder of a task's checkpoints, relative to the run directory."""
    return f"{CHECKPOINTS}/{task.name}-{task.fingerprint[:12]}"


def _run_config(task: TrainTask, scaling: ScalingConfig, *callbacks: RayTrainCallback) -> RunConfig:
    run_dir = task.run_dir
    remote = not isinstance(run_dir.filesystem, pafs.LocalFileSystem)
    # While a lost node is replaced, each start that finds no room counts as a failure of the controller.
    num_waits = math.ceil(scaling.start_timeout_s / GROUP_START_TIMEOUT_S)
    return RunConfig(
        name=checkpoint_folder(task).rpartition("/")[2],
        storage_path=run_dir.fs_path(CHECKPOINTS),
        storage_filesystem=run_dir.filesystem if remote else None,
        failure_config=FailureConfig(  # type: ignore[call-arg]
            max_failures=scaling.max_failures, controller_failure_limit=max(CONTROLLER_FAILURE_LIMIT, num_waits)
        ),
        checkpoint_config=CheckpointConfig(num_to_keep=task.train.num_checkpoints),
        callbacks=list(callbacks),  # type: ignore[arg-type]
    )


def _fit(
    trainer: DataParallelTrainer, progress_actor: Any, watch: Watch, silence: Silence, name: str
) -> TrainingStatus:
    """Run the trainer in a thread, have the progress actor's status watched meanwhile, and return the last one."""
    failures: list[BaseException] = []
    began = time.monotonic()

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=fit, name="trainer", daemon=True)
    thread.start()
    refused_at = float("inf")
    try:
        while thread.is_alive() and time.monotonic() < refused_at + REFUSAL_PATIENCE_S:
            thread.join(POLL_S)
            training_status: TrainingStatus = ray.get(progress_actor.read.remote())
            watch(training_status)
            silence.hear(training_status.num_looks)
            if training_status.refusal is not None:
                refused_at = min(refused_at, time.monotonic())
    except BaseException:
        _abort(thread, progress_actor)
        raise
    training_status = ray.get(progress_actor.read.remote())
    if training_status.refusal is not None:
        if thread.is_alive():
            _abort(thread, progress_actor)
        raise training_status.refusal
    if failures:
        raise _cause(failures[0], name, training_status) from failures[0]
    training_status.seconds = time.monotonic() - began
    return training_status


def _abort(thread: threading.Thread, progress_actor: Any) -> None:
    """End a run that is under way, and free its workers."""
    deadline = time.monotonic() + ABORT_S
    controller, group = ray.get(progress_actor.held.remote())
    while controller is None and thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.1)
        controller, group = ray.get(progress_actor.held.remote())
    if controller is not None:
        controller.abort.remote()
        thread.join(ABORT_S)
        if thread.is_alive():
            ray.kill(controller)
            if group is not None:
                remove_placement_group(group)
    ray.kill(progress_actor)


def show_on(bar: Bar) -> Watch:
    """Return a watch that shows the training status on a bar, and prints each warning once."""
    num_starts, num_warnings, is_constant = 0, 0, False

    def watch(training_status: TrainingStatus) -> None:
        nonlocal num_starts, num_warnings, is_constant
        if training_status.num_starts > num_starts:
            num_starts = training_status.num_starts
            bar.begin(training_status.step)
        for warning in training_status.warnings[num_warnings:]:
            console.print(f"[yellow]warning:[/] {escape(warning)}")
        num_warnings = len(training_status.warnings)
        if not is_constant and (warning := constant_figure(training_status.evaluations)):
            is_constant = True
            console.print(f"[yellow]warning:[/] {escape(warning)}")
        bar.update(training_status.step, note=_note(training_status))

    return watch


def _note(training_status: TrainingStatus) -> str:
    if training_status.num_starts == 0:
        return "starting workers"
    parts = []
    if training_status.num_starts > 1:
        parts.append(f"restarted {training_status.num_starts - 1}x")
    if training_status.train:
        parts.append(
            f"stage {training_status.train['curriculum/stage']}  loss {training_status.train['train/loss']:.3f}"
        )
    if training_status.evaluations:
        figures = training_status.evaluations[-1]
        rouge_l = figures.get("eval/dev/rouge_l")
        parts.append(f"dev loss {dev_loss(figures):.3f}" if rouge_l is None else f"dev ROUGE-L {rouge_l:.1f}")
    return "  ".join(parts)


def _cause(error: BaseException, name: str, training_status: TrainingStatus) -> BaseException:
    """Return the user's mistake behind a failed run, or else the error that it failed as often as is allowed."""
    failures = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None)]
    for failure in failures:
        cause = getattr(failure, "cause", failure)
        if isinstance(cause, UserError) and not isinstance(cause, StalledError):
            return cause
    return give_up(name, error, training_status.failures)
