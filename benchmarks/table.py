"""All speed benchmarks as one table, with every bar and the measured figure; exit status 1 where a bar is missed.

    python benchmarks/table.py [--teacher DIR] [--rows FILE] [--json FILE] [--only STEP ...] [--small]

Each benchmark is a program of its own that writes its measurements with `--json`. `--small` runs each on the smallest
setting, to see that all of them work; its figures say nothing. On a machine with a GPU, steps of GPT-2 (1.5B to 0.1B)
and Qwen2.5 (7B to 0.5B) shapes come in addition, with random weights.

`python docs/make_benchmark_table.py` puts the figures of a file that this program wrote into the documentation.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from measuring import Measurement, Side, bar_lines, machine

HERE = Path(__file__).resolve().parent
MODEL, CUDA = "model", "cuda"


@dataclass(frozen=True)
class Program:
    """A benchmark of the table.

    Attributes:
        name: Name on the command line.
        script: File next to this one.
        arguments: Arguments of the measurement.
        small: Arguments of the smallest setting, in place of `arguments`.
        needs: `model` if it takes the options of the model and the rows, `cuda` if it runs on a GPU only.
        threads: Threads of its processes; None: as many as there are cores.
    """

    name: str
    script: str
    arguments: str = ""
    small: str = ""
    needs: str = ""
    threads: int | None = None


TINY = "--hidden 192 --vocabulary 4096 --teacher-layers 2 --student-layers 1 --batch 2 --steps 3 --rounds 1"
PROGRAMS = (
    Program("trl", "trl_step.py", "--rounds 3 --steps 4", TINY, MODEL, 1),
    Program("rollouts", "rollout_speed.py", "--rounds 2", "--student-layers 1 --rows 4 --new-tokens 4 --rounds 1"),
    Program(
        "answers",
        "answer_speed.py",
        "--rounds 2 --prompts 32",
        "--student-layers 1 --prompts 4 --new-tokens 4 --rounds 1",
    ),
    Program("packing", "packing.py", "--rounds 3 --rows 8", "--rounds 1 --rows 2 --layers 1", threads=1),
    Program("start", "first_step.py", "--rounds 3", "--rounds 1", threads=1),
    Program("rows", "million_rows.py", "", "--rows 10000 --rounds 1", threads=1),
    Program("memory", "loss_memory.py", "--losses forward_kl adaptive_kl", "--losses forward_kl --tokens 64"),
    Program(
        "orchestration",
        "orchestration.py",
        "--rounds 3 --steps 8",
        "--hidden 64 --layers 1 --steps 4 --rounds 1",
        threads=1,
    ),
    Program("gpt2", "trl_step.py", "--shape gpt2 --batch 16 --steps 12", needs=CUDA),
    Program("qwen2.5", "trl_step.py", "--shape qwen2.5 --batch 8 --steps 12", needs=CUDA),
)
NOT_MEASURED = {
    "whole run from rows to student, four stages, against the authors' four scripts (bar: 6 times as fast)": (
        "the four scripts are not re-stated here"
    ),
    "whole on-policy step, against TRL (bar: 3 times as fast)": "only its responses are measured",
    "whole scoring, against batches as read and a second forward pass (bar: 3 times as fast)": (
        "only its answers are measured"
    ),
}


@dataclass
class Table:
    """All that was measured, and what was not.

    Attributes:
        measurements: Rows of the table.
        failed: Programs that gave no figures, with their exit status.
        skipped: Works that were not measured, with the reason.
    """

    measurements: list[Measurement] = field(default_factory=list)
    failed: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def exit_status(self) -> int:
        """1 if a bar is missed, results differ, or a program failed; works that were not measured do not count."""
        return 0 if not self.failed and all(row.is_met for row in self.measurements) else 1

    def to_json(self, about: dict[str, Any]) -> str:
        """Return the table as JSON, behind date, machine and versions."""
        rows = [asdict(row) | {"is_met": row.is_met} for row in self.measurements]
        parts = {"measurements": rows, "failed": self.failed, "not_measured": self.skipped}
        return json.dumps({**about, **parts}, indent=1) + "\n"


def command_of(program: Program, options: argparse.Namespace, file: Path) -> list[str]:
    """Return the command line of a program that writes its measurements to `file`."""
    chosen = program.small if options.small else program.arguments
    command = [sys.executable, str(HERE / program.script), *chosen.split()]
    if program.needs == MODEL and not options.small:
        command += ["--teacher", str(options.teacher)] if options.teacher else []
        command += ["--rows", str(options.rows)] if options.rows else []
    return [*command, "--json", str(file)]


def measure(programs: Sequence[Program], options: argparse.Namespace, has_gpu: bool) -> Table:
    """Run the programs one after the other and collect their measurements."""
    table = Table(skipped=dict(NOT_MEASURED))
    for program in programs:
        if program.needs == CUDA and (not has_gpu or options.small):
            table.skipped[f"step of the shape of {program.name}"] = "needs a CUDA device"
            continue
        threads = {} if program.threads is None else {"OMP_NUM_THREADS": str(program.threads)}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "measurements.json"
            command = command_of(program, options, file)
            print(f"\n{program.name}: {program.script} {' '.join(command[2:-2])}", flush=True)
            started = time.monotonic()
            status = subprocess.run(command, env={**os.environ, **threads}).returncode
            print(f"{time.monotonic() - started:.0f} s", flush=True)
            if not file.exists():
                table.failed[program.name] = status
                continue
            read = json.loads(file.read_text())["measurements"]
            table.measurements += [Measurement.from_json(row) for row in read]
    return table


def text_of(table: Table) -> str:
    """Return the table as text, and below it a line for each bar and for what was not measured."""
    head = ("work", "ratio", "least to most", "tokens/s", "peak GiB", "padding", "needed/done", "of matmul")
    lines = [head]
    for row in table.measurements:
        ratio = ("", "") if row.ratio is None else _ratio(row)
        columns = ("tokens_per_s", "peak_gib", "padding", "needed_over_done", "matmul_share")
        lines.append((row.work, *ratio, *(_pair(row.sides, column) for column in columns)))
    widths = [max(len(line[place]) for line in lines) for place in range(len(head))]
    shown = ["  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    shown += ["", *(line for row in table.measurements for line in bar_lines(row))]
    shown += [f"FAILED  {name}: exit status {status}, no figures" for name, status in table.failed.items()]
    shown += [f"  none  {work}: not measured, {reason}" for work, reason in table.skipped.items()]
    return "\n".join(shown)


def _ratio(row: Measurement) -> tuple[str, str]:
    assert row.ratio is not None
    return f"{row.ratio.median:.2f}", f"{row.ratio.least:.2f} to {row.ratio.most:.2f}"


def _pair(sides: Sequence[Side], column: str) -> str:
    """A figure of both sides, ours first; empty if neither side has it."""
    digits = {"tokens_per_s": ".0f", "peak_gib": ".2f", "padding": ".0%", "matmul_share": ".0%"}
    values = [getattr(side, column) for side in sides]
    if not any(value is not None for value in values):
        return ""
    return " / ".join("-" if value is None else format(value, digits.get(column, ".2f")) for value in values)


def main() -> int:
    """Measure, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="directory of SmolLM2-135M; default: random weights of its shape")
    parser.add_argument("--rows", type=Path, help="file of rows for the steps; default: random rows")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table to this file")
    parser.add_argument("--only", nargs="+", choices=[one.name for one in PROGRAMS], help="run these alone")
    parser.add_argument("--small", action="store_true", help="the smallest settings, to see that all programs work")
    options = parser.parse_args()
    about = machine()  # before the long work, as it may fail
    import torch

    started = time.monotonic()
    chosen = [one for one in PROGRAMS if options.only is None or one.name in options.only]
    table = measure(chosen, options, torch.cuda.is_available())
    seconds = round(time.monotonic() - started)
    about = {"date": datetime.date.today().isoformat(), "small": options.small, "seconds": seconds, **about}
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(table.to_json(about))
    print(
        f"\n{about['date']}, {about['device']}, {about['cores']} cores, {seconds / 60:.1f} min; ours / the other side\n"
    )
    print(text_of(table))
    return table.exit_status


if __name__ == "__main__":
    sys.exit(main())
