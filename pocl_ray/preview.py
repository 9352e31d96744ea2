"""The command `pocl-ray plan`: the stages and the size of the teacher cache, before anything is started.

It answers at once, so it loads no torch, Ray or network library, and it opens no object store: of a run directory it
reads what lies on this machine. What few configs need is imported where it is used.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from pocl_ray.arms import Race, plan_race
from pocl_ray.config import Config, DistillConfig, TeacherConfig, TrainConfig
from pocl_ray.config.race import RACE
from pocl_ray.config.training import FRONTIER
from pocl_ray.curriculum.schedule import plan_control, plan_stages
from pocl_ray.data.row_counts import told_cuts, told_rejects
from pocl_ray.difficulty.choice import choose_signals
from pocl_ray.difficulty.measured import passes_of
from pocl_ray.difficulty.scoring_cost import scoring_lines
from pocl_ray.distill.loss_table import KNOWN, check_losses
from pocl_ray.errors import ModelError, StorageError
from pocl_ray.fingerprints import any_training_reads_teacher
from pocl_ray.models.shapes import config_on_this_machine
from pocl_ray.records import RowsSummary, Stage
from pocl_ray.run_directory.paths import is_remote, local_path
from pocl_ray.teacher_cache.layout import ITEM_BYTES, Layout, estimate_bytes

ROWS = "rows/summary.json"


def print_plan(config: Config, num_rows: int | None, opens_storage: bool = False) -> None:
    """Print the curriculum for the given number of training rows.

    Args:
        config: Config of the run.
        num_rows: Number of training rows; None takes the rows that the run has prepared, or else counts the source's.
        opens_storage: Whether a run directory on an object store is read as well.

    Raises:
        UserError: The loss, a signal or the curriculum is unknown or cannot work, or there are no rows to count.
    """
    choose_signals(config.difficulty)
    check_losses(config.distill, config.rollout)
    console = Console(highlight=False, soft_wrap=True)
    prepared = _prepared_if_reachable(config, console, opens_storage)
    if num_rows is None:
        num_rows = prepared["train"].num_rows if "train" in prepared else _count(config)
    stages = plan_stages(config, num_rows)
    num_steps = sum(stage.num_steps for stage in stages)
    at_most = "at most " if config.curriculum.advance == "plateau" else ""
    console.print(_stage_table(stages))
    orders = {"random": f"in an order drawn by seed {config.seed}", "frontier": "drawn by their gaps"}
    order = orders.get(stages[0].order, "by rank")
    console.print(
        f"{config.curriculum.pacing}: {num_rows} rows {order}, {at_most}{num_steps} optimizer steps of "
        f"{config.train.global_batch_rows} rows"
    )
    for is_warning, line in (*told_rejects(prepared.values()), *told_cuts(prepared.values())):
        console.print(f"{'warning' if is_warning else 'note'}: {line}")
    if adapted := _adapted(config):
        console.print(adapted)
    rescored = [str(stage.index) for stage in stages if stage.rescore]
    if rescored:
        console.print(f"the current student ranks the rows again before stage {', '.join(rescored)}")
    if config.train.average != "none":
        console.print(average_note(config.train))
    for line in frontier_notes(config, stages):
        console.print(line)
    race = plan_race(config, num_rows) if config.curriculum.pacing == RACE else None
    for line in () if race is None else race_notes(race):
        console.print(line)
    if config.data.task == "text" and not prepared:
        console.print("counted are texts; those longer than data.max_tokens become several rows once they are prepared")
    if config.control is not None:
        control = plan_control(config, num_rows, num_steps)
        console.print(f"control: plain distillation, {at_most}{sum(s.num_steps for s in control)} steps")
        if config.control.seeds:
            num_pairs = len(config.control.seeds)
            console.print(f"pairs: both trained again on {num_pairs} seeds, {2 * num_pairs * num_steps:,} steps more")
    _print_models_work(config, console, stages, prepared, race)


def _print_models_work(
    config: Config, console: Console, stages: Sequence[Stage], prepared: dict[str, RowsSummary], race: Race | None
) -> None:
    """Print what scoring computes, the sizes of the caches, and whether the student writes during training."""
    is_taught = any_training_reads_teacher(config, stages)
    fills_cache = is_taught and config.distill.teacher_cache != "none"
    arms = () if race is None else [arm.config for arm in race.arms.values()]
    passes = passes_of(config, fills_cache, arms)
    earlier = _earlier_scoring(config) if prepared else None
    for line in scoring_lines(config, passes, stages[-1].end_rank, prepared, fills_cache, earlier):
        console.print(line)
    if not is_taught:
        console.print("teacher cache: none, since kd_ratio is 0 throughout")
        return
    for_teacher = prepared_sets(config, for_teacher=True) if prepared else {}
    for place, teacher in enumerate((config.teacher, *config.other_teachers), start=1):
        name = "teacher cache" if place == 1 else f"teacher cache {place}"
        console.print(f"{name}: {_cache_size(config, teacher, for_teacher)}")
    if config.rollout.is_on:
        console.print(f"rollouts: mode {config.rollout.mode}, the student writes responses during training")


def average_note(train: TrainConfig) -> str:
    """Return what is averaged, for a run that keeps an average of the weights."""
    of = {
        "ema": f"the exponential average of the weights, decay {train.average_decay:g}",
        "last_k": f"the mean of the weights at the last {train.average_last} evaluations of a stage",
    }
    return f"dev figures and the trained student are of {of[train.average]}"


def frontier_notes(config: Config, stages: Sequence[Stage]) -> list[str]:
    """Return notes on the cost of frontier pacing, and on gaps that are not the loss; empty for other rules."""
    if stages[0].order != FRONTIER:
        return []
    frontier, num_rows = config.curriculum.frontier, stages[0].num_rows
    notes = []
    if frontier.refresh == "training":
        notes.append("gaps are refreshed by training itself: no further pass over the rows")
    else:
        read = min(num_rows, frontier.rescore_rows or num_rows) * (len(stages) - 1)
        # A step is a forward and a backward pass; the backward pass takes twice the work.
        trained = sum(stage.num_steps for stage in stages) * config.train.global_batch_rows
        notes.append(
            f"gaps are refreshed by {read:,} forward passes of rows before stages 1 to {len(stages) - 1}: about "
            f"{read / (3 * trained):.0%} of the FLOPs of training, and about as much of its time"
        )
    if config.distill.loss not in KNOWN:
        notes.append(f"loss {config.distill.loss} is a plug-in's: gaps stay KL(teacher || student)")
    if config.distill.teacher_cache == "topk":
        notes.append("the teacher's cache holds its top k alone: gaps in training are lower bounds of the KL")
    return notes


def race_notes(race: Race) -> list[str]:
    """Return the arms, rungs and cost of a race, in lines."""
    plan, notes = race.plan, []
    for arm in race.arms.values():
        keys = ", ".join(f"{key} {value}" for key, value in arm.overrides.items()) or "plain distillation, as above"
        notes.append(f"arm {arm.name}: {keys}")
    running = plan.num_arms
    for rung in plan.rungs:
        last = "the last one is handed out" if rung.num_left == 1 else f"at most {rung.num_left} go on"
        notes.append(f"rung at step {rung.step} ({rung.step / plan.num_steps:.0%}): at most {running} arms, {last}")
        running = rung.num_left
    most, least = plan.most_steps / plan.num_steps, plan.least_steps / plan.num_steps
    notes.append(
        f"race: at most {plan.most_steps:,} optimizer steps, {most:.2f} times a plain run, and as many FLOPs of "
        f"training; {plan.least_steps:,} ({least:.2f}) if the first rung leaves plain distillation alone; scored once"
    )
    for arm in race.arms.values():
        refreshes = frontier_notes(arm.config, arm.stages)
        notes += [f"{arm.name}: {note}" for note in refreshes if "forward passes" in note]
    return notes


def _stage_table(stages: Sequence[Stage]) -> Table:
    """A table with one line for each stage; it has the places of rows only if a stage does not begin at the first."""
    shows_places = any(stage.first_rank for stage in stages)
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for name in ("stage", "buckets", "rows", *(["places"] if shows_places else []), "epochs", "steps"):
        table.add_column(name, justify="right")
    for name in (*stages[0].moving.values(), "optimizer"):
        table.add_column(name, justify="right")
    for stage in stages:
        first, last = stage.buckets[0], stage.buckets[-1]
        table.add_row(
            str(stage.index),
            str(first) if first == last else f"{first}-{last}",
            str(stage.num_rows),
            *([f"{stage.first_rank + 1}-{stage.end_rank}"] if shows_places else []),
            str(stage.num_epochs) if stage.min_epochs is None else f"{stage.min_epochs}-{stage.num_epochs}",
            str(stage.num_steps) if stage.min_epochs is None else f"<= {stage.num_steps}",
            *(_moving(*(stage.setting_at(key, step) for step in (0, stage.num_steps - 1))) for key in stage.moving),
            "fresh" if stage.restart_optimizer else "goes on",
        )
    return table


def _moving(first: float, last: float) -> str:
    return f"{first:g}" if first == last else f"{first:.3g}..{last:.3g}"


def _prepared_if_reachable(config: Config, console: Console, opens_storage: bool) -> dict[str, RowsSummary]:
    """The sets that the run has prepared; none where its storage cannot be reached, which a plan does not need."""
    if is_remote(config.storage_path) and not opens_storage:
        console.print(
            f"note: planned without the rows of the run directory, since plan does not open {config.storage_path}; "
            "pocl-ray run --dry-run reads them"
        )
        return {}
    try:
        return prepared_sets(config)
    except StorageError as error:
        console.print(f"note: planned without the rows of the run directory, which cannot be reached: {error}")
        return {}


def prepared_sets(config: Config, for_teacher: bool = False) -> dict[str, RowsSummary]:
    """Return the sets that the run has prepared; empty if there are none yet.

    Args:
        config: Config of the run.
        for_teacher: Whether to return them in the tokens of a teacher with its own tokenizer.

    Raises:
        StorageError: The storage cannot be reached.
    """
    storage = config.storage_path
    if not is_remote(storage) and not (local_path(storage) / config.name / ROWS).exists():
        return {}
    from pocl_ray.run_directory.storage import RunDirectory

    run_dir = RunDirectory.open(storage, config.name, create=False)
    if not run_dir.exists(ROWS):
        return {}
    content = run_dir.read_json(ROWS)
    sets, answered = content["sets"], "responses/summary.json"
    if for_teacher and "for_teacher" in content:
        sets, answered = content["for_teacher"], "responses/for_teacher/summary.json"
    if config.data.responses == "teacher" and run_dir.exists(answered):
        sets["train"] = run_dir.read_json(answered)
    return {name: RowsSummary(**fields) for name, fields in sets.items()}


def _earlier_scoring(config: Config) -> dict[str, Any] | None:
    """The entry of a finished scoring in the manifest of a run directory on this machine."""
    if is_remote(config.storage_path):
        return None
    try:
        text = (local_path(config.storage_path) / config.name / "manifest.json").read_text(encoding="utf-8")
        entry = json.loads(text)["steps"]["scores"]
        return entry if entry["status"] == "done" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a plan needs none


def _adapted(config: Config) -> str | None:
    """A line on the share of the student that its adapters change, if the model's config lies on this machine."""
    student, origin = config.student, config.teacher if config.student.num_layers is not None else config.student
    if student.lora is None or (origin.path is not None and not (local_path(origin.path) / "config.json").is_file()):
        return None
    from pocl_ray.models.prepare import adapter_coverage

    covered = adapter_coverage(config.teacher, student)
    return f"{'warning' if covered.is_little else 'note'}: {covered}"


