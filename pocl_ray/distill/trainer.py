"""The driver's side of training: a Ray Train run with its failure budget, progress and errors."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pyarrow.fs as pafs
import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig
from ray.train import ScalingConfig as RayScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util import remove_placement_group

from pocl_ray.config import ScalingConfig
from pocl_ray.console import Bar, progress_bar
from pocl_ray.distill.board import ProgressBoard, Standing, TellBoards
from pocl_ray.distill.task import TrainTask
from pocl_ray.errors import ResourceError, UserError

POLL_S = 0.3
ABORT_S = 20.0
CHECKPOINTS = "checkpoints"
CONTROLLER_FAILURE_LIMIT = 8

RAY_TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # a dead worker is seen in a second or two
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "300",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}


Watch = Callable[[Standing], None]


def run_training(task: TrainTask, scaling: ScalingConfig) -> Standing:
    """Train on the Ray cluster that is connected, going on from the last checkpoint of the same task.

    Args:
        task: What to train.
        scaling: Workers and what they need.

    Returns:
        How the run ended: steps and tokens.

    Raises:
        UserError: A worker found the user's input wrong.
        ResourceError: The cluster has no room for the workers.
    """
    with progress_bar(task.name, task.num_steps, "steps") as bar:
        return train_watched(task, scaling, _show_on(bar))


def train_watched(task: TrainTask, scaling: ScalingConfig, watch: Watch, *boards: Any) -> Standing:
    """Do what `run_training` does, and give `watch` the standing a few times a second.

    What `watch` raises ends the run: its workers are freed, and the exception goes on.

    Args:
        task: What to train.
        scaling: Workers and what they need.
        watch: Called with the standing; the last time when the run is over.
        *boards: Actors that are told of the run's placement group, by a method `holds` as the ProgressBoard has it.
    """
    use_gpu = wants_gpu(scaling)
    wait_for_room(scaling, use_gpu)
    for key, value in RAY_TRAIN_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    board = ProgressBoard.remote()  # type: ignore[attr-defined]
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"task": task, "board": board},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=int(scaling.collective_timeout_s)),
        scaling_config=RayScalingConfig(
            num_workers=scaling.num_workers,
            use_gpu=use_gpu,
            resources_per_worker=resources_per_worker(scaling, use_gpu),
            placement_strategy=scaling.placement,
            accelerator_type=scaling.accelerator_type,
        ),
        run_config=_run_config(task, scaling, TellBoards(task.name, board, *boards)),
    )
    _fit(trainer, board, watch)
    standing: Standing = ray.get(board.read.remote())
    ray.kill(board)
    if standing.refusal is not None:
        raise standing.refusal
    return standing


def _train_worker(config: dict[str, Any]) -> None:
    """Run a worker; only there are torch and all that comes with it imported."""
    from pocl_ray.distill.worker import train_worker

    train_worker(config)


def train_counted(task: TrainTask, scaling: ScalingConfig) -> dict[str, int]:
    """Run `run_training` and return its counts for the manifest."""
    standing = run_training(task, scaling)
    return {"num_steps": standing.step, "num_tokens": standing.num_tokens}


def checkpoint_folder(task: TrainTask) -> str:
    """Return where the checkpoints of a task lie, relative to the run directory."""
    return f"{CHECKPOINTS}/{task.name}-{task.fingerprint[:12]}"


def _run_config(task: TrainTask, scaling: ScalingConfig, tell: TellBoards) -> RunConfig:
    run_dir = task.run_dir
    remote = not isinstance(run_dir.filesystem, pafs.LocalFileSystem)
    return RunConfig(
        name=checkpoint_folder(task).rpartition("/")[2],
        storage_path=run_dir.fs_path(CHECKPOINTS),
        storage_filesystem=run_dir.filesystem if remote else None,
        failure_config=FailureConfig(  # type: ignore[call-arg]
            max_failures=scaling.max_failures, controller_failure_limit=CONTROLLER_FAILURE_LIMIT
        ),
        checkpoint_config=CheckpointConfig(num_to_keep=task.train.num_checkpoints),
        callbacks=[tell],  # type: ignore[list-item]
    )


def _fit(trainer: TorchTrainer, board: Any, watch: Watch) -> None:
    """Run the trainer in a thread, and have the board's standing watched meanwhile."""
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=fit, name="trainer", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(POLL_S)
            watch(ray.get(board.read.remote()))
    except BaseException:
        _abort(thread, board)
        raise
    if failures:
        raise _cause(failures[0])


