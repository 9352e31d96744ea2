"""The time that the gaps of frontier pacing add to a training step, for each loss: with and without, in turn.

    python benchmarks/gap_cost.py [--shape smollm2] [--losses forward_kl reverse_kl] [--rounds 15]

Both sides are the same step of `distill.step` with AdamW, on the same rows, at a temperature above 1, where no loss is
the gap itself; `--temperature 1` gives the other case. Seconds are processor time of one thread. A round is one step of
each side, and the side that comes first changes from round to round. Printed are the median ratio of the rounds, and
how many arrays of (tokens x vocabulary) the step and the gap read or write. Exits with 1 where a loss is over the bar.
`--shape quickstart` has a vocabulary of 2,048 entries, where what is not a pass over the logits weighs more.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch
from measuring import Bar, Measurement, Side, Spread, add_json_option, conclude
from step_sides import collate, random_model, random_rows, smollm2_shape, student_of
from torch.utils._python_dispatch import TorchDispatchMode

from pocl_ray.data.batching import MicroBatch, TeacherOutput
from pocl_ray.distill.gaps import RowGaps
from pocl_ray.distill.losses import LOSSES, resolve_loss
from pocl_ray.distill.step import DistillationModule, StepSettings
from pocl_ray.models.heads import head_of, response_hidden

BAR = 1.05
SHAPES = {  # layers of the student, vocabulary, width, rows of a batch
    "quickstart": (2, 2048, 64, 8),
    "smollm2": (6, 49152, 576, 1),
}


class CountPasses(TorchDispatchMode):
    """Counts the arrays of a chunk's logits that operations read or write."""

    def __init__(self, num_elements: int) -> None:
        super().__init__()
        self.num_elements, self.passes = num_elements, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and add what it touches."""
        out = func(*args, **(kwargs or {}))
        # A view touches nothing; an allocation is counted where it is filled.
        if not (func.is_view or "empty" in str(func) or "detach" in str(func)):
            touched = {id(x): x for x in (*args, out) if isinstance(x, torch.Tensor)}
            self.passes += sum(x.numel() for x in touched.values()) / self.num_elements
        return out


class Step:
    """A student with its teacher's head, and one batch of rows."""

    def __init__(self, shape: str, seed: int) -> None:
        num_layers, vocabulary, hidden, num_rows = SHAPES[shape]
        teacher = random_model(smollm2_shape(num_layers, vocabulary, hidden), seed).eval()
        self.vocabulary = vocabulary
        self.module = DistillationModule(student_of(teacher, num_layers).float())
        self.module.attach_teacher_heads(head_of(teacher))
        for parameter in self.module.parameters():  # away from the teacher, or there is no gap
            parameter.data.add_(torch.randn_like(parameter) * 0.02)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-6)
        rows = random_rows(num_rows, vocabulary, seed)
        batch = collate(rows)
        with torch.no_grad():
            hidden_NH = response_hidden(teacher, batch.input_ids_BT, batch.attention_mask_BT, batch.response_index_N)
        lengths = np.array([len(row.ids_T) - row.num_prompt_tokens for row in rows])
        self.batch: MicroBatch = dataclasses.replace(
            batch, teacher_outputs=(TeacherOutput(hidden_NH),), row_ids_B=np.arange(num_rows)
        )
        self.gaps = RowGaps(np.zeros(num_rows), lengths, torch.device("cpu"))

    def run(self, settings: StepSettings, with_gap: bool) -> float:
        """Take a step; return its processor seconds."""
        started = time.process_time()
        if with_gap:
            settings = dataclasses.replace(settings, gap_meter=self.gaps.meter(self.batch, torch.device("cpu")))
        loss = self.module(self.batch, settings)[0] / self.batch.num_response_tokens
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if with_gap:
            self.gaps.end_step(0)
        return time.process_time() - started

    def passes(self, settings: StepSettings, with_gap: bool) -> float:
        """Return the arrays of all tokens' logits that a step reads or writes."""
        count = CountPasses(self.batch.num_response_tokens * self.vocabulary)
        with count:
            self.run(settings, with_gap)
        return count.passes


@dataclasses.dataclass(frozen=True)
class Measured:
    """Seconds of the rounds without and with gaps, and the passes over logits of the step and of the gap."""

    plain: list[float]
    with_gap: list[float]
    passes: float
    passes_of_gap: float

    @property
    def times_as_long(self) -> float:
        """How long the step with gaps takes, in steps without."""
        return statistics.median(own / other for own, other in zip(self.with_gap, self.plain, strict=True))


def measure(step: Step, name: str, temperature: float, num_rounds: int) -> Measured:
    """Take the steps of a loss, with and without gaps in turn."""
    settings = StepSettings(temperature, 1.0, resolve_loss(name))
    step.run(settings, True)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for index in range(num_rounds):
        for with_gap in ((False, True), (True, False))[index % 2]:
            seconds[with_gap].append(step.run(settings, with_gap))
    passes = step.passes(settings, False)
    return Measured(seconds[False], seconds[True], passes, step.passes(settings, True) - passes)


def row_of(name: str, measured: Measured, setting: str) -> Measurement:
    """Return the row of a loss."""
    plain, with_gap = measured.plain, measured.with_gap
    return Measurement(
        f"step with gaps of frontier pacing, {name}",
        "the step without",
        setting,
        (Bar("times as long", measured.times_as_long, BAR, at_least=False),),
        (Side("with gaps", Spread.of(with_gap)), Side("without", Spread.of(plain))),
        Spread.of([other / own for own, other in zip(with_gap, plain, strict=True)]),
    )


def main() -> int:
    """Measure each loss, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES], default="smollm2")
    parser.add_argument("--losses", nargs="+", default=[name for name in LOSSES if name != "uld"])
    parser.add_argument("--temperature", type=float, default=1.5)
    parser.add_argument("--rounds", type=int, default=15)
    add_json_option(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    step, rows = Step(args.shape, seed=0), []
    tokens = step.batch.num_response_tokens
    setting = (
        f"{SHAPES[args.shape][0]} layers of the shape of {args.shape}, vocabulary {step.vocabulary}, {tokens} response "
        f"tokens, temperature {args.temperature:g}, fp32, 1 thread, {args.rounds} rounds"
    )
    print(setting)
    print(f"{'loss':20} {'step s':>8} {'gap adds':>9} {'passes':>7} {'of the gap':>10}")
    for name in args.losses:
        found = measure(step, name, args.temperature, args.rounds)
        added, seconds = found.times_as_long - 1, statistics.median(found.plain)
        print(f"{name:20} {seconds:8.3f} {added:+9.1%} {found.passes:7.0f} {found.passes_of_gap:10.0f}", flush=True)
        rows.append(row_of(name, found, setting))
    return conclude(rows, args.json)


if __name__ == "__main__":
    sys.exit(main())
