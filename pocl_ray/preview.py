"""`pocl-ray plan`: the stages and the size of the teacher cache, before anything is started."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from pocl_ray.config import Config
from pocl_ray.curriculum.schedule import plan_control, plan_stages
from pocl_ray.records import RowsSummary, Stage
from pocl_ray.storage import RunDirectory


def print_plan(config: Config, num_rows: int | None) -> None:
    """Print the curriculum for the given number of training rows.

    Args:
        config: The run.
        num_rows: Training rows; None takes those that the run has prepared, else counts the source's.
    """
    console = Console(highlight=False, soft_wrap=True)
    prepared = _prepared(config)
    if num_rows is None:
        num_rows = prepared["train"].num_rows if "train" in prepared else _count(config)
    stages = plan_stages(config, num_rows)
    num_steps = sum(stage.num_steps for stage in stages)
    at_most = "at most " if config.curriculum.advance == "plateau" else ""
    console.print(_stage_table(stages))
    order = f"in an order drawn by seed {config.seed}" if stages[0].order == "random" else "by rank"
    console.print(
        f"{config.curriculum.pacing}: {num_rows} rows {order}, {at_most}{num_steps} optimizer steps of "
        f"{config.train.global_batch_rows} rows"
    )
    if config.control is not None:
        control = plan_control(config, num_rows, num_steps)
        console.print(f"control: plain distillation, {at_most}{sum(s.num_steps for s in control)} steps")
    console.print(_cache_line(config, prepared))


def _stage_table(stages: Sequence[Stage]) -> Table:
    """One line a stage; the places of its rows only where a stage does not begin with the first one."""
    shows_places = any(stage.first_rank for stage in stages)
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for name in ("stage", "buckets", "rows", *(["places"] if shows_places else []), "epochs", "steps"):
        table.add_column(name, justify="right")
    for name in ("kd_temperature", "kd_ratio", "optimizer"):
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
            _moving(stage.kd_temperature, stage.kd_temperature_at(stage.num_steps - 1)),
            _moving(stage.kd_ratio, stage.kd_ratio_at(stage.num_steps - 1)),
            "fresh" if stage.restart_optimizer else "goes on",
        )
    return table


def _moving(first: float, last: float) -> str:
    return f"{first:g}" if first == last else f"{first:.3g}..{last:.3g}"


def _prepared(config: Config) -> dict[str, RowsSummary]:
    run_dir = RunDirectory.open(config.storage_path, config.name, create=False)
    if not run_dir.exists("rows/summary.json"):
        return {}
    sets = run_dir.read_json("rows/summary.json")["sets"]
    return {name: RowsSummary(**fields) for name, fields in sets.items()}


def _count(config: Config) -> int:
    from pocl_ray.data.preparing import count_rows

    return count_rows(config.data)


def _cache_line(config: Config, prepared: dict[str, RowsSummary]) -> str:
    if config.distill.teacher_cache == "none":
        return "teacher cache: none, the teacher runs live"
    kind = _cache_kind(config)
    if kind is None:
        return "teacher cache: its size is known once the teacher's config can be read"
    hidden_size, itemsize = kind
    per_token = hidden_size * itemsize
    if not prepared:
        return f"teacher cache: {per_token:,} bytes a response token; its size is known once the rows are prepared"
    num_tokens = sum(prepared[name].num_response_tokens for name in ("train", "dev"))
    gib = num_tokens * per_token / 2**30
    return f"teacher cache: {gib:.2f} GiB for {num_tokens:,} response tokens of {hidden_size} x {itemsize} bytes"


def cache_bytes(config: Config, sets: Sequence[RowsSummary]) -> int | None:
    """Return what the teacher cache of some sets takes; None where the teacher's width cannot be told beforehand."""
    kind = _cache_kind(config)
    return None if kind is None else sum(made.num_response_tokens for made in sets) * kind[0] * kind[1]


def _cache_kind(config: Config) -> tuple[int, int] | None:
    """Width of the hidden states, and bytes of a number in the cache."""
    width = _teacher_width(config)
    return None if width is None else (width, 4 if config.distill.cache_dtype == "float32" else 2)


def _teacher_width(config: Config) -> int | None:
    """Return the width of the teacher's hidden states, where that can be told without the network."""
    if config.teacher.architecture is not None:
        width = config.teacher.architecture.get("hidden_size", config.teacher.architecture.get("n_embd"))
        return int(width) if width is not None else None
    assert config.teacher.path is not None
    file = Path(config.teacher.path).expanduser() / "config.json"
    if not file.is_file():
        return None
    import json

    content = json.loads(file.read_text(encoding="utf-8"))
    width = content.get("word_embed_proj_dim") or content.get("hidden_size") or content.get("n_embd")
    return int(width) if width is not None else None
