"""What the time of a distillation step with a cached teacher goes to: its parts, and its kinds of operations.

    python benchmarks/step_shares.py [--teacher DIR] [--rows FILE] [--steps 6]

The step is that of `trl_step.py`: the training loop with the DeepSpeed engine of one worker, in this process. Parts are
timed around the calls of the engine, in seconds of the process (all its threads), which other work on the machine
does not lengthen; what lies between them (reading ahead, moving a batch, logging) is the rest. Kinds are the
operations' own times by torch's profiler, in two further steps, since a profiler slows what it looks at.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many as Ray gives a worker of one CPU; before torch is imported

import argparse
import pickle
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import Measurement, add_json_option, ask_side, conclude, has_bf16
from training_inputs import loop_of
from training_sides import PREPARE, TASK, WARM_STEPS, add_model_options, prepare

from pocl_ray.distill.loop import LoopHooks, TrainingLoop

PROFILED_STEPS = 2
KINDS = {  # by the beginnings of the names of operations; what stands first counts
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "mkldnn::"),
    "attention": ("aten::_scaled_dot_product", "aten::scaled_dot_product"),
    "copies and casts": ("aten::copy_", "aten::_to_copy", "aten::clone", "aten::contiguous", "aten::cat"),
    "the optimizer's update": ("aten::_fused_adam",),
    "softmax": ("aten::_log_softmax", "aten::_softmax", "aten::logsumexp"),
}
REST = "the rest"


class Clock:
    """Seconds of the parts of a step; calls within calls count for the inner part alone."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._open: list[float] = []

    def clear(self) -> None:
        """Forget what was measured so far."""
        self.seconds.clear()

    def around(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a call that counts its time for a part."""

        def timed(*arguments: Any, **options: Any) -> Any:
            self._open.append(0.0)
            started = time.process_time()
            try:
                return call(*arguments, **options)
            finally:
                whole = time.process_time() - started
                self.seconds[part] += whole - self._open.pop()
                if self._open:
                    self._open[-1] += whole

        return timed

    def watch(self, loop: TrainingLoop) -> None:
        """Measure the parts of a loop's steps."""
        engine, module = loop.engine.deepspeed, loop.engine.module
        module.hidden = self.around("body, forward", module.hidden)  # type: ignore[method-assign]
        # The head's gradient and that of the hidden states are made in its forward pass.
        module.loss_head.forward = self.around("head and loss, with their gradient", module.loss_head.forward)  # type: ignore[method-assign]
        engine.backward = self.around("body, backward", engine.backward)
        engine.step = self.around("DeepSpeed's step with AdamW", engine.step)


def kind_of(operation: str) -> str:
    """Return the kind of an operation by its name."""
    return next((kind for kind, names in KINDS.items() if operation.startswith(names)), REST)


def shares(seconds: dict[str, float], whole: float) -> dict[str, float]:
    """Return the shares of a whole, the largest first, with what no part accounts for.

    Raises:
        ValueError: The whole is not above 0, or the parts are more than the whole.
    """
    known = sum(seconds.values())
    if not whole > 0 or known > 1.0001 * whole:
        raise ValueError(f"parts of {known} s in a whole of {whole} s")
    found = {part: value / whole for part, value in seconds.items() if part != REST}
    rest = 1 - sum(found.values())
    ordered = dict(sorted(found.items(), key=lambda one: -one[1]))
    return {**ordered, REST: max(0.0, rest)}


def measure(folder: Path) -> tuple[dict[str, float], dict[str, float], float]:
    """Train, and return the shares of the parts, those of the kinds of operations, and the seconds of a step."""
    task = pickle.loads((folder / TASK).read_bytes())
    last_timed = task.stages[0].num_steps - PROFILED_STEPS
    clock = Clock()
    taken: list[float] = []
    began: list[float] = []
    parts: dict[str, float] = {}
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def on_step(_: Any, record: dict[str, Any]) -> None:
        if "train/loss" not in record:
            return
        step = len(taken) + 1
        taken.append(record["step_s"])
        if step == WARM_STEPS:
            clock.clear()
            began.append(time.process_time())
        if step == last_timed:
            began.append(time.process_time())
            parts.update(clock.seconds)
            profiler.__enter__()
        elif step == last_timed + PROFILED_STEPS:
            profiler.__exit__(None, None, None)

    loop = loop_of(task, LoopHooks(on_step=on_step))
    clock.watch(loop)
    loop.run()
    whole = began[1] - began[0]
    kinds: Counter[str] = Counter()
    for event in profiler.key_averages():
        kinds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    return shares(parts, whole), shares(kinds, sum(kinds.values())), whole / (last_timed - WARM_STEPS)


def told(found: dict[str, float]) -> str:
    """Return shares as one line of text."""
    return ", ".join(f"{part} {share:.0%}" for part, share in found.items())


def main() -> int:
    """Write the inputs, train, print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help=f"the first {WARM_STEPS} are not counted")
    add_json_option(parser)
    parser.add_argument("--side", choices=[PREPARE], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bf16 is None:
        options.bf16 = has_bf16()
    if options.side:
        prepare(options)
        return 0
    if options.steps <= WARM_STEPS + PROFILED_STEPS:
        parser.error(f"--steps must be more than {WARM_STEPS + PROFILED_STEPS}")
    with tempfile.TemporaryDirectory() as folder:  # written by another process, whose memory this one does not inherit
        ask_side(__file__, PREPARE, [*sys.argv[1:], "--folder", folder])
        parts, kinds, seconds = measure(Path(folder))
    models, precision = "SmolLM2-135M" if options.teacher else "random weights", "bf16" if options.bf16 else "fp32"
    setting = (
        f"{models}, batch {options.batch}, {precision}, "
        f"{torch.get_num_threads()} thread(s), {options.steps - WARM_STEPS - PROFILED_STEPS} steps "
        f"of {seconds:.2f} s of the processor"
    )
    print(f"{setting}\nparts: {told(parts)}\nkinds of operations: {told(kinds)}")
    work = "shares of a step with cached teacher"
    return conclude([Measurement(work, "", f"{setting}: {told(parts)}; by operations: {told(kinds)}")], options.json)


if __name__ == "__main__":
    sys.exit(main())
