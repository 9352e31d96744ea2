"""The start of the arms: the steps of `pipeline` up to the ranking, once a scoring, by seed once a student."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

from pocl_ray.arms import Arm
from pocl_ray.config import Config
from pocl_ray.experiments.arms import by_scoring
from pocl_ray.experiments.scored import ScoredRun
from pocl_ray.inputs import FingerprintedModel
from pocl_ray.pipeline import Pipeline
from pocl_ray.ray_cluster.session import ray_session

Starts = Mapping[int, ScoredRun]
"""Seed -> the data and models that its trainings start from; all seeds may have the same."""


def open_runs(
    config: Config, arms: Mapping[str, Arm], resume_with_changes: bool, stack: ExitStack
) -> dict[str, Pipeline]:
    """Open one pipeline a scoring; each of another kind in a run directory of its own.

    Args:
        config: The experiment's config.
        arms: Arms by name.
        resume_with_changes: Whether to go on in directories whose config differs.
        stack: Stack that closes the pipelines.
    """
    pipelines = {}
    for directory, names in by_scoring(config, arms).items():
        own = config
        if directory != config.name:
            own = arms[names[0]].config.model_copy(update={"name": directory, "experiment": config.experiment})
        pipelines[directory] = _open(own, resume_with_changes, stack)
    return pipelines


def _open(
    config: Config, resume_with_changes: bool, stack: ExitStack, teacher: FingerprintedModel | None = None
) -> Pipeline:
    pipeline = Pipeline(config, resume_with_changes, lambda: stack.enter_context(ray_session()), teacher)
    stack.callback(pipeline.close)
    return pipeline


def score_runs(
    config: Config, pipelines: Mapping[str, Pipeline], resume_with_changes: bool, stack: ExitStack
) -> dict[str, Starts]:
    """Make what each scoring's arms start from, where it is not made; a Ray cluster is connected.

    Args:
        config: The experiment's config.
        pipelines: Pipeline of each scoring.
        resume_with_changes: Whether to go on in directories whose config differs.
        stack: Stack that closes further pipelines.
    """
    assert config.experiment is not None
    screen = config.experiment.screen
    seeds = (*(screen.seeds if screen is not None else ()), *config.experiment.seeds)
    if config.experiment.student == "shared":
        return {where: dict.fromkeys(seeds, ScoredRun(pipeline)) for where, pipeline in pipelines.items()}
    return {
        where: {seed: ScoredRun(_with_student(pipeline, seed, resume_with_changes, stack)) for seed in seeds}
        for where, pipeline in pipelines.items()
    }


def _with_student(pipeline: Pipeline, seed: int, resume_with_changes: bool, stack: ExitStack) -> Pipeline:
    """A run like another, with the student of a seed; the teacher, if it is trained at all, is trained once."""
    config = pipeline.config
    student = config.student.model_copy(update={"seed": seed})
    own = config.model_copy(update={"name": f"{config.name}--seed-{seed}", "student": student})
    return _open(own, resume_with_changes, stack, pipeline.inputs.teacher)


def num_rows_of(starts: Mapping[str, Starts]) -> int:
    """Return how many training rows there are."""
    return next(iter(next(iter(starts.values())).values())).num_rows
