"""The fault matrix: what is killed, in which step, and whether the run ended as if it had not been."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT
from subprocess import Popen
from typing import Any

import pyarrow.parquet as pq
from faults import DISTILLED, WEIGHTS, has_checkpoint, last_records, outliving, timeless
from nodes import Nodes
from tiny import NUM_ROWS, sha256, tree_digest

from pocl_ray.records import ID


@dataclass(frozen=True)
class Step:
    """A step of the flow in which something is killed.

    Attributes:
        command: Command of `pocl-ray`, which does this step and finds the earlier ones done.
        without: Outputs that a copy of a finished run lacks, so that the step is to be done.
        is_amid: Whether the step is under way, and its work worth losing.
        same: Whether two run directories hold the same result of the step.
        victims: The class of the actors that do the work.
        went_on: Whether work was done after a moment, which is what was lost at that moment or had not been begun.
        is_timed: Whether the table shows when the next optimizer step was done.
    """

    command: str
    without: tuple[str, ...]
    is_amid: Callable[[Path, Nodes], Any]
    same: Callable[[Path, Path], bool]
    victims: str = ""
    went_on: Callable[[Path, float], bool] = lambda run, lost_at: True
    is_timed: bool = False


def _amid_stage(index: int) -> Callable[[Path, Nodes], bool]:
    def is_amid(run: Path, _: Nodes) -> bool:
        records = last_records(run)
        return has_checkpoint(run) and bool(records) and records[-1]["curriculum/stage"] == index

    return is_amid


def _same_scores(run: Path, other: Path) -> bool:
    """The same table, of each row once, and the same shards of the cache: none is lost and none is left over."""
    caches = [tree_digest(each / "teacher_cache") for each in (run, other)]
    return (
        any(name.endswith(".arrow") for name in caches[0])
        and caches[0] == caches[1]
        and _same_table("scores/signals.parquet")(run, other)
        and _same_table("scores.parquet")(run, other)
        and pq.read_table(run / "scores.parquet")[ID].to_pylist() == list(range(NUM_ROWS))
    )


def _same_table(name: str) -> Callable[[Path, Path], bool]:
    return lambda run, other: bool(pq.read_table(run / name).equals(pq.read_table(other / name)))


def _same_file(name: str) -> Callable[[Path, Path], bool]:
    return lambda run, other: sha256(run / name) == sha256(other / name)


def _same_race(run: Path, other: Path) -> bool:
    """The same decision and student, and of each arm the same losses of dev rows and, but for the seconds, metrics."""
    arms = [sorted(path.name for path in (each / "race").iterdir()) for each in (run, other)]
    rows, streams = (
        [f"race/{arm}/dev_rows-24.parquet" for arm in arms[0]],
        [f"race/{arm}/metrics.jsonl" for arm in arms[0]],
    )
    return (
        len(arms[0]) == 2
        and arms[0] == arms[1]
        and all(_same_table(name)(run, other) for name in rows)
        and all(timeless(run / name) == timeless(other / name) for name in ("metrics.jsonl", *streams))
        and _same_file("race.json")(run, other)
        and _same_file(WEIGHTS)(run, other)
    )


def _same_pair(run: Path, other: Path) -> bool:
    """The same student and the same control, the same metrics but for the seconds, and the same answers of both."""
    streams = ("metrics.jsonl", "control/metrics.jsonl")
    return (
        all(_same_file(name)(run, other) for name in (WEIGHTS, f"control/{WEIGHTS}"))
        and all(timeless(run / name) == timeless(other / name) for name in streams)
        and _same_evaluation(run, other)
    )


def _same_evaluation(run: Path, other: Path) -> bool:
    """The same figures, of the same answers."""
    figures = [json.loads((each / "evaluation.json").read_text())["sets"] for each in (run, other)]
    return bool(figures[0] == figures[1]) and _same_table("predictions.parquet")(run, other)


def _same_report(run: Path, other: Path) -> bool:
    """The same figures; seconds and file names of the run may differ."""
    plots = [{plot.name for plot in (each / "plots").glob("*.png")} for each in (run, other)]
    return plots[0] == plots[1] and (run / "report.html").stat().st_size > 0 and (run / "report.md").exists()


EVALUATED = ("evaluation.json", "predictions.parquet")
RACE = "race"
RACED: dict[str, Any] = {
    "curriculum": {
        "pacing": RACE,
        "num_steps": 48,
        "race": {"arms": {"hot": {"curriculum.kd_temperature": 2.0}}, "rungs": [0.5]},
    },
    "difficulty__signals": ["rouge_l", "ce_loss"],  # those of the scoring that is there
}
"""What makes a race of the full run; each arm trains for 24 steps, with a checkpoint after every third."""

BOTH = "both"
BESIDE: dict[str, Any] = {"scaling__num_workers": 1, "scaling__parallel_control": True}
"""What has the full run train its control and its curriculum at once, with one worker for each."""

STEPS = {
    "scoring": Step(
        "score",
        ("scores", "scores.parquet", "teacher_cache"),
        lambda run, nodes: list(run.glob("teacher_cache/train/*.arrow")) and nodes.actors("TeacherActor"),
        _same_scores,
        "TeacherActor",
        lambda run, lost_at: any(shard.stat().st_mtime > lost_at for shard in run.glob("teacher_cache/*/*.arrow")),
    ),
    "stage 0": Step("distill", DISTILLED, _amid_stage(0), _same_file(WEIGHTS), "RayTrainWorker", is_timed=True),
    "stage 1": Step("distill", DISTILLED, _amid_stage(1), _same_file(WEIGHTS), "RayTrainWorker", is_timed=True),
    RACE: Step(
        "distill",
        (*DISTILLED, "race", "race.json", "checkpoints/race_*"),
        lambda run, _: has_checkpoint(run, "race_hot", "race/hot-*/metrics.jsonl"),
        _same_race,
        "RayTrainWorker",
        lambda run, lost_at: (run / "race.json").stat().st_mtime > lost_at,
    ),
    BOTH: Step(
        "evaluate",
        (*DISTILLED, "control", "checkpoints/control-*", *EVALUATED),
        lambda run, nodes: (
            has_checkpoint(run)
            and has_checkpoint(run, "control", "control/metrics.jsonl")
            and len(nodes.actors("RayTrainWorker")) == 2
        ),
        _same_pair,
        "RayTrainWorker",
        lambda run, lost_at: min((run / name).stat().st_mtime for name in (WEIGHTS, f"control/{WEIGHTS}")) > lost_at,
    ),
    "evaluation": Step(
        "evaluate",
        EVALUATED,
        lambda _, nodes: nodes.actors("AnswerActor"),
        _same_evaluation,
        "AnswerActor",
    ),
    "report": Step(
        "run", ("report.html", "report.md", "plots"), lambda run, _: list(run.glob("plots/*.png")), _same_report
    ),
}

# What can be lost in each step. A training worker is the actor of its stage; the report starts nothing on the cluster.
CASES = [
    *(("scoring", fault) for fault in ("actor", "node", "driver")),
    *((f"stage {index}", fault) for index in (0, 1) for fault in ("worker", "node", "driver")),
    *((RACE, fault) for fault in ("worker", "node", "driver")),
    *((BOTH, fault) for fault in ("worker", "node", "driver", "interrupt")),
    *(("evaluation", fault) for fault in ("actor", "node", "driver")),
    ("report", "driver"),
]
SHORT = [("scoring", "node")]
"""Of `make test`: with test_kills.py each kind of loss."""

ENDS_IT = ("driver", "interrupt")
"""Faults after which the same command is given again."""

RECOVERY_S = 90.0
"""So soon after the loss of a worker its run does the next step, most of it the start of processes."""

ENDED_S = 30.0
"""So soon after the end of an interrupted command its workers are gone."""


@dataclass
class Outcome:
    """A line of the table.

    Attributes:
        step: Step that was running.
        fault: Process or node that was lost.
        outcome: Result of the run.
        next_step_s: Seconds from the loss to the end of the next optimizer step; None outside training.
        done_s: Seconds from the loss to the end of the command.
    """

    step: str
    fault: str
    outcome: str = "FAILED"
    next_step_s: float | None = None
    done_s: float | None = None

    def line(self) -> str:
        """Return it as text."""
        seconds = ["-" if value is None else f"{value:.1f}" for value in (self.next_step_s, self.done_s)]
        return f"{self.step:<12}{self.fault:<10}{seconds[0]:>11}{seconds[1]:>9}  {self.outcome}"


LINE = "line of the fault matrix"
"""The property of a test that holds its line."""


def strike(fault: str, step: Step, nodes: Nodes, driver: Popen[bytes]) -> float:
    """Kill what the fault names: one process with SIGKILL, or a node with all that runs on it, and give a new one.

    An interruption is what Ctrl-C sends to the driver.

    Returns:
        The time of the loss, in seconds since the epoch.
    """
    victims = nodes.actors(step.victims) if fault in ("actor", "worker") else []
    lost_at = time.time()
    if fault == "driver":
        driver.kill()
        driver.wait()
    elif fault == "interrupt":
        driver.send_signal(SIGINT)
        driver.wait()
        assert not outliving(nodes.actors(step.victims), ENDED_S), "workers go on after Ctrl-C"
    elif fault == "node":
        nodes.lose(step.victims)
        nodes.add()
    else:
        victims[-1].kill()
    return lost_at


def table(lines: Sequence[str]) -> list[str]:
    """The matrix as lines of text, a head first."""
    head = f"{'step':<12}{'fault':<10}{'next step s':>11}{'done s':>9}  outcome"
    return [head, "-" * len(head), *lines]
