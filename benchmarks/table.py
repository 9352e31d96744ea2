"""All speed benchmarks as one table, with every bar and the measured figure; exit status 1 where a bar is missed.

    python benchmarks/table.py [--teacher DIR] [--rows FILE] [--json FILE] [--only PROGRAM ...] [--small]

Each benchmark is a program of its own that writes its measurements with `--json`. `--small` runs each on the smallest
setting, to see that all of them work; its figures say nothing. On a machine with a GPU, steps of GPT-2 (1.5B to 0.1B)
and Qwen2.5 (7B to 0.5B) shapes come in addition, with random weights.

Programs that look into a part of what another one measures (`rollouts`, `shares`) run only when they are named.

FILE is written after each program. With `--only`, a FILE that is there is completed: rows of the named programs are
replaced or added, and the others stay. It must come from the same machine, versions, model and rows.

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
from collections.abc import Callable, Collection, Sequence
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
        is_part: Whether it looks into a part of what another program measures; it runs only when it is named.
    """

    name: str
    script: str
    arguments: str = ""
    small: str = ""
    needs: str = ""
    threads: int | None = None
    is_part: bool = False


SMALL = "--hidden 192 --vocabulary 4096 --student-layers 1 --rounds 1"
TINY = f"{SMALL} --teacher-layers 2"
PROGRAMS = (
    Program("trl", "trl_step.py", "--rounds 2 --steps 4", f"{TINY} --batch 2 --steps 3", MODEL, 1),
    Program(
        "on-policy",
        "on_policy_step.py",
        "--rounds 1 --steps 3",
        f"{TINY} --batch 2 --micro-batch 2 --new-tokens 4",
        MODEL,
        1,
    ),
    Program(
        "rollouts",
        "rollout_speed.py",
        "--rounds 1",
        "--student-layers 1 --rows 4 --new-tokens 4 --rounds 1",
        is_part=True,
    ),
    Program("scoring", "scoring_speed.py", "--rounds 1 --rows 24", f"{SMALL} --rows 6 --batch 2 --new-tokens 8"),
    Program(
        "answers",
        "answer_speed.py",
        "--works evaluation --rounds 1 --prompts 32",
        "--student-layers 1 --prompts 4 --new-tokens 4 --rounds 1",
    ),
    Program("whole", "whole_run.py", "--num-rows 16", f"{TINY} --num-rows 8 --batch 2 --new-tokens 8", MODEL),
    Program("packing", "packing.py", "--rounds 2 --rows 8", "--rounds 1 --rows 2 --layers 1", threads=1),
    Program(
        "shares",
        "step_shares.py",
        "--steps 8",
        "--hidden 64 --vocabulary 512 --teacher-layers 1 --student-layers 1 --batch 2 --steps 5",
        MODEL,
        1,
        is_part=True,
    ),
    Program("start", "first_step.py", "--rounds 2", "--rounds 1", threads=1),
    Program("rows", "million_rows.py", "", "--rows 10000 --rounds 1", threads=1),
    Program("memory", "loss_memory.py", "--losses forward_kl adaptive_kl", "--losses forward_kl --tokens 64"),
    Program(
        "orchestration",
        "orchestration.py",
        "--rounds 2 --steps 8",
        "--hidden 64 --layers 1 --steps 4 --rounds 1",
        threads=1,
    ),
    Program("gaps", "gap_cost.py", "--rounds 2", "--shape quickstart --rounds 1", threads=1),
    Program("gpt2", "trl_step.py", "--shape gpt2 --batch 16 --steps 12", needs=CUDA),
    Program("qwen2.5", "trl_step.py", "--shape qwen2.5 --batch 8 --steps 12", needs=CUDA),
)
SAME = ("small", "device", "cores", "bf16", "versions", "inputs")  # what two parts of one table must have in common