def _count(config: Config) -> int:
    from pocl_ray.data.sources import count_rows

    return count_rows(config.data)


def _cache_size(config: Config, teacher: TeacherConfig, prepared: dict[str, RowsSummary]) -> str:
    if config.distill.teacher_cache == "none":
        return "none, the teacher runs live"
    layout = _cache_layout(config.distill, teacher)
    if layout is None:
        return "its size is known once the teacher's config can be read"
    if not prepared:
        return f"{layout.row_bytes:,} bytes a response token; its size is known once the rows are prepared"
    if config.data.responses == "teacher" and prepared["train"].path.startswith("rows/"):
        return f"{layout.row_bytes:,} bytes a response token; its size is known once the teacher has written"
    num_tokens = sum(prepared[name].num_response_tokens for name in ("train", "dev"))
    gib = estimate_bytes(num_tokens, layout) / 2**30
    what = f"{layout.width} x {ITEM_BYTES[layout.dtype]} bytes" if layout.kind == "hidden" else str(layout)
    return f"{gib:.2f} GiB for {num_tokens:,} response tokens of {what}"


def cache_bytes(config: Config, sets: Sequence[RowsSummary]) -> int | None:
    """Return the bytes that the teacher caches of some sets take; None if a teacher's width is not known beforehand."""
    layouts = [_cache_layout(config.distill, teacher) for teacher in (config.teacher, *config.other_teachers)]
    num_tokens = sum(made.num_response_tokens for made in sets)
    sizes = [estimate_bytes(num_tokens, layout) for layout in layouts if layout is not None]
    return sum(sizes) if len(sizes) == len(layouts) else None


def _cache_layout(distill: DistillConfig, teacher: TeacherConfig) -> Layout | None:
    """The layout of a token's record; the teacher's own dtype is assumed to be bfloat16."""
    if distill.teacher_cache == "topk":
        return Layout("topk", "float32" if distill.cache_dtype == "float32" else "float16", distill.top_k)
    width = _teacher_width(teacher)
    dtype = "bfloat16" if distill.cache_dtype == "auto" else distill.cache_dtype
    return None if width is None else Layout("hidden", dtype, width)


def _teacher_width(teacher: TeacherConfig) -> int | None:
    """The width of the teacher's hidden states; None if it is not known without the network."""
    if teacher.architecture is not None:
        width = teacher.architecture.get("hidden_size", teacher.architecture.get("n_embd"))
        return int(width) if width is not None else None
    content = config_on_this_machine("teacher", teacher)
    if content is None:
        return None
    width = content.get("word_embed_proj_dim") or content.get("hidden_size") or content.get("n_embd")
    try:
        return int(width) if width is not None else None
    except (TypeError, ValueError) as error:
        raise ModelError(f"teacher.path: {teacher.path}/config.json: is no config of a model ({error})") from None
