"""The schedule: a pure function of the config and the number of rows that returns the stages."""

from __future__ import annotations

import math
from dataclasses import replace

from pocl_ray.config import Config, ControlConfig, CurriculumConfig, ScheduleConfig
from pocl_ray.curriculum.buckets import bucket_ends
from pocl_ray.curriculum.pacing import PACINGS
from pocl_ray.errors import ConfigError
from pocl_ray.records import Stage


def plan_stages(config: Config, num_rows: int) -> tuple[Stage, ...]:
    """Return the stages of the curriculum (POCL, algorithm 1 and equations 6 to 8).

    Raises:
        ConfigError: There are more buckets than rows, a stage is too small for one global batch, or the stages before
            the last take all of `curriculum.num_steps`.
    """
    curriculum = config.curriculum
    ends = bucket_ends(num_rows, curriculum.num_buckets)
    admitted = PACINGS[curriculum.pacing](curriculum.num_buckets)
    temperatures = scheduled(curriculum.kd_temperature, len(admitted))
    ratios = scheduled(curriculum.kd_ratio, len(admitted))
    stages = []
    for index, buckets in enumerate(admitted):
        first, end = (ends[buckets[0] - 1] if buckets[0] else 0), ends[buckets[-1]]
        stages.append(
            Stage(
                index=index,
                buckets=buckets,
                first_rank=first,
                end_rank=end,
                num_epochs=curriculum.interval_epochs,
                steps_per_epoch=_steps_per_epoch(end - first, config.train.global_batch_rows, f"stage {index}"),
                kd_temperature=temperatures[index],
                kd_ratio=ratios[index],
                restart_optimizer=True,
                lr_first_step=0,
                lr_num_steps=0,
            )
        )
    if curriculum.num_steps is not None:
        stages[-1] = _fill(stages, curriculum.num_steps)
    return _with_lr(stages, curriculum)


def plan_control(stages: tuple[Stage, ...], control: ControlConfig) -> tuple[Stage, ...]:
    """Return plain distillation on all rows, at the number of optimizer steps that `stages` take together."""
    last = max(stages, key=lambda s: s.end_rank)
    num_steps = sum(s.num_steps for s in stages)
    num_epochs = math.ceil(num_steps / last.steps_per_epoch)
    return (
        replace(
            last,
            index=0,
            first_rank=0,
            num_epochs=num_epochs,
            max_steps=num_steps,
            kd_temperature=control.kd_temperature,
            kd_ratio=control.kd_ratio,
            restart_optimizer=True,
            lr_first_step=0,
            lr_num_steps=num_steps,
        ),
    )


def plan_sft(
    num_rows: int, num_epochs: int, max_steps: int | None, global_batch_rows: int, key: str
) -> tuple[Stage, ...]:
    """Return the one stage of supervised fine-tuning: all rows, no teacher.

    Raises:
        ConfigError: There are fewer rows than one global batch holds; `key` names the section at fault.
    """
    per_epoch = _steps_per_epoch(num_rows, global_batch_rows, key)
    stage = Stage(
        index=0,
        buckets=(0,),
        first_rank=0,
        end_rank=num_rows,
        num_epochs=num_epochs,
        steps_per_epoch=per_epoch,
        kd_temperature=1.0,
        kd_ratio=0.0,
        restart_optimizer=True,
        lr_first_step=0,
        lr_num_steps=0,
        max_steps=max_steps,
    )
    return (replace(stage, lr_num_steps=stage.num_steps),)


def scheduled(schedule: ScheduleConfig, num_stages: int) -> tuple[float, ...]:
    """Return a schedule's value for each stage.

    With stage k of n and s = k / (n - 1): linear is start + s (end - start), cosine is
    start + (1 - cos(pi s)) / 2 (end - start). A single stage takes the start of a linear or cosine schedule.
    """
    if schedule.values is not None:
        if len(schedule.values) != num_stages:
            raise ConfigError(f"a schedule lists {len(schedule.values)} values, but there are {num_stages} stages")
        return schedule.values
    assert schedule.start is not None
    start, end = schedule.start, schedule.start if schedule.end is None else schedule.end
    values = []
    for stage in range(num_stages):
        share = stage / (num_stages - 1) if num_stages > 1 else 0.0
        if schedule.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        value = start + share * (end - start)
        values.append(value if schedule.decimals is None else round(value, schedule.decimals))
    return tuple(values)


def _fill(stages: list[Stage], num_steps: int) -> Stage:
    """Return the last stage, as long as it takes to make `num_steps` of all stages."""
    *earlier, last = stages
    taken = sum(stage.num_steps for stage in earlier)
    left = num_steps - taken
    if left < 1:
        raise ConfigError(
            f"curriculum.num_steps: the stages before the last take {taken} optimizer steps, which leaves it none of "
            f"{num_steps}; raise it, or lower curriculum.num_buckets or curriculum.interval_epochs"
        )
    return replace(last, num_epochs=math.ceil(left / last.steps_per_epoch), max_steps=left)


def _steps_per_epoch(num_rows: int, global_batch_rows: int, where: str) -> int:
    if num_rows < global_batch_rows:
        raise ConfigError(
            f"{where} has {num_rows} rows, fewer than one global batch of {global_batch_rows}; "
            "lower train.global_batch_rows or curriculum.num_buckets"
        )
    return num_rows // global_batch_rows


def _with_lr(stages: list[Stage], curriculum: CurriculumConfig) -> tuple[Stage, ...]:
    if curriculum.optimizer == "restart":
        return tuple(replace(s, lr_num_steps=s.num_steps) for s in stages)
    total, done, placed = sum(s.num_steps for s in stages), 0, []
    for stage in stages:
        placed.append(replace(stage, restart_optimizer=stage.index == 0, lr_first_step=done, lr_num_steps=total))
        done += stage.num_steps
    return tuple(placed)
