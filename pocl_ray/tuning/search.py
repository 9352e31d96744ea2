"""The command `pocl-ray tune`: prepare what all trials share, search with Ray Tune, confirm the best trials.

rows -> teacher, student -> scores + teacher cache -> ranking    once, the steps of `pipeline`
control, trials                                                  Ray Tune, side by side
the best ones on new seeds                                       Ray Tune
results, best.yaml, best/, report
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from ray import tune

from pocl_ray.config import Config
from pocl_ray.console import console
from pocl_ray.data.sources import count_rows
from pocl_ray.errors import ConfigError, UserError
from pocl_ray.pipeline import SCORES, SIGNALS, Pipeline
from pocl_ray.ray_cluster.capacity import wait_for_trials
from pocl_ray.ray_cluster.session import ray_session
from pocl_ray.ray_train.driver import ONE_MACHINE_ENVIRONMENT, RAY_TRAIN_ENVIRONMENT
from pocl_ray.run_directory.digests import fingerprint
from pocl_ray.run_directory.paths import is_remote
from pocl_ray.run_directory.storage import RunDirectory
from pocl_ray.tuning.candidates import Candidate, Planner, TrialOrigins, search_fingerprint
from pocl_ray.tuning.drawing import Drawing, check_drawable
from pocl_ray.tuning.page import headline, write_page
from pocl_ray.tuning.ray_parts import DrawingSearcher, TrialResources, make_scheduler
from pocl_ray.tuning.results import (
    TRIALS,
    Outcome,
    best_first,
    constant_objective,
    decide,
    table_rows,
    write_tables,
    write_winner,
)
from pocl_ray.tuning.space import check_space
from pocl_ray.tuning.trial import CurriculumTrial, Shared
from pocl_ray.tuning.watching import SearchWatch

TUNE = "tune"
SKIPPED = "tune/skipped.json"
TUNE_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "5",  # a killed search loses at most this many seconds
    "TUNE_WARN_THRESHOLD_S": "60",
    "TUNE_MAX_PENDING_TRIALS_PG": "1",
}
# Trials take no CPU, so that they never compete with their own workers. Ray needs every actor to request something.
TRIAL_RESOURCES: dict[str, int | float] = {"memory": 1}


def check_search(config: Config, num_rows: int | None = None) -> Planner:
    """Check a search before anything is started, and return its planner.

    Args:
        config: Base config.
        num_rows: Number of training rows; None counts the rows of the source.

    Raises:
        ConfigError: There is no `tune` section, a key or a value is wrong, or no candidate of the space can be trained.
    """
    if config.tune is None:
        raise ConfigError("tune: the config has no such section; give at least tune.space")
    check_space(config)
    planner = Planner(config, count_rows(config.data) if num_rows is None else num_rows)
    check_drawable(config, planner)
    return planner


class Search:
    """One search over the run in its directory. A Ray cluster must be connected."""

    def __init__(self, pipeline: Pipeline) -> None:
        """Run the steps that all trials share, unless they are done, and count how many trials fit the cluster.

        Raises:
            ResourceError: The cluster has no room for one trial.
        """
        config, inputs = pipeline.config, pipeline.inputs
        assert config.tune is not None
        self.config, self.tune, self.run_dir = config, config.tune, pipeline.run_dir
        self.num_at_once = wait_for_trials(config.scaling, config.tune.max_concurrent)
        self.planner = Planner(config, inputs.rows.train.num_rows)
        ranking = pipeline.ranking
        self.origins = TrialOrigins(signals=pipeline.signals, student=inputs.student.fingerprint)
        self.shared = Shared(
            config=config,
            run_dir=self.run_dir,
            rows=inputs.rows,
            student=inputs.student.ref,
            teachers=inputs.teachers,
            origins=self.origins,
            ranking=ranking,
            signals=SIGNALS,
            scores=SCORES,
            resources=TrialResources.remote(),  # type: ignore[attr-defined]
        )
        self.watch = SearchWatch(self.run_dir, self.planner, self.origins, self.shared.resources)

    def run(self) -> Outcome:
        """Search, confirm, write the results, and return the outcome."""
        own = search_fingerprint(self.config, self.origins)[:12]
        drawing = Drawing(self.config, self.planner.plan)
        total = drawing.limit + int(self.tune.control)
        console.print(f"[bold]search[/]  {total} trials, {self.num_at_once} at once")
        with self.watch.phase("search", total):
            self._run_tune(f"search-{own}", drawing)
        self.run_dir.write_json(SKIPPED, drawing.skipped)
        candidates = self._to_confirm()
        if candidates:
            console.print(f"[bold]confirm[/]  {len(candidates)} trials on new seeds")
            name = f"confirm-{fingerprint([own, [c.to_json() for c in candidates]])[:12]}"
            with self.watch.phase("confirm", len(candidates)):
                self._run_tune(name, candidates)
        return self._write(len(drawing.skipped))

    def _to_confirm(self) -> list[Candidate]:
        """The best trials and the control on each of the new seeds."""
        if self.tune.confirm is None:
            return []
        records = list(self.watch.records.values())
        best = [r.candidate for r in best_first(records, self.tune.objectives[0])[: self.tune.confirm.top_k]]
        controls = [r.candidate for r in records if r.candidate.kind == "control" and r.status == "finished"]
        return [c.again(seed) for seed in self.tune.confirm.seeds for c in [*best, *(controls if best else [])]]

    def _run_tune(self, name: str, what: Drawing | Sequence[Candidate]) -> None:
        """Run candidates under Ray Tune; an experiment of this name is resumed if it exists."""
        searcher = DrawingSearcher(what, self.tune.objectives[0]) if isinstance(what, Drawing) else None
        trainable = tune.with_resources(
            tune.with_parameters(CurriculumTrial, shared=self.shared), tune.PlacementGroupFactory([TRIAL_RESOURCES])
        )
        remote = is_remote(self.run_dir.uri)
        filesystem = self.run_dir.filesystem if remote else None
        path = f"{self.run_dir.fs_path(TUNE)}/{name}"
        if tune.Tuner.can_restore(path, storage_filesystem=filesystem):
            tuner = tune.Tuner.restore(
                path, trainable, resume_unfinished=True, storage_filesystem=filesystem, param_space=_space_of(what)
            )
        else:
            tuner = tune.Tuner(
                trainable,
                param_space=_space_of(what),
                tune_config=self._tune_config(what, searcher),
                run_config=tune.RunConfig(
                    name=name,
                    storage_path=self.run_dir.fs_path(TUNE),
                    storage_filesystem=filesystem,
                    verbose=0,
                    callbacks=[self.watch],
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # Ray Train keeps them
                ),
            )
        tuner.fit()
        self.watch.note_all(what.candidates() if isinstance(what, Drawing) else what)

    def _tune_config(self, what: Drawing | Sequence[Candidate], searcher: DrawingSearcher | None) -> tune.TuneConfig:
        common: dict[str, Any] = {
            "max_concurrent_trials": self.num_at_once,
            "reuse_actors": True,
            "trial_name_creator": _trial_name,
            "trial_dirname_creator": _trial_name,
        }
        if not isinstance(what, Drawing):
            return tune.TuneConfig(**common, num_samples=1)
        longest = max(self._base_samples(), 1)
        return tune.TuneConfig(
            **common,
            search_alg=searcher,
            scheduler=make_scheduler(self.tune, longest),
            num_samples=what.limit + int(self.tune.control),
        )

    def _base_samples(self) -> int:
        """The training samples of a trial: the budget, or else the samples of the base config's plan."""
        if self.tune.budget is not None and self.tune.budget.samples is not None:
            return self.tune.budget.samples
        if self.tune.budget is not None and self.tune.budget.steps is not None:
            return self.tune.budget.steps * self.config.train.global_batch_rows
        return self.planner.plan(Candidate("control", -1, {})).num_samples

    def _write(self, num_skipped: int) -> Outcome:
        outcome = decide(list(self.watch.records.values()), self.tune)
        if warning := constant_objective(outcome.records, self.tune.objectives[0]):
            console.print(f"[yellow]warning:[/] {warning}")
        rows = table_rows(outcome, self.tune)
        write_tables(self.run_dir, rows)
        if outcome.winner is not None:
            write_winner(self.run_dir, outcome.winner, self.planner.plan(outcome.winner.record.candidate))
        write_page(self.run_dir, self.config, outcome, self.planner, num_skipped)
        return outcome


