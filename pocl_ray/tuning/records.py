"""The record of a trial, `tune/trials/<name>/trial.json`: what was tried and what came of it, as it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pocl_ray.distill.plateau import hand_off_figure
from pocl_ray.run_directory.storage import RunDirectory
from pocl_ray.tuning.candidates import Candidate

TRIALS = "tune/trials"
RECORD = "trial.json"
Status = Literal["running", "finished", "stopped", "failed", "diverged"]


@dataclass
class TrialRecord:
    """One trial.

    Attributes:
        name: Its directory in `tune/trials`.
        candidate: What it tries.
        fingerprint: Of its student.
        num_steps: Optimizer steps of its plan.
        num_samples: Training rows of its plan.
        status: `stopped`: by the scheduler; `diverged`: its loss was not finite.
        reason: Why it failed.
        reports: What it told Tune, one entry a dev evaluation; the last one is of the student it left.
        seconds: From its start to its end, over all of its starts.
        start_s: From its start to the first optimizer step, of its last start.
        started_at: When it was started, in UTC.
        node: Ray's id of the node that its first worker is on.
    """

    name: str
    candidate: Candidate
    fingerprint: str
    num_steps: int
    num_samples: int
    status: Status = "running"
    reason: str = ""
    reports: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    start_s: float | None = None
    started_at: str = ""
    node: str = ""

    @property
    def last(self) -> dict[str, Any]:
        """The last report; empty before there is one."""
        return self.reports[-1] if self.reports else {}

    def write(self, run_dir: RunDirectory) -> None:
        """Write it."""
        run_dir.write_json(f"{TRIALS}/{self.name}/{RECORD}", asdict(self))


def read_record(run_dir: RunDirectory, name: str) -> TrialRecord | None:
    """Read the record of a trial; None where there is none."""
    rel = f"{TRIALS}/{name}/{RECORD}"
    if not run_dir.exists(rel):
        return None
    content = run_dir.read_json(rel)
    return TrialRecord(**{**content, "candidate": Candidate(**content["candidate"])})


def figures_of(evaluations: Sequence[dict[str, Any]], hand_off: Literal["best", "last"]) -> dict[str, Any]:
    """Return the dev figures of the student as it would be handed on now, from the evaluations so far.

    With `best` that is the best evaluation of the stage that the last one belongs to, with `last` the last.
    """
    last = evaluations[-1]
    chosen = last
    if hand_off == "best":
        of_stage = [e for e in evaluations if e["curriculum/stage"] == last["curriculum/stage"] and e["step"] > 0]
        chosen = max(of_stage or [last], key=hand_off_figure)
    return {key.removeprefix("eval/dev/"): value for key, value in chosen.items() if key.startswith("eval/dev/")}
