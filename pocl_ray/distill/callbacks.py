"""What Ray Train's controller does for us beside its own work: it keeps snapshots, and tells boards what it holds."""

from __future__ import annotations

from typing import Any

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback, ReportCallback, WorkerGroupCallback
from ray.util.placement_group import PlacementGroup

from pocl_ray.ray_train.checkpoints import keep_snapshot
from pocl_ray.run_directory.storage import RunDirectory


class KeepSnapshots(ReportCallback):
    """Keeps a copy of what Ray Train knows of the checkpoints; runs in the controller, after Ray Train's own part."""

    def __init__(self, run_dir: RunDirectory, folder: str) -> None:
        """Take the run directory and the folder of the checkpoints in it."""
        self.run_dir, self.folder = run_dir, folder

    def after_report(self, training_report: Any, metrics: list[dict[str, Any]]) -> None:
        """Copy it when a checkpoint was taken over."""
        if training_report.checkpoint is not None:
            keep_snapshot(self.run_dir, self.folder)


class TellBoards(ControllerCallback, WorkerGroupCallback):
    """Tells boards of a run's controller and placement group; runs in the controller."""

    def __init__(self, name: str, *boards: Any) -> None:
        """Take the name of the run, and actors with the method `holds`."""
        self.name, self.boards = name, boards

    def after_controller_start(self, train_run_context: Any) -> None:
        """Tell them of the controller."""
        self._tell(None)

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Tell them of the placement group."""
        self._tell(worker_group.get_worker_group_state().placement_group_handle.placement_group)

    def _tell(self, group: PlacementGroup | None) -> None:
        me = ray.get_runtime_context().current_actor
        for board in self.boards:
            board.holds.remote(self.name, me, group)
