"""The command `pocl-ray experiment`: prepare what arms share, train every arm on every seed, compare the arms.

rows -> teacher, student -> scores + teacher cache    once a scoring (and student), the steps of `pipeline`
screen     all arms on a few seeds, judged on the dev rows; the best go on
confirm    the arms that are left on seeds of their own, judged on the test rows, and the baseline for their FLOPs
tables, page
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from pocl_ray.arms import Arm
from pocl_ray.config import Config, ScreenConfig
from pocl_ray.console import console
from pocl_ray.data.sources import count_rows
from pocl_ray.errors import ConfigError, UserError
from pocl_ray.experiments.arms import by_scoring, notes, plan_arms, with_steps
from pocl_ray.experiments.flops import equal_steps
from pocl_ray.experiments.page import write_page
from pocl_ray.experiments.results import Budget, Outcome, Phase, TrainingRecord, compare, read_record, write_tables
from pocl_ray.experiments.scored import ScoredRun
from pocl_ray.experiments.starts import Starts, num_rows_of, open_runs, score_runs
from pocl_ray.experiments.table import board, comparison_table, show
from pocl_ray.ray_cluster.capacity import wait_for_trials
from pocl_ray.ray_cluster.session import ray_session
from pocl_ray.records import RowsSummary
from pocl_ray.run_directory.storage import RunDirectory
from pocl_ray.trainings.pool import Pool
from pocl_ray.trainings.statistics import FIGURES

SAME_SHARE = 0.01
"""The difference below which numbers of steps count as equal, since one more training would tell nothing."""


class Experiment:
    """One experiment over its run directory; a Ray cluster is connected."""

    def __init__(self, config: Config, arms: dict[str, Arm], starts: Mapping[str, Starts], pool: Pool) -> None:
        """Take the arms, and the data and models that their trainings start from.

        Args:
            config: The experiment's config.
            arms: Arms by name, in the order of the config.
            starts: Mapping of each arm to the data and models that it starts from, by seed.
            pool: Pool of processes that train.
        """
        assert config.experiment is not None
        self.config, self.experiment, self.pool = config, config.experiment, pool
        self.arms, self.starts = arms, dict(starts)
        self.baseline = arms[self.experiment.baseline]
        self.run_dir = RunDirectory.open(config.storage_path, config.name)
        self.records: list[TrainingRecord] = []

    def run(self) -> Outcome:
        """Screen the arms if the config says so, judge those that are left, and compare them."""
        screened, judged = self._screen()
        extra, pairs = self._baselines_of_equal_flops(judged) if self.experiment.equal_flops else ([], [])
        self._train("confirm", [*judged, *extra], self.experiment.seeds)
        steps: list[tuple[str, str, Budget]] = [
            (name, self.baseline.name, "steps") for name in judged if name != self.baseline.name
        ]
        comparisons = compare(self.records, [*steps, *pairs], "confirm")
        if screened:
            of_screen: list[tuple[str, str, Budget]] = [
                (name, self.baseline.name, "steps") for name in screened if name != self.baseline.name
            ]
            comparisons += compare(self.records, of_screen, "screen")
        said = tuple(notes(self.config, {name: self.arms[name] for name in self.experiment.arms}))
        outcome = Outcome(
            self.arms, self.baseline.name, tuple(screened), tuple(judged), tuple(self.records), tuple(comparisons), said
        )
        write_tables(self.run_dir, self.records, comparisons)
        return outcome

    def _screen(self) -> tuple[list[str], list[str]]:
        """Return the arms that were screened, and those that go on."""
        screen, names = self.experiment.screen, list(self.arms)
        if screen is None:
            return [], names
        self._train("screen", names, screen.seeds)
        judged = [self.baseline.name, *self._best(screen)]
        left = [name for name in names if name in judged]
        console.print(
            f"[bold]screened[/]  {len(names) - 1} arms besides {self.baseline.name} on dev rows, seeds "
            f"{', '.join(map(str, screen.seeds))}; judged on test rows: {', '.join(left)}"
        )
        return names, left

    def _best(self, screen: ScreenConfig) -> list[str]:
        """Return the arms with the best mean dev figure; an arm that failed on a seed comes last."""
        sign = 1.0 if FIGURES[screen.metric] else -1.0

        def rank(name: str) -> tuple[int, float]:
            own = [r for r in self.records if r.arm == name and r.phase == "screen" and not r.failure]
            values = [figures[screen.metric] for record in own for figures in record.figures.values()]
            return -len(own), -sign * statistics.fmean(values) if values else 0.0

        others = sorted((name for name in self.arms if name != self.baseline.name), key=rank)
        return others[: screen.keep]

    def _baselines_of_equal_flops(self, judged: Sequence[str]) -> tuple[list[str], list[tuple[str, str, Budget]]]:
        """Plan the baseline for the FLOPs of each arm; return the new arms, and who is compared with them."""
        base, first = self.baseline, self.experiment.seeds[0]  # students of other seeds are of the same size
        own_run = self.starts[base.name][first]
        of_base = own_run.planned_flops(base)
        extra: dict[int, str] = {base.num_steps: base.name}
        pairs: list[tuple[str, str, Budget]] = []
        for name in judged:
            if name == base.name:
                continue
            steps = equal_steps(self.starts[name][first].planned_flops(self.arms[name]), of_base, base.num_steps)
            near = next((taken for taken in extra if abs(taken - steps) <= SAME_SHARE * steps), None)
            if near is None:
                try:
                    arm = with_steps(self.config, base, steps, own_run.num_rows)
                except ConfigError as error:
                    console.print(f"[yellow]note:[/] {name}: {base.name} cannot be trained for its FLOPs: {error}")
                    continue
                self.arms[arm.name], self.starts[arm.name] = arm, self.starts[base.name]
                extra[steps], near = arm.name, steps
            pairs.append((name, extra[near], "flops"))
        return [name for name in extra.values() if name != base.name], pairs

    def _train(self, phase: Phase, names: Sequence[str], seeds: Sequence[int]) -> None:
        """Train arms on seeds, all arms on the first seed first; a training whose record exists is not run again."""
        done: list[TrainingRecord] = []
        jobs, of_job = [], {}
        for seed in seeds:
            for name in names:
                arm, scored = self.arms[name], self.starts[name][seed]
                job = scored.job(self.config, arm, seed, self._sets(scored, phase))
                record = read_record(self.run_dir, phase, job.name)
                if record is not None:
                    done.append(record)
                    continue
                jobs.append(job)
                of_job[job.name] = (arm, seed)
        with board(phase, dict.fromkeys(names, len(seeds)), done) as shown:

            def on_done(name: str, result: dict[str, object]) -> None:
                record = self._record(phase, name, *of_job[name], result)
                record.write(self.run_dir)
                done.append(record)
                shown.add(record)
                if record.failure:
                    console.print(f"[yellow]warning:[/] {name}: {record.failure}")

            if jobs:
                self.pool.run(jobs, on_done, shown.look)
        place = {(name, seed): at for at, (seed, name) in enumerate((s, n) for s in seeds for n in names)}
        self.records += sorted(done, key=lambda record: place[record.arm, record.seed])

    def _sets(self, scored: ScoredRun, phase: Phase) -> dict[str, RowsSummary]:
        return {"dev": scored.rows.dev} if phase == "screen" else dict(scored.rows.tests)

    def _record(self, phase: Phase, name: str, arm: Arm, seed: int, result: Mapping[str, object]) -> TrainingRecord:
        if "failure" in result:
            return TrainingRecord(name, phase, arm.name, seed, failure=str(result["failure"]))
        flops = self.starts[arm.name][seed].measured_flops(arm, result)
        fields = ("num_steps", "num_tokens", "seconds", "figures", "curve", "losses", "row_losses")
        return TrainingRecord(
            name,
            phase,
            arm.name,
            seed,
            flops={"scoring": flops.scoring, "refreshing": flops.refreshing, "training": flops.training},
            **{key: result[key] for key in fields},  # type: ignore[arg-type]
        )


def experiment_until_end(config: Config, resume_with_changes: bool) -> tuple[RunDirectory, Outcome]:
    """Run the experiment of a config, on the cluster that the environment names or on this machine.

    Returns:
        The run directory, and the result.

    Raises:
        UserError: The experiment cannot work.
        GaveUpError: A training failed more often than `scaling.max_failures` allows.
    """
    arms = plan_arms(config, count_rows(config.data))  # before anything is started
    assert config.experiment is not None
    for note in notes(config, arms):
        console.print(f"[yellow]note:[/] {note}")
    with ExitStack() as stack:
        pipelines = open_runs(config, arms, resume_with_changes, stack)
        try:
            stack.enter_context(ray_session())
            for name in ("ray.train", "ray.data"):
                logging.getLogger(name).setLevel(logging.ERROR)
            starts = score_runs(config, pipelines, resume_with_changes, stack)
            of_arm = {name: starts[where] for where, names in by_scoring(config, arms).items() for name in names}
            arms = plan_arms(config, num_rows_of(of_arm))  # some rows may not have been usable
            single = config.scaling.model_copy(update={"num_workers": 1})
            pool = Pool(single, wait_for_trials(single, config.experiment.max_concurrent))
            stack.callback(pool.close)
            outcome = Experiment(config, arms, of_arm, pool).run()
        except UserError:
            for pipeline in pipelines.values():
                pipeline.withdraw()
            raise
        run_dir = RunDirectory.open(config.storage_path, config.name)
        write_page(run_dir, config, outcome)
        _print(outcome)
    return run_dir, outcome


def _print(outcome: Outcome) -> None:
    judged = [one for one in outcome.comparisons if one.phase == "confirm"]
    for name in dict.fromkeys(one.set for one in judged):
        for budget in ("steps", "flops"):
            if any(one.budget == budget and one.set == name for one in judged):
                show(comparison_table(judged, budget, name))
    if outcome.screened:
        console.print(f"{len(outcome.screened) - 1} arms were screened; the intervals above are not corrected for that")
