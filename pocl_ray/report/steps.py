"""What the pipeline did: time and tokens of each step, rows left out, the machines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pocl_ray.report.files import Rejects, as_float

# In the order of the data flow, with what each of them does.
STEPS = {
    "tokenizer": "tokenizer fetched or trained",
    "rows": "rows read, checked and tokenized",
    "teacher": "teacher loaded or fine-tuned",
    "student": "student loaded, cut or fine-tuned",
    "responses": "training prompts answered by the teacher",
    "scores": "difficulty and teacher cache",
    "ranking": "signals fused into one order",
    "plan": "buckets and stages",
    "distill": "distillation, all stages",
    "control": "plain distillation as control",
    "evaluation": "answers generated and scored",
    "report": "this report",
}


@dataclass(frozen=True)
class StepTime:
    """A step of the pipeline; NaN where the manifest does not say.

    Attributes:
        name: As in manifest.json.
        what: What it does.
        status: As in manifest.json.
        seconds: Wall time.
        share_of_longest: Its time relative to that of the longest step, 0 to 1.
        num_rows: Rows that it handled.
        num_steps: Optimizer steps that it took.
        num_tokens: Tokens that it handled; in training the response tokens alone.
    """

    name: str
    what: str
    status: str
    seconds: float
    share_of_longest: float
    num_rows: float
    num_steps: float
    num_tokens: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second, or NaN."""
        return self.num_tokens / self.seconds if self.seconds > 0 else math.nan


def step_times(steps: Mapping[str, Mapping[str, Any]]) -> list[StepTime]:
    """Return the steps of the manifest in the order of the data flow, less the report, which is still under way."""
    names = [name for name in STEPS if name in steps] + [name for name in steps if name not in STEPS]
    seconds = {name: as_float(steps[name].get("seconds")) for name in names}
    longest = max((s for name, s in seconds.items() if name != "report" and math.isfinite(s)), default=0.0)
    return [
        StepTime(
            name=name,
            what=STEPS.get(name, ""),
            status=str(steps[name].get("status", "")),
            seconds=seconds[name],
            share_of_longest=seconds[name] / longest if longest > 0 and math.isfinite(seconds[name]) else 0.0,
            num_rows=as_float((steps[name].get("counts") or {}).get("num_rows")),
            num_steps=as_float((steps[name].get("counts") or {}).get("num_steps")),
            num_tokens=as_float((steps[name].get("counts") or {}).get("num_tokens")),
        )
        for name in names
        if name != "report"
    ]


def total_seconds(steps: Mapping[str, Mapping[str, Any]]) -> float:
    """Return the wall time of all steps but the report."""
    seconds = (as_float(step.get("seconds")) for name, step in steps.items() if name != "report")
    return sum(s for s in seconds if math.isfinite(s))


@dataclass(frozen=True)
class RejectLine:
    """Rows of one source that were left out for one reason."""

    source: str
    reason: str
    num_rows: int
    first_row: str


def reject_lines(rejects: Rejects, limit: int = 20) -> list[RejectLine]:
    """Return the most frequent reasons first, at most `limit`."""
    return [
        RejectLine(source, reason, count, rejects.first_rows[source, reason])
        for (source, reason), count in rejects.counts.most_common(limit)
    ]


def is_done(steps: Mapping[str, Mapping[str, Any]], name: str) -> bool:
    """Whether the manifest holds a step as done."""
    return steps.get(name, {}).get("status") == "done"
