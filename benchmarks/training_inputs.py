"""Everything a training reads, written to a folder: models, tokenizer, rows, teacher cache, and the task itself.

`orchestration.py`, `trl_step.py` and `first_step.py` train on it through `run_training`, or through the loop of a
worker without Ray (`loop_of`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from step_sides import Row
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl_ray.config import (
    DataConfig,
    DistillConfig,
    GenerationConfig,
    PlateauConfig,
    RolloutConfig,
    SourceConfig,
    TrainConfig,
)
from pocl_ray.data.prepare import prepare_all
from pocl_ray.data.row_store import ROWS_SCHEMA, RowStore
from pocl_ray.data.rows import arrow_writer, summarize_rows
from pocl_ray.distill.loop import LoopHooks, TrainingLoop
from pocl_ray.distill.task import TeacherTask, TrainTask
from pocl_ray.models.heads import response_hidden
from pocl_ray.models.places import ModelRef
from pocl_ray.models.saving import save_model
from pocl_ray.records import RowsSummary, Stage
from pocl_ray.run_directory.storage import RunDirectory
from pocl_ray.teacher_cache.writer import write_index, write_shard

TEACHER, CACHE = "the teacher", "cache"


def real_rows(
    path: Path, tokenizer: PreTrainedTokenizerBase, num_rows: int, scratch: Path, max_tokens: int = 512
) -> list[Row]:
    """Return the first rows of a file as the package reads them: its prompt template, its cuts, its end of answers."""
    source = SourceConfig(path=str(path), max_rows=2 * num_rows)  # some may be unusable
    dev = SourceConfig(path=str(path), max_rows=2)
    template = "chat" if tokenizer.chat_template else "alpaca"
    data = DataConfig(train=source, dev=dev, prompt_template=template, max_prompt_tokens=256, max_tokens=max_tokens)
    run_dir = RunDirectory.open(str(scratch), "rows")
    made = prepare_all(data, tokenizer, 0, run_dir)
    store = RowStore.open(run_dir.local(made.train.path))
    prompts, responses = store.tokens(np.arange(min(num_rows, len(store))))
    return [
        Row(torch.tensor(np.concatenate([prompt, response]), dtype=torch.long), len(prompt))
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def write_task(
    run_dir: RunDirectory,
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    rows: Mapping[str, Sequence[Row]],
    stage: Stage,
    train: TrainConfig,
) -> TrainTask:
    """Write models, rows and teacher cache; return the task that trains one stage on them.

    Args:
        run_dir: Run directory, which has the tokenizer under `tokenizer`.
        models: The `teacher` and the `student`.
        tokenizer: Tokenizer that is saved next to each model.
        rows: The rows of `train` and `dev`.
        stage: The only stage.
        train: Batch, precision and optimizer.
    """
    refs = {
        name: ModelRef(str(save_model(model, tokenizer, run_dir.local(f"models/{name}"))))
        for name, model in models.items()
    }
    made = {}
    for name, some in rows.items():
        made[name] = _write_rows(run_dir, name, some)
        _write_cache(run_dir, models["teacher"], some, made[name])
    return TrainTask(
        name="distill",
        fingerprint="benchmark",
        run_dir=run_dir,
        stages=(stage,),
        student=refs["student"],
        teachers=(TeacherTask(refs["teacher"], cache=CACHE, fingerprint=TEACHER),),
        tokenizer="tokenizer",
        rows=made["train"],
        dev_rows=made["dev"],
        scores=None,
        train=train,
        distill=DistillConfig(),
        rollout=RolloutConfig(),
        hand_off="last",
        plateau=PlateauConfig(),
        dev_generation=GenerationConfig(sampling_temperature=0.0, max_new_tokens=1),
        max_dev_rows=1,
        max_tokens=1024,
        gradient_checkpointing=False,
        seed=0,
        collective_timeout_s=60.0,
        output="out",
        metrics="metrics.jsonl",
    )


def one_stage(num_rows: int, num_steps: int, kd_temperature: float, kd_ratio: float) -> Stage:
    """Return a stage of one epoch over all rows."""
    return Stage(0, (0,), 0, num_rows, 1, num_steps, kd_temperature, kd_ratio, True, 0, num_steps)


def with_live_teacher(task: TrainTask) -> TrainTask:
    """Return the task with the teacher in memory in place of its cache."""
    teachers = tuple(replace(teacher, cache=None) for teacher in task.teachers)
    return replace(task, teachers=teachers, distill=DistillConfig(teacher_cache="none"))


def loop_of(task: TrainTask, hooks: LoopHooks) -> TrainingLoop:
    """Return the loop of the only worker, with DeepSpeed and without Ray, in this process."""
    import torch.distributed as dist

    from pocl_ray.distill.setup import set_up_loop

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed looks for it
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return set_up_loop(task, device, hooks)


def _write_rows(run_dir: RunDirectory, name: str, rows: Sequence[Row]) -> RowsSummary:
    """Write rows as the file of prepared rows that the feed reads."""
    prompts = [row.ids_T[: row.num_prompt_tokens].tolist() for row in rows]
    responses = [row.ids_T[row.num_prompt_tokens :].tolist() for row in rows]
    numbers, texts = np.arange(len(rows)), ["random"] * len(rows)
    columns: list[Any] = [numbers, numbers + 1, [None] * len(rows), texts, [[text] for text in texts]]
    arrays = [
        pa.array(column, type=field.type)
        for column, field in zip([*columns, prompts, responses], ROWS_SCHEMA, strict=True)
    ]
    path = run_dir.local(f"rows/{name}.arrow")
    with arrow_writer(path, ROWS_SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=ROWS_SCHEMA))
    return summarize_rows(name, path, 0)


@torch.no_grad()
def _write_cache(run_dir: RunDirectory, teacher: PreTrainedModel, rows: Sequence[Row], made: RowsSummary) -> None:
    hidden = []
    for row in rows:
        ids_BT = row.ids_T[None].to(teacher.device)
        index_N = torch.arange(row.num_prompt_tokens - 1, len(row.ids_T) - 1, device=teacher.device)
        hidden.append(response_hidden(teacher, ids_BT, torch.ones_like(ids_BT), index_N).cpu())
    directory = run_dir.local(f"{CACHE}/{made.name}")
    shard = write_shard(directory, np.arange(len(rows)), hidden)
    write_index(directory, [shard.name], TEACHER, made.fingerprint)
