"""Our parts of Ray Tune: a searcher, schedulers that spare the control, and the actor that frees resources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher
from ray.util import remove_placement_group
from ray.util.placement_group import PlacementGroup

from pocl_ray.config import ObjectiveConfig, TuneConfig
from pocl_ray.tuning.drawing import Drawing
from pocl_ray.tuning.results import DECISIVE

TIME_ATTR = "num_samples"
ABORT_S = 15.0
NO_END = 10**15  # training samples: no limit, since every trial ends by itself


class PickledByName:
    """A part that is pickled as a name: Tune pickles its parts, and a restored search uses the new process's parts."""

    current: ClassVar[dict[str, Any]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the name of this kind of part."""
        return _of_this_process, (type(self).__name__,)

    def take_over(self) -> None:
        """Make this object the part of its kind in this process."""
        self.current[type(self).__name__] = self


def _of_this_process(name: str) -> Any:
    return PickledByName.current.get(name)


class DrawingSearcher(PickledByName, Searcher):
    """A searcher that takes candidates from a Drawing and gives it their results."""

    def __init__(self, drawing: Drawing, objective: ObjectiveConfig) -> None:
        super().__init__(metric=DECISIVE, mode="max" if objective.sign > 0 else "min")
        self.drawing = drawing
        self.take_over()
        self.numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """Return the next candidate, or `FINISHED` if there are no more."""
        planned = self.drawing.next()
        if planned is None:
            return Searcher.FINISHED
        self.numbers[trial_id] = planned.candidate.number
        return {"candidate": planned.candidate.to_json()}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Record the end of a trial."""
        if trial_id in self.numbers:
            self.drawing.tell(self.numbers[trial_id], None if error else result)

    def save(self, checkpoint_path: str) -> None:
        """Write the state as JSON, which cannot contain code."""
        content = {"numbers": self.numbers, "drawing": self.drawing.dump()}
        Path(checkpoint_path).write_text(json.dumps(content), encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        """Take the state of an earlier process."""
        content = json.loads(Path(checkpoint_path).read_text(encoding="utf-8"))
        self.numbers = content["numbers"]
        self.drawing.load(content["drawing"])


class _SparesTheControl(TrialScheduler):
    """A mixin for schedulers: the control is never stopped and does not count in the comparison of trials."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Pass a new trial to the scheduler, unless it is the control."""
        if not _is_control(trial):
            super().on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return the decision whether a trial continues."""
        if _is_control(trial):
            return TrialScheduler.CONTINUE
        return super().on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Pass on that a trial ended."""
        if not _is_control(trial):
            super().on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Pass on that a trial was removed."""
        if not _is_control(trial):
            super().on_trial_remove(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Pass on that a trial failed."""
        if not _is_control(trial):
            super().on_trial_error(tune_controller, trial)


class _Halving(_SparesTheControl, AsyncHyperBandScheduler):
    pass


class _Median(_SparesTheControl, MedianStoppingRule):
    pass


def _is_control(trial: Any) -> bool:
    return trial.config["candidate"]["number"] < 0


def make_scheduler(tune: TuneConfig, num_samples: int) -> TrialScheduler:
    """Return the scheduler, which compares trials at equal numbers of training samples.

    It compares the first objective. The dev loss decides between equal trials.

    Args:
        tune: Config of the search.
        num_samples: Number of training samples of a trial; a quarter of it is the default grace period.
    """
    settings, objective = tune.scheduler, tune.objectives[0]
    grace = settings.grace_samples or max(1, num_samples // 4)
    common: dict[str, Any] = {
        "time_attr": TIME_ATTR,
        "metric": DECISIVE,
        "mode": "max" if objective.sign > 0 else "min",
        "grace_period": grace,
    }
    if settings.type == "asha":
        return _Halving(**common, max_t=NO_END, reduction_factor=settings.reduction_factor)
    if settings.type == "median":
        return _Median(**common, min_samples_required=settings.min_trials)
    return FIFOScheduler()


@ray.remote(num_cpus=0)
class TrialResources:
    """The actor that knows each trial's resources in the cluster, so that even those of a killed trial are freed."""

    def __init__(self) -> None:
        self.held: dict[str, tuple[Any, PlacementGroup | None]] = {}

    def holds(self, name: str, controller: Any, group: PlacementGroup | None) -> None:
        """Record the controller of a trial, and the placement group of its workers if one is given."""
        self.held[name] = (controller, group)

    def release(self, name: str) -> None:
        """Free all resources that a finished trial still holds."""
        controller, group = self.held.pop(name, (None, None))
        if controller is not None:
            try:
                ray.get(controller.abort.remote(), timeout=ABORT_S)
            except RayActorError:
                pass  # already ended or dead
            except GetTimeoutError:
                ray.kill(controller)
        if group is not None:
            remove_placement_group(group)
