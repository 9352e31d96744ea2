"""`pocl-ray run --dry-run`: the steps that would run and why, the plan, and its cost. Nothing is written.

A step would run if its fingerprint is not in the manifest as done. The pipeline itself computes the
fingerprints, with steps that do no work. What needs the files of a step that would run is taken to run as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pocl_ray.advice.cost import CPU_SHARE, GIB, WorkerMemory, duration, estimate, measured_flops
from pocl_ray.advice.first_rows import count_all, measure, read_first
from pocl_ray.advice.model_shape import look_at, tokenizer_if_reachable
from pocl_ray.config import Config
from pocl_ray.config.neutral import neutral_free
from pocl_ray.config.race import RACE
from pocl_ray.curriculum.schedule import plan_stages
from pocl_ray.errors import StorageError, UserError
from pocl_ray.inputs import Inputs
from pocl_ray.pipeline import Pipeline
from pocl_ray.preflight import check_inputs
from pocl_ray.preview import cache_bytes, prepared_sets, print_plan
from pocl_ray.records import STEPS, RowsSummary
from pocl_ray.run_directory.claim import CONFIG, COSTLY, differences, parse_config
from pocl_ray.run_directory.manifest import Manifest, StepResult, Steps, step_fingerprint
from pocl_ray.run_directory.storage import RunDirectory

DONE = "done already"
NOT_YET = "not done yet"
READ = ("tokenizer", "rows", "responses", "distill")
"""The steps whose results others read before they know their own fingerprints; distill, for its number of steps."""


class _WouldRunError(Exception):
    """A step would run, so that its fingerprint has no results yet."""

    def __init__(self, step: str) -> None:
        super().__init__(step)
        self.step = step


class _ReadOnly(RunDirectory):
    """A run directory that is read and never written."""

    def write_bytes(self, rel: str, data: bytes) -> None:
        """Write nothing."""

    def delete(self, rel: str) -> None:
        """Delete nothing."""


class _Looking(Steps):
    """Steps that do no work: each says whether it is done, or would run and why.

    Attributes:
        why: Reason by step.
    """

    def __init__(self, run_dir: RunDirectory, changes: str) -> None:
        super().__init__(run_dir, lambda: None)
        self.why: dict[str, str] = {}
        self._changes = changes

    def run(self, name: str, depends: Any, work: Callable[[str], StepResult], trains: bool = False) -> str:
        """Return the fingerprint of a step.

        Raises:
            _WouldRunError: It would run, and what it writes is read by later steps before they know their fingerprints.
        """
        own = step_fingerprint(name, depends)
        self.why[name] = why_it_runs(self.manifest, name, own, self._changes)
        if self.why[name] != DONE and name in READ:
            raise _WouldRunError(name)
        return own


class _Unclaimed(Pipeline):
    """A pipeline that takes no run directory and writes nothing."""

    def __init__(self, config: Config, steps: Steps) -> None:
        """Take the steps as they are, in place of those that a claim of the directory would give."""
        self.config, self.run_dir, self.steps = config, steps.run_dir, steps
        self.inputs = Inputs(config, steps)


def why_it_runs(manifest: Manifest, step: str, fingerprint: str, changes: str) -> str:
    """Return why a step would run, or that it is done.

    Args:
        manifest: Manifest of the run directory.
        step: Name of the step.
        fingerprint: Its fingerprint under the config.
        changes: Differences between the config and the one of the run directory.
    """
    if manifest.is_done(step, fingerprint):
        return DONE
    entry = manifest.steps.get(step)
    if entry is None:
        return NOT_YET
    if entry["fingerprint"] != fingerprint:
        return f"what it depends on has changed{f': {changes}' if changes else ', such as the rows or a model'}"
    if entry["status"] != "done":
        return "was begun and not finished: goes on where it can"
    missing = [rel for rel in entry["outputs"] if not manifest.run_dir.exists(rel)]
    return f"what it wrote is gone: {', '.join(missing)}"


def changed_keys(config: Config, run_dir: RunDirectory) -> str:
    """Return how the config differs from the one of the run directory; empty if it does not, or there is none."""
    if not run_dir.exists(CONFIG):
        return ""
    try:
        before = parse_config(run_dir.read_bytes(CONFIG), run_dir.uri_of(CONFIG))
    except StorageError:
        return "the config there is damaged, or of another version of pocl-ray"
    return "; ".join(differences(neutral_free(before), neutral_free(config)))


def steps_to_run(config: Config) -> dict[str, str]:
    """Return, by step in their order, why it would run, or that it is done; steps that the config lacks are left out.

    Raises:
        UserError: An input is missing or does not fit.
    """
    check_inputs(config)
    place = RunDirectory.open(config.storage_path, config.name, create=False)
    steps = _Looking(_ReadOnly(place.uri), changed_keys(config, place))
    pipeline = _Unclaimed(config, steps)
    inputs = pipeline.inputs
    getters: dict[str, Callable[[], object]] = {
        "tokenizer": lambda: inputs.tokenizer,
        "rows": lambda: inputs.prepared,
        "teacher": lambda: inputs.teacher,
        "responses": lambda: inputs.responses,
        "student": lambda: inputs.student,
        "plan": lambda: pipeline.stages,
        "scores": lambda: pipeline.signals,
        "ranking": lambda: pipeline.ranking,
        "race": lambda: pipeline.raced,
        "distill": lambda: pipeline.distilled,
        "control": lambda: pipeline.control,
        "evaluation": lambda: pipeline.evaluation,
        "tasks": lambda: pipeline.tasks,
        "pairs": lambda: pipeline.pairs,
        "report": lambda: pipeline.report,
    }
    left_out = _left_out(config)
    why: dict[str, str] = {}
    for name in STEPS:
        if name in left_out:
            continue
        try:
            getters[name]()
            why[name] = steps.why.get(name, DONE)
        except _WouldRunError as first:
            rests = f"rests on {first.step}" if name in steps.manifest.steps else NOT_YET
            why[name] = steps.why.get(name, rests)
    return why


def _left_out(config: Config) -> set[str]:
    """The steps that a config does not have."""
    left_out = set() if config.data.responses == "teacher" else {"responses"}
    left_out |= set() if config.curriculum.pacing == RACE else {"race"}
    left_out |= set() if config.evaluation.tasks else {"tasks"}
    if config.control is None:
        left_out |= {"control", "pairs"}
    elif not config.control.seeds:
        left_out.add("pairs")
    return left_out


@dataclass(frozen=True)
class _Known:
    """The training rows as far as they are known, and where from."""

    rows: RowsSummary
    source: str


def _rows_of(config: Config) -> _Known:
    prepared = prepared_sets(config)
    if "train" in prepared:
        return _Known(prepared["train"], "the prepared rows")
    first = read_first(config.data.train, "train")
    owner = config.teacher if config.teacher.cross_tokenizer is None else config.student
    tokenizer = None if owner.path is None else tokenizer_if_reachable(owner)
    lengths = measure(first, config.data, tokenizer)
    num_rows = count_all(config.data)
    prompts = np.minimum(lengths.prompts, config.data.max_prompt_tokens)
    responses = np.minimum(lengths.responses, config.data.max_tokens - prompts)
    rows = RowsSummary(
        name="train",
        path="",
        num_rows=num_rows,
        num_rejected=0,
        num_prompt_tokens=int(prompts.mean() * num_rows),
        num_response_tokens=int(responses.mean() * num_rows),
        max_response_tokens=int(responses.max()),
        fingerprint="",
    )
    return _Known(rows, f"the first {len(first)} rows")


def _cost_lines(config: Config) -> list[str]:
    """The estimate of time, memory and disk, in lines."""
    known = _rows_of(config)
    if config.teacher.path is None or (config.student.path is None and config.student.num_layers is None):
        tokenizer = tokenizer_if_reachable(config.teacher) if config.teacher.path is not None else None
    else:
        tokenizer = None
    teacher, student = look_at(config.teacher, config.student, tokenizer)
    if teacher is None or student is None:
        return ["a model cannot be looked at here, so that time and memory are not known"]
    stages = plan_stages(config, known.rows.num_rows)
    gpu = config.scaling.use_gpu
    flops = CPU_SHARE * measured_flops() if not gpu else measured_flops()
    cost = estimate(config, stages, known.rows, (teacher, student), flops)
    cached = cache_bytes(config, [known.rows]) if config.distill.teacher_cache != "none" else 0
    train, live = config.train, config.distill.teacher_cache == "none"
    budget = train.micro_batch_tokens
    memory = WorkerMemory(
        train.precision,
        train.zero_stage,
        config.scaling.max_workers,
        math.ceil(budget / config.data.max_tokens) if isinstance(budget, int) else train.rows_at_once,
        config.student.gradient_checkpointing,
        train.offload_optimizer == "cpu",
    ).num_bytes(
        student,
        teacher.num_weights if live else teacher.size.head_weights,
        config.data.max_tokens,
        config.distill.chunk_mib,
    )
    disk = cost.checkpoint_bytes + (cached or 0)
    cache = "an unknown part of it" if cached is None else f"{cached / GIB:.2f} GiB of it"
    return [
        f"time    about {duration(cost.total_s)}, roughly: scoring {duration(cost.scoring_s)}, "
        f"training {duration(cost.training_s)}, evaluation {duration(cost.evaluation_s)}, starts "
        f"{duration(cost.start_s)}; from FLOPs, the speed of this machine and {known.source}",
        f"memory  about {memory / GIB:.1f} GiB in each training worker",
        f"disk    about {disk / GIB:.2f} GiB, {cache} the teacher cache",
    ]


def dry_run(config: Config) -> None:
    """Print the steps that would run and why, the plan, and an estimate of time, memory and disk.

    Raises:
        UserError: A run of this config would be refused.
    """
    why = steps_to_run(config)
    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("step", "", "what", "why"):
        table.add_column(heading)
    for name, reason in why.items():
        table.add_row(
            name, "done" if reason == DONE else "runs", STEPS[name].what, "" if reason == DONE else escape(reason)
        )
    console.print(table)
    place = RunDirectory.open(config.storage_path, config.name, create=False)
    if changed_keys(config, place) and any(map(place.exists, COSTLY)):
        console.print(f"note: {place.uri} has another config: a run needs --resume-with-changes, or another name")
    print_plan(config, None, opens_storage=True)
    if all(reason == DONE for reason in why.values()):
        console.print("nothing would run: every step is done")
        return
    try:
        for line in _cost_lines(config):
            console.print(line)
    except UserError as error:
        console.print(f"note: no estimate of time and memory: {error}")
    console.print("nothing was written")
