"""Trains the curriculum and its control again on further seeds, in pairs, to see how much of a difference is chance.

One training proves little: two seeds of the same method differ by several points of ROUGE-L. Both sides of a pair share
the start, the seed and the number of steps, so that what a seed does to both cancels out (`statistics`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pocl_ray.config import ScalingConfig
from pocl_ray.console import console, progress_bar
from pocl_ray.errors import GaveUpError
from pocl_ray.ray_cluster.capacity import wait_for_trials
from pocl_ray.records import STUDENT, STUDENT_KD
from pocl_ray.run_directory.storage import RunDirectory
from pocl_ray.trainings.pool import Pool
from pocl_ray.trainings.process import Job
from pocl_ray.trainings.statistics import FIGURES, paired_difference

FOLDER = "pairs"
SIDES = (STUDENT, STUDENT_KD)

Results = dict[tuple[str, int], dict[str, Any]]
"""(side, seed) -> what `TrainingProcess.run` returned."""


def train_pairs(run_dir: RunDirectory, jobs: Mapping[tuple[str, int], Job], scaling: ScalingConfig) -> Results:
    """Run the jobs, several at once, and return their results. A job whose record is there is not run again.

    Args:
        run_dir: Run directory; records go to `pairs/<name of the job>.json`.
        jobs: (side, seed) -> its training.
        scaling: Resources; each training has one worker.

    Raises:
        UserError: The input of a job is wrong.
        GaveUpError: A training diverged, or its process died more often than `scaling.max_failures` allows.
    """
    key_of = {job.name: key for key, job in jobs.items()}
    records = {key: _record(job.name) for key, job in jobs.items()}
    results = {key: run_dir.read_json(record) for key, record in records.items() if run_dir.exists(record)}
    waiting = [job for key, job in jobs.items() if key not in results]
    num_steps = sum(job.task.num_steps for job in jobs.values())

    with progress_bar("pairs", num_steps, "steps") as bar:

        def steps_done() -> int:
            return sum(jobs[key].task.num_steps for key in results)

        def on_done(name: str, result: dict[str, Any]) -> None:
            if "failure" in result:
                raise GaveUpError(f"{name}: {result['failure']}")
            run_dir.write_json(_record(name), result)
            results[key_of[name]] = result
            bar.update(steps_done(), note=f"{len(results)}/{len(jobs)} trainings")

        def on_look(running: dict[str, tuple[int, int]]) -> None:
            bar.update(steps_done() + sum(step for step, _ in running.values()))

        bar.begin(steps_done())
        if waiting:
            single = scaling.model_copy(update={"num_workers": 1})
            pool = Pool(single, min(len(waiting), wait_for_trials(single, None)))
            try:
                pool.run(waiting, on_done, on_look)
            finally:
                pool.close()
    return {key: results[key] for key in jobs}


def compare_pairs(results: Results, seeds: Sequence[int]) -> dict[str, Any]:
    """Return the content of `pairs.json`.

    Returns:
        `seeds`, and `sets`: set -> figure of `FIGURES` -> the values of both sides by seed, and `difference`, student
        less control: mean, ends of the 95 % t interval (`low`, `high`), number of pairs won, and `verdict`.
    """
    sets: dict[str, Any] = {}
    for name, figures in results[STUDENT, seeds[0]]["figures"].items():
        sets[name] = {}
        for figure in (key for key in FIGURES if key in figures):
            values = {side: [float(results[side, seed]["figures"][name][figure]) for seed in seeds] for side in SIDES}
            found = paired_difference(values[STUDENT], values[STUDENT_KD], FIGURES[figure])
            sets[name][figure] = {
                **values,
                "difference": {
                    "mean": found.mean,
                    "low": found.t_low,
                    "high": found.t_high,
                    "num_wins": found.num_wins,
                    "verdict": found.verdict(FIGURES[figure]),
                },
            }
    return {"seeds": list(seeds), "sets": sets}


def print_pairs(content: Mapping[str, Any]) -> None:
    """Print one line for each set."""
    for name, figures in content["sets"].items():
        parts = [
            f"{label} {one['mean']:+.2f} ({one['low']:+.2f} to {one['high']:+.2f})"
            for figure, label in (("rouge_l", "greedy"), ("sampled_rouge_l", "sampled"))
            if figure in figures and (one := figures[figure]["difference"])
        ]
        if parts:
            console.print(
                f"  {name}: curriculum less plain distillation, ROUGE-L {', '.join(parts)}; "
                f"{len(content['seeds'])} pairs, 95 % interval"
            )


def _record(name: str) -> str:
    return f"{FOLDER}/{name}.json"
