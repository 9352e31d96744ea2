"""The schedule: the stages of a curriculum, as a pure function of the config and the number of rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from pocl_ray.config import Config, CurriculumConfig, DistillConfig, RolloutConfig, ScheduleConfig
from pocl_ray.config.training import FRONTIER
from pocl_ray.curriculum.frontier import stage_steps
from pocl_ray.curriculum.pacing import PACINGS, admitted_rows, find_pacing
from pocl_ray.errors import ConfigError
from pocl_ray.records import Order, Ramp, Stage


def rescored_stages(slices: Sequence[tuple[int, int]], num_rows: int, order: Order, pacing: str) -> list[bool]:
    """Return for each stage whether the rows are ranked again before it, which they are if that can change its rows.

    The first stage uses the ranking by the untuned student. A stage of all rows needs no new ranking, since its rows
    are shuffled. An order that the seed draws needs none either.

    Args:
        slices: Rows of each stage, `(first, end)` in the order.
        num_rows: Number of all rows.
        order: Order that the slices refer to.
        pacing: Name of the rule.

    Raises:
        ConfigError: No stage would be ranked again.
    """
    rescored = [index > 0 and order == "rank" and tuple(part) != (0, num_rows) for index, part in enumerate(slices)]
    if not any(rescored):
        raise ConfigError(
            f"difficulty.rescore each_stage: with pacing {pacing} and a plan of {len(slices)} stages none after the "
            "first takes a part of the rows by rank, so nothing would be scored again; set it to never, or raise "
            "curriculum.num_buckets or change curriculum.pacing"
        )
    return rescored


def bucket_ends(num_rows: int, num_buckets: int) -> tuple[int, ...]:
    """Return the end of each bucket in the ranking, as cumulative row counts; bucket 0 is the easiest (section 3.3).

    Each bucket holds `floor(num_rows / num_buckets)` rows. The last one takes the remainder as well.

    Raises:
        ConfigError: There are more buckets than rows.
    """
    if num_buckets > num_rows:
        raise ConfigError(
            f"curriculum.num_buckets: {num_buckets} buckets cannot be made of {num_rows} rows; "
            f"set it to {num_rows} or less"
        )
    size = num_rows // num_buckets
    return (*(size * (k + 1) for k in range(num_buckets - 1)), num_rows)


MAX_STEPS = 10**9  # at ten a second, three years


def plan_stages(config: Config, num_rows: int) -> tuple[Stage, ...]:
    """Return the stages of the curriculum of a run, including the rankings between stages that the config asks for.

    Raises:
        UserError: As in `plan_curriculum`, `check_teachers` and `rescored_stages`.
    """
    train = config.train
    stages = plan_curriculum(config.curriculum, num_rows, train.global_batch_rows, train.lr_schedule == "wsd")
    stages = with_loss_ramps(stages, loss_schedules(config.distill, config.rollout))
    check_teachers(config, len(stages))
    if config.difficulty.rescore == "never":
        return stages
    slices = [(stage.first_rank, stage.end_rank) for stage in stages]
    rescored = rescored_stages(slices, num_rows, stages[0].order, config.curriculum.pacing)
    return tuple(replace(stage, rescore=again) for stage, again in zip(stages, rescored, strict=True))


def plan_curriculum(
    curriculum: CurriculumConfig, num_rows: int, batch_rows: int, lr_spans_run: bool = False
) -> tuple[Stage, ...]:
    """Return the stages of a curriculum (POCL, section 3.3).

    Args:
        curriculum: Buckets, pacing, schedules.
        num_rows: Number of ranked rows.
        batch_rows: Rows of an optimizer step over all workers.
        lr_spans_run: Whether the LR schedule is one over all stages, even where each starts with fresh moments.

    Raises:
        ConfigError: There are more buckets than rows, a stage is too small for one global batch, a list of values does
            not have one value for each stage, or the stages before the last take all of `curriculum.num_steps`.
        UserError: A plug-in's rule fails or returns no slices of the rows.
    """
    ends = bucket_ends(num_rows, curriculum.num_buckets)
    pacing = find_pacing(curriculum.pacing)
    slices = admitted_rows(curriculum.pacing, pacing, _pacing_args(curriculum), ends)
    temperatures = scheduled(curriculum.kd_temperature, len(slices), "curriculum.kd_temperature")
    ratios = scheduled(curriculum.kd_ratio, len(slices), "curriculum.kd_ratio")
    stages = [
        Stage(
            index=index,
            buckets=_buckets_of(first, end, ends),
            first_rank=first,
            end_rank=end,
            num_epochs=curriculum.interval_epochs,
            steps_per_epoch=_steps_per_epoch(end - first, batch_rows, f"stage {index}"),
            kd_temperature=temperatures[index],
            kd_ratio=ratios[index],
            restart_optimizer=True,
            lr_first_step=0,
            lr_num_steps=0,
            order=pacing.order,
            min_epochs=curriculum.plateau.min_epochs if curriculum.advance == "plateau" else None,
        )
        for index, (first, end) in enumerate(slices)
    ]
    if pacing.steps_of is not None:
        sizes = [end - first for first, end in pacing.steps_of(ends)]
        num_steps = sum(size // batch_rows for size in sizes) * curriculum.interval_epochs
        if pacing.order == FRONTIER:
            stages = _equal_stages(stages, curriculum.num_steps or num_steps)
        else:
            stages = [_with_steps(stage, num_steps) for stage in stages]
    _check_length(stages)
    if curriculum.num_steps is not None and pacing.order != FRONTIER:
        stages[-1] = _fill(stages, curriculum.num_steps)
    return _with_ramps(_with_lr(stages, curriculum, lr_spans_run), curriculum)


def _check_length(stages: Sequence[Stage]) -> None:
    num_steps = sum(stage.num_steps for stage in stages)
    if num_steps > MAX_STEPS:
        raise ConfigError(
            f"curriculum: its stages have {num_steps:,} optimizer steps together, and no run comes to the end of more "
            f"than {MAX_STEPS:,}; lower curriculum.interval_epochs, or give curriculum.num_steps"
        )


def _pacing_args(curriculum: CurriculumConfig) -> Mapping[str, Any]:
    is_frontier = curriculum.pacing == FRONTIER
    return {"num_stages": curriculum.frontier.num_stages} if is_frontier else curriculum.pacing_args


def _equal_stages(stages: list[Stage], num_steps: int) -> list[Stage]:
    """The stages of frontier pacing: each has one epoch, of the samples that it draws."""
    if num_steps < len(stages):
        raise ConfigError(
            f"curriculum.frontier.num_stages: {len(stages)} stages cannot be made of {num_steps} optimizer steps; "
            f"set it to {num_steps} or less"
        )
    lengths = stage_steps(num_steps, len(stages))
    return [replace(s, num_epochs=1, steps_per_epoch=n) for s, n in zip(stages, lengths, strict=True)]


def check_teachers(config: Config, num_stages: int) -> None:
    """Check that each stage has a teacher, and that teachers name only stages that exist.

    Raises:
        ConfigError: A stage has no teacher, or a named stage does not exist.
    """
    teacher_outputs: set[int] = set()
    for place, teacher in enumerate((config.teacher, *config.other_teachers)):
        stages = teacher.stages_of(num_stages)
        teacher_outputs.update(range(num_stages) if stages is None else stages)
        if stages is not None and max(stages) >= num_stages:
            key = "teacher.stages" if place == 0 else f"other_teachers.{place - 1}.stages"
            raise ConfigError(f"{key}: there is no stage {max(stages)}; the stages are 0 to {num_stages - 1}")
    missing = sorted(set(range(num_stages)) - teacher_outputs)
    if missing:
        raise ConfigError(f"teacher.stages, other_teachers: stage {missing[0]} has no teacher; add it to one's stages")


def check_curriculum(
    curriculum: CurriculumConfig, rescores: bool = False, losses: Mapping[str, ScheduleConfig] | None = None
) -> None:
    """Check the curriculum on a made-up number of rows, before anything is prepared.

    Args:
        curriculum: Section of the config.
        rescores: Whether rows are ranked again between stages.
        losses: Schedules of the losses' parameters, of `loss_schedules`.

    Raises:
        UserError: The rule is unknown or fails, a list of values does not have one value for each stage, or ranking
            again would change nothing.
    """
    ends = tuple(1000 * (bucket + 1) for bucket in range(curriculum.num_buckets))
    pacing = find_pacing(curriculum.pacing)
    slices = admitted_rows(curriculum.pacing, pacing, _pacing_args(curriculum), ends)
    if curriculum.pacing in PACINGS:  # a plug-in's number of stages may depend on the rows
        scheduled(curriculum.kd_temperature, len(slices), "curriculum.kd_temperature")
        scheduled(curriculum.kd_ratio, len(slices), "curriculum.kd_ratio")
        for key, schedule in (losses or {}).items():
            scheduled(schedule, len(slices), key)
        if rescores:
            rescored_stages(slices, ends[-1], pacing.order, curriculum.pacing)


def plan_control(config: Config, num_rows: int, num_steps: int) -> tuple[Stage, ...]:
    """Return the one stage of plain distillation on all rows, with as many optimizer steps as the curriculum.

    A parameter of the loss that moves by stage moves by step here, from its first value to its last.
    """
    control, batch_rows = config.control, config.train.global_batch_rows
    assert control is not None, "the config asks for a control"
    plain = _one_stage(num_rows, batch_rows, "control", control.kd_temperature, control.kd_ratio)
    plain = replace(plain, buckets=tuple(range(config.curriculum.num_buckets)))
    stages = (replace(_with_steps(plain, num_steps), lr_num_steps=num_steps),)
    schedules = loss_schedules(config.distill, config.rollout)
    return with_loss_ramps(stages, {key: s.model_copy(update={"by": "step"}) for key, s in schedules.items()})


def plan_sft(
    num_rows: int, num_epochs: int, max_steps: int | None, global_batch_rows: int, key: str
) -> tuple[Stage, ...]:
    """Return the one stage of supervised fine-tuning: all rows, no teacher.

    Raises:
        ConfigError: There are fewer rows than one global batch holds; `key` names the section at fault.
    """
    stage = _one_stage(num_rows, global_batch_rows, key, kd_temperature=1.0, kd_ratio=0.0)
    stage = replace(stage, num_epochs=num_epochs, max_steps=max_steps)
    return (replace(stage, lr_num_steps=stage.num_steps),)


def loss_schedules(distill: DistillConfig, rollout: RolloutConfig) -> dict[str, ScheduleConfig]:
    """Return the parameters of the losses that move over the run, by their keys in the config."""
    sections = {"distill": distill.loss_args, "rollout": rollout.loss_args if rollout.is_on else {}}
    return {
        f"{section}.loss_args.{name}": value
        for section, args in sections.items()
        for name, value in args.items()
        if isinstance(value, ScheduleConfig)
    }


def with_loss_ramps(stages: Sequence[Stage], schedules: Mapping[str, ScheduleConfig]) -> tuple[Stage, ...]:
    """Return the stages of a run with the losses' parameters that move over it.

    Args:
        stages: All stages of the run, in order.
        schedules: Schedules by key, of `loss_schedules`.

    Raises:
        ConfigError: A list does not have one value for each stage.
    """
    total, done, placed = sum(stage.num_steps for stage in stages), 0, []
    values = {key: scheduled(schedule, len(stages), key) for key, schedule in schedules.items()}
    for index, stage in enumerate(stages):
        ramps = tuple(
            (key, Ramp(_points(one), _shape(one), total, done) if one.by == "step" else _held(values[key][index]))
            for key, one in schedules.items()
        )
        placed.append(replace(stage, loss_ramps=ramps))
        done += stage.num_steps
    return tuple(placed)


def _held(value: float) -> Ramp:
    """The ramp of a value that stays the same."""
    return Ramp((value,), "linear", 1)


def scheduled(schedule: ScheduleConfig, num_stages: int, key: str = "a schedule") -> tuple[float, ...]:
    """Return a schedule's value for each stage; a schedule by step gives the value of the run's first step.

    With stage k of n and s = k / (n - 1): linear is start + s (end - start), cosine is
    start + (1 - cos(pi s)) / 2 (end - start). A single stage takes the start of a linear or cosine schedule.

    Raises:
        ConfigError: A list does not have one value for each stage; `key` names it.
    """
    if schedule.by == "step":
        return (_points(schedule)[0],) * num_stages
    if schedule.values is not None:
        if len(schedule.values) != num_stages:
            there = "there is 1 stage" if num_stages == 1 else f"there are {num_stages} stages"
            raise ConfigError(
                f"{key} lists {len(schedule.values)} values, but {there}; list one for each, or give start and end"
            )
        return schedule.values
    ramp = Ramp(_points(schedule), _shape(schedule), num_stages)
    values = [ramp.at(stage) for stage in range(num_stages)]
    return tuple(value if schedule.decimals is None else round(value, schedule.decimals) for value in values)


def _points(schedule: ScheduleConfig) -> tuple[float, ...]:
    if schedule.values is not None:
        return schedule.values
    assert schedule.start is not None
    return (schedule.start,) if schedule.end is None else (schedule.start, schedule.end)


def _shape(schedule: ScheduleConfig) -> Literal["linear", "cosine"]:
    return "cosine" if schedule.shape == "cosine" else "linear"


def _buckets_of(first: int, end: int, ends: Sequence[int]) -> tuple[int, ...]:
    """The buckets whose rows are in a slice."""
    starts = [0, *ends[:-1]]
    return tuple(b for b, (low, high) in enumerate(zip(starts, ends, strict=True)) if low < end and first < high)


def _one_stage(num_rows: int, batch_rows: int, where: str, kd_temperature: float, kd_ratio: float) -> Stage:
    return Stage(
        index=0,
        buckets=(0,),
        first_rank=0,
        end_rank=num_rows,
        num_epochs=1,
        steps_per_epoch=_steps_per_epoch(num_rows, batch_rows, where),
        kd_temperature=kd_temperature,
        kd_ratio=kd_ratio,
        restart_optimizer=True,
        lr_first_step=0,
        lr_num_steps=0,
    )


def _fill(stages: list[Stage], num_steps: int) -> Stage:
    """Return the last stage, with the length at which all stages together take `num_steps`."""
    *earlier, last = stages
    taken = sum(stage.num_steps for stage in earlier)
    left = num_steps - taken
    if left < 1:
        raise ConfigError(
            f"curriculum.num_steps: the stages before the last take {taken} optimizer steps, which leaves it none of "
            f"{num_steps}; raise it, or lower curriculum.num_buckets or curriculum.interval_epochs"
        )
    return _with_steps(last, left)


def _steps_per_epoch(num_rows: int, global_batch_rows: int, where: str) -> int:
    if num_rows < global_batch_rows:
        raise ConfigError(
            f"{where} has {num_rows} rows, fewer than one global batch of {global_batch_rows}; "
            "lower train.global_batch_rows or curriculum.num_buckets"
        )
    return num_rows // global_batch_rows


def _with_steps(stage: Stage, num_steps: int) -> Stage:
    """The stage, with its epochs repeated until it has taken `num_steps`."""
    return replace(stage, num_epochs=math.ceil(num_steps / stage.steps_per_epoch), max_steps=num_steps)


def _with_ramps(stages: Sequence[Stage], curriculum: CurriculumConfig) -> tuple[Stage, ...]:
    """The stages with values that move by step, if the config asks for that, over exactly the steps of the plan."""
    total, done, placed = sum(stage.num_steps for stage in stages), 0, []
    for stage in stages:
        for key in ("kd_temperature", "kd_ratio"):
            schedule = getattr(curriculum, key)
            if schedule.by == "step":
                ramp = Ramp(_points(schedule), _shape(schedule), total, done)
                changes: dict[str, Any] = {key: ramp.at(0), f"{key}_ramp": ramp}
                stage = replace(stage, **changes)
        placed.append(stage)
        done += stage.num_steps
    return tuple(placed)


def _with_lr(stages: list[Stage], curriculum: CurriculumConfig, spans_run: bool) -> tuple[Stage, ...]:
    restarts = curriculum.optimizer == "restart"
    total, done, placed = sum(s.num_steps for s in stages), 0, []
    for stage in stages:
        first, length = (0, stage.num_steps) if restarts and not spans_run else (done, total)
        is_fresh = restarts or stage.index == 0
        placed.append(replace(stage, restart_optimizer=is_fresh, lr_first_step=first, lr_num_steps=length))
        done += stage.num_steps
    return tuple(placed)