def _space_of(what: Drawing | Sequence[Candidate]) -> dict[str, Any]:
    if isinstance(what, Drawing):
        return {}
    return {"candidate": tune.grid_search([candidate.to_json() for candidate in what])}


def _trial_name(trial: Any) -> str:
    candidate = Candidate(**trial.config["candidate"])
    return f"{candidate.label}_{trial.trial_id}"


def search_until_end(config: Config, resume_with_changes: bool) -> tuple[RunDirectory, str]:
    """Run the search of a config on the cluster that the environment names, or on this machine.

    Returns:
        The run directory, and the result in one sentence.

    Raises:
        UserError: The search cannot work, or no trial reached its end.
    """
    check_search(config)
    local = {} if os.environ.get("RAY_ADDRESS") else ONE_MACHINE_ENVIRONMENT
    for key, value in {**TUNE_ENVIRONMENT, **RAY_TRAIN_ENVIRONMENT, **local}.items():
        os.environ.setdefault(key, value)
    with ExitStack() as stack:
        pipeline = Pipeline(config, resume_with_changes, connect=lambda: stack.enter_context(ray_session()))
        stack.callback(pipeline.close)
        try:
            check_search(config, pipeline.inputs.rows.train.num_rows)
            stack.enter_context(ray_session())
            for name in ("ray.train", "ray.data"):
                logging.getLogger(name).setLevel(logging.ERROR)
            logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # we print one line for each failed trial
            outcome = Search(pipeline).run()
        except UserError:
            pipeline.withdraw()
            raise
    if outcome.winner is None:
        reasons = "; ".join(sorted({r.reason for r in outcome.records if r.reason})) or "all were stopped"
        raise UserError(f"{pipeline.run_dir.uri_of(TRIALS)}: no trial reached its end: {reasons}")
    return pipeline.run_dir, headline(outcome, config)