@dataclass
class Table:
    """All that was measured, and what was not.

    Attributes:
        measurements: Rows of the table.
        failed: Programs that gave no figures, with their exit status.
        skipped: Works that were not measured, with the reason.
        programs: Mapping of each work to the program and the date of its measurement.
        seconds: Mapping of programs to the seconds that they took.
    """

    measurements: list[Measurement] = field(default_factory=list)
    failed: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    programs: dict[str, tuple[str, str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def exit_status(self) -> int:
        """1 if a bar is missed, results differ, or a program failed; works that were not measured do not count."""
        return 0 if not self.failed and all(row.is_met for row in self.measurements) else 1

    @property
    def run(self) -> set[str]:
        """The programs that gave figures or failed."""
        return {program for program, _ in self.programs.values()} | set(self.failed)

    @property
    def not_measured(self) -> dict[str, str]:
        """The skipped works, and the programs that are still to be run."""
        is_known = all(program for program, _ in self.programs.values())  # an older file's rows may be any program's
        left = [one.name for one in PROGRAMS if is_known and not one.is_part and one.name not in self.run]
        due = [name for name in left if skipped_work(name) not in self.skipped]
        return {**self.skipped, **{f"program {name}": f"not run yet; --only {name} adds it" for name in due}}

    def to_json(self, about: dict[str, Any]) -> str:
        """Return the table as JSON, behind date, machine and versions."""
        rows = []
        for row in self.measurements:
            program, date = self.programs.get(row.work, ("", about.get("date", "")))
            rows.append(asdict(row) | {"is_met": row.is_met, "program": program, "date": date})
        parts = {"measurements": rows, "failed": self.failed, "not_measured": self.not_measured}
        total = {"seconds": round(sum(self.seconds.values())), "program_seconds": self.seconds}
        return json.dumps({**about, **total, **parts}, indent=1) + "\n"

    @staticmethod
    def from_json(read: dict[str, Any]) -> Table:
        """Return the table of which `to_json` made this; rows of an older file belong to no program."""
        rows = [Measurement.from_json(row) for row in read["measurements"]]
        dates = {row["work"]: (row.get("program", ""), row.get("date", read["date"])) for row in read["measurements"]}
        due = [name for name in read["not_measured"] if not name.startswith("program ")]
        known = [skipped_work(one.name) for one in PROGRAMS]
        skipped = {name: read["not_measured"][name] for name in due if name in known}
        seconds = read.get("program_seconds", {"before": read["seconds"]})
        return Table(rows, read["failed"], skipped, dates, seconds)

    def without(self, names: Collection[str], works: Collection[str] = ()) -> Table:
        """Return the table without the rows of these programs, and without these works, whoever measured them."""
        rows = [row for row in self.measurements if row.work not in works and self._program(row) not in names]
        return Table(
            rows,
            {name: status for name, status in self.failed.items() if name not in names},
            {work: why for work, why in self.skipped.items() if work not in map(skipped_work, names)},
            {row.work: self.programs[row.work] for row in rows if row.work in self.programs},
            {name: seconds for name, seconds in self.seconds.items() if name not in names},
        )

    def _program(self, row: Measurement) -> str:
        return self.programs.get(row.work, ("", ""))[0]


def skipped_work(program: str) -> str:
    """Return how the table names a program that was skipped."""
    return f"step of the shape of {program}"


def command_of(program: Program, options: argparse.Namespace, file: Path) -> list[str]:
    """Return the command line of a program that writes its measurements to `file`."""
    chosen = program.small if options.small else program.arguments
    command = [sys.executable, str(HERE / program.script), *chosen.split()]
    if program.needs == MODEL and not options.small:
        command += ["--teacher", str(options.teacher)] if options.teacher else []
        command += ["--rows", str(options.rows)] if options.rows else []
    return [*command, "--json", str(file)]


def measure(
    programs: Sequence[Program],
    options: argparse.Namespace,
    has_gpu: bool,
    table: Table | None = None,
    keep: Callable[[Table], object] = lambda table: None,
) -> Table:
    """Run the programs one after the other and collect their measurements.

    Args:
        programs: Programs to run.
        options: Options of the table.
        has_gpu: Whether there is a GPU.
        table: Table to complete: rows of these programs are replaced or added.
        keep: Function that is called with the table after each program.
    """
    table = table or Table()
    for program in programs:
        if program.needs == CUDA and (not has_gpu or options.small):
            table.skipped[skipped_work(program.name)] = "needs a CUDA device"
            continue
        threads = {} if program.threads is None else {"OMP_NUM_THREADS": str(program.threads)}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "measurements.json"
            command = command_of(program, options, file)
            print(f"\n{program.name}: {program.script} {' '.join(command[2:-2])}", flush=True)
            started = time.monotonic()
            status = subprocess.run(command, env={**os.environ, **threads}).returncode
            seconds = round(time.monotonic() - started, 1)
            print(f"{seconds:.0f} s", flush=True)
            read = json.loads(file.read_text())["measurements"] if file.exists() else None
        rows = [Measurement.from_json(row) for row in read or []]
        table = table.without([program.name], [row.work for row in rows])
        table.seconds[program.name] = seconds
        if read is None:
            table.failed[program.name] = status
        table.measurements += rows
        today = datetime.date.today().isoformat()
        table.programs |= {row.work: (program.name, today) for row in rows}
        keep(table)
    return table


def earlier(file: Path, about: dict[str, Any]) -> Table:
    """Return the table of a file that is to be completed.

    Raises:
        ValueError: It is no such file, or it was measured under other conditions, which the message names.
    """
    try:
        read = json.loads(file.read_text())
        table = Table.from_json(read)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file}: is no file that this program wrote; name another one with --json") from None
    # An older file does not tell its model and rows.
    other = [name for name in SAME if name in read and read[name] != json.loads(json.dumps(about[name]))]
    if other:
        found = ", ".join(f"{name} {read[name]} and not {about[name]}" for name in other)
        raise ValueError(
            f"{file}: was measured under other conditions ({found}); name another file with --json, or leave out --only"
        )
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
    shown += [f"  none  {work}: not measured, {reason}" for work, reason in table.not_measured.items()]
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
    inputs = {
        name: path.name if path else None for name, path in (("teacher", options.teacher), ("rows", options.rows))
    }
    about = {"date": datetime.date.today().isoformat(), "small": options.small, "inputs": inputs, **machine()}
    import torch

    chosen = [one for one in PROGRAMS if (one.name in options.only if options.only else not one.is_part)]
    before = Table()
    if options.only is not None and options.json is not None and options.json.exists():
        try:
            before = earlier(options.json, about)  # before the long work, as it may fail
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        names = ", ".join(one.name for one in chosen)
        print(f"{options.json}: {len(before.measurements)} rows are there; those of {names} are replaced or added")

    def keep(table: Table) -> None:
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(table.to_json(about))

    table = measure(chosen, options, torch.cuda.is_available(), before, keep)
    keep(table)
    minutes = sum(table.seconds.values()) / 60
    print(f"\n{about['date']}, {about['device']}, {about['cores']} cores, {minutes:.1f} min; ours / the other side\n")
    print(text_of(table))
    return table.exit_status


if __name__ == "__main__":
    sys.exit(main())