def _abort(thread: threading.Thread, board: Any) -> None:
    """End a run that is under way, and free its workers."""
    deadline = time.monotonic() + ABORT_S
    controller, group = ray.get(board.held.remote())
    while controller is None and thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.1)
        controller, group = ray.get(board.held.remote())
    if controller is not None:
        controller.abort.remote()
        thread.join(ABORT_S)
        if thread.is_alive():
            ray.kill(controller)
            if group is not None:
                remove_placement_group(group)
    ray.kill(board)


def _show_on(bar: Bar) -> Watch:
    num_starts = 0

    def watch(standing: Standing) -> None:
        nonlocal num_starts
        if standing.num_starts > num_starts:
            num_starts = standing.num_starts
            bar.begin(standing.first_step)
        bar.update(standing.step, note=_note(standing))

    return watch


def _note(standing: Standing) -> str:
    if standing.num_starts == 0:
        return "starting workers"
    parts = []
    if standing.num_starts > 1:
        parts.append(f"restarted {standing.num_starts - 1}x")
    if standing.train:
        parts.append(f"stage {standing.train['curriculum/stage']}  loss {standing.train['train/loss']:.3f}")
    if standing.evaluations:
        parts.append(f"dev ROUGE-L {standing.evaluations[-1]['eval/dev/rouge_l']:.1f}")
    return "  ".join(parts)


def _cause(error: BaseException) -> BaseException:
    """Return the user's mistake behind a failed run if there is one, else the failure itself."""
    for failure in getattr(error, "worker_failures", {}).values():
        cause = getattr(failure, "cause", failure)
        if isinstance(cause, UserError):
            return cause
    return error


def wants_gpu(scaling: ScalingConfig) -> bool:
    """Whether workers get a GPU each.

    Raises:
        ResourceError: A GPU is asked for where the cluster has none.
    """
    has_gpu = ray.cluster_resources().get("GPU", 0) > 0
    if scaling.use_gpu and not has_gpu:
        raise ResourceError("scaling.use_gpu: the cluster has no GPU; set it to false, or to null for what there is")
    return has_gpu if scaling.use_gpu is None else scaling.use_gpu


def resources_per_worker(scaling: ScalingConfig, use_gpu: bool) -> dict[str, float]:
    """Return what one training worker asks the cluster for."""
    resources = {"CPU": scaling.cpus_per_worker, **scaling.resources_per_worker}
    return {**resources, "GPU": resources.get("GPU", 1)} if use_gpu else resources


def wait_for_room(scaling: ScalingConfig, use_gpu: bool) -> None:
    """Wait until the cluster has room for all workers; an autoscaling one may still be growing.

    Raises:
        ResourceError: It has not after `scaling.start_timeout_s`.
    """
    needed = {k: v * scaling.num_workers for k, v in resources_per_worker(scaling, use_gpu).items()}
    deadline = time.monotonic() + scaling.start_timeout_s
    while True:
        total = ray.cluster_resources()
        lacking = {k: v for k, v in needed.items() if v > total.get(k, 0)}
        if not lacking:
            return
        if time.monotonic() > deadline or _is_one_machine():
            listed = ", ".join(f"{v:g} {k} (the cluster has {total.get(k, 0):g})" for k, v in lacking.items())
            raise ResourceError(
                f"scaling.num_workers: {scaling.num_workers} workers need {listed}; "
                "lower scaling.num_workers or scaling.cpus_per_worker"
            )
        time.sleep(1.0)


def _is_one_machine() -> bool:
    """Whether this process started the cluster itself, which therefore will not grow."""
    node = ray._private.worker._global_node
    return node is not None and node.head
