"""The cost of Ray, DeepSpeed and the loop around a step: the same training with them and without, by turns.

    python benchmarks/orchestration.py [--rounds 3] [--steps 12] [--zero-stage 1]

One side is `run_training`: a TorchTrainer whose worker trains through a DeepSpeed engine, reports, logs and sets its
gauges at every step. The other is the shortest loop that does the same arithmetic: the same module, batches, feed and
settings, torch's AdamW and clipping, in a process without Ray, DeepSpeed and process group. Each round is a run of
either side from the same weights; counted are the seconds of the steps, not those of process starts, evaluations and
checkpoints. Ours are `step_s` of the metric stream, which run from the end of one step to the end of the next.

`--without-ray` runs our loop without Ray, to tell the two apart. Prints the ratio of the medians, and fails where it
is over 1.05 or where the losses of the sides differ.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # as many as Ray gives a worker of one CPU; before torch is imported
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - else workers give way to all that runs

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from step_sides import Row, random_model, random_rows, smollm2_shape, student_of

from pocl_ray.config import DistillConfig, GenerationConfig, PlateauConfig, RolloutConfig, TrainConfig
from pocl_ray.data.batching import Layout
from pocl_ray.data.row_store import ROWS_SCHEMA, RowStore
from pocl_ray.data.rows import arrow_writer, summarize_rows
from pocl_ray.data.tokenization import train_tokenizer
from pocl_ray.distill.task import TeacherTask, TrainTask
from pocl_ray.models.heads import response_hidden
from pocl_ray.models.loading import load_tokenizer
from pocl_ray.models.places import ModelRef
from pocl_ray.models.saving import save_model
from pocl_ray.records import RowsSummary, Stage
from pocl_ray.run_directory.storage import RunDirectory
from pocl_ray.teacher_cache.writer import write_index, write_shard

BAR, SAME_LOSS = 1.05, 1e-4
BATCH_ROWS, MICRO_BATCH_ROWS = 8, 4
VOCABULARY, TEACHER = 16384, "the teacher"
WARM_STEPS = 2  # that allocate moments and buffers
SIDES = ("ours", "plain")


def make_task(folder: Path, hidden: int, layers: int, num_steps: int, zero_stage: int) -> TrainTask:
    """Write models, rows and teacher cache of a run of `num_steps` optimizer steps."""
    run_dir = RunDirectory.open(str(folder), "run")
    train_tokenizer(["one two three four five six"] * 9, 270, run_dir.local("tokenizer"))
    tokenizer = load_tokenizer(str(run_dir.local("tokenizer")))
    teacher = random_model(smollm2_shape(2 * layers, VOCABULARY, hidden), seed=0).eval()
    refs = {}
    for name, model in {"teacher": teacher, "student": student_of(teacher, layers)}.items():
        refs[name] = ModelRef(str(save_model(model, tokenizer, run_dir.local(f"models/{name}"))))
    made = {}
    for seed, (name, num_rows) in enumerate({"train": BATCH_ROWS * num_steps, "dev": 1}.items()):
        rows = random_rows(num_rows, VOCABULARY, seed)
        made[name] = _write_rows(run_dir, name, rows)
        _write_cache(run_dir, teacher, rows, made[name])
    return TrainTask(
        name="distill",
        fingerprint="orchestration",
        run_dir=run_dir,
        stages=(Stage(0, (0,), 0, BATCH_ROWS * num_steps, 1, num_steps, 2.0, 0.8, True, 0, num_steps),),
        student=refs["student"],
        teachers=(TeacherTask(refs["teacher"], cache="cache", fingerprint=TEACHER),),
        tokenizer="tokenizer",
        rows=made["train"],
        dev_rows=made["dev"],
        scores=None,
        train=TrainConfig(
            global_batch_rows=BATCH_ROWS, micro_batch_rows=MICRO_BATCH_ROWS, precision="fp32", zero_stage=zero_stage
        ),
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


def _write_rows(run_dir: RunDirectory, name: str, rows: list[Row]) -> RowsSummary:
    """Write random rows as the file of prepared rows that the feed reads."""
    prompts = [row.ids_T[: row.num_prompt_tokens].tolist() for row in rows]
    responses = [row.ids_T[row.num_prompt_tokens :].tolist() for row in rows]
    numbers, texts = np.arange(len(rows)), ["random"] * len(rows)
    columns = [numbers, numbers + 1, [None] * len(rows), texts, [[text] for text in texts], prompts, responses]
    arrays = [pa.array(column, type=field.type) for column, field in zip(columns, ROWS_SCHEMA, strict=True)]
    path = run_dir.local(f"rows/{name}.arrow")
    with arrow_writer(path, ROWS_SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=ROWS_SCHEMA))
    return summarize_rows(name, path, 0)


@torch.no_grad()
def _write_cache(run_dir: RunDirectory, teacher: torch.nn.Module, rows: list[Row], made: RowsSummary) -> None:
    hidden = []
    for row in rows:
        ids_BT = row.ids_T[None]
        index_N = torch.arange(row.num_prompt_tokens - 1, len(row.ids_T) - 1)
        hidden.append(response_hidden(teacher, ids_BT, torch.ones_like(ids_BT), index_N))  # type: ignore[arg-type]
    directory = run_dir.local(f"cache/{made.name}")
    shard = write_shard(directory, np.arange(len(rows)), hidden)
    write_index(directory, [shard.name], TEACHER, made.fingerprint)


def plain_losses(task: TrainTask) -> list[tuple[float, float]]:
    """(seconds, loss) of each step of the loop without Ray and DeepSpeed."""
    from pocl_ray.distill.feed import Feed, load_teachers, teachers_of
    from pocl_ray.distill.kernels import resolve_divergence
    from pocl_ray.distill.step import DistillationModule, StepSettings
    from pocl_ray.models.loading import load_model

    device, stage, train = torch.device("cpu"), task.stages[0], task.train
    teachers = load_teachers(task, device)
    module = DistillationModule(load_model(task.student, dtype=torch.float32, eval_mode=False))
    module.attach_teacher_heads(*(teacher.head for teacher in teachers))
    rows = RowStore.open(task.run_dir.local(task.rows.path))
    teacher_outputs = teachers_of(task, task.rows, teachers, VOCABULARY)
    settings = StepSettings(stage.kd_temperature, stage.kd_ratio, resolve_divergence(task.distill, device))
    optimizer = torch.optim.AdamW(
        module.parameters(), train.learning_rate, train.betas, train.eps, train.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, stage.num_steps)
    taken, started = [], time.monotonic()
    for batch in Feed(rows, Layout(0, MICRO_BATCH_ROWS), 0, 1, teacher_outputs).stage(
        stage, np.arange(task.rows.num_rows), BATCH_ROWS, task.seed, 0
    ):
        total = 0.0
        for part in batch.micro_batches:
            loss = module(part, settings)[0] / batch.num_response_tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(module.parameters(), train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ended = time.monotonic()
        taken.append((ended - started, total))
        started = ended
    return taken


def our_losses(task: TrainTask, with_ray: bool) -> list[tuple[float, float]]:
    """(seconds, loss) of each step of a run, from its metric stream."""
    if with_ray:
        from pocl_ray.config import ScalingConfig
        from pocl_ray.ray_train.driver import run_training

        run_training(task, ScalingConfig())
        records = [json.loads(line) for line in task.run_dir.local(task.metrics).read_text().splitlines()]
    else:
        import torch.distributed as dist

        from pocl_ray.distill.loop import LoopHooks
        from pocl_ray.distill.setup import set_up_loop

        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed looks for it
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        loop = set_up_loop(task, torch.device("cpu"), LoopHooks())
        loop.run()
        records = loop.progress.metrics
    return [(record["step_s"], record["train/loss"]) for record in records if "train/loss" in record]


def run_side(options: argparse.Namespace) -> list[tuple[float, float]]:
    """One run of a side in this process."""
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(Path(folder), options.hidden, options.layers, options.steps, options.zero_stage)
        if options.side == "plain":
            return plain_losses(task)
        if options.without_ray:
            return our_losses(task, with_ray=False)
        from pocl_ray.ray_cluster.session import ray_session

        with ray_session():
            return our_losses(task, with_ray=True)


def run_apart(side: str) -> list[tuple[float, float]]:
    """One run of a side in a process of its own, with this program's options."""
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [(seconds, loss) for seconds, loss in json.loads(out.splitlines()[-1])]


def main() -> int:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=4, help="of the student; the teacher has twice as many")
    parser.add_argument("--steps", type=int, default=14, help="optimizer steps of a run, of 8 rows each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--zero-stage", type=int, default=1)
    parser.add_argument("--without-ray", action="store_true", help="our loop and DeepSpeed, but not Ray")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(run_side(options)))
        return 0

    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    worst = 0.0
    print(f"{'round':>5} {'ours ms':>9} {'plain ms':>9} {'ratio':>6}   medians of {options.steps - WARM_STEPS} steps")
    for index in range(options.rounds):
        runs = {side: run_apart(side) for side in (SIDES if index % 2 == 0 else SIDES[::-1])}
        worst = max(worst, *(abs(ours / plain - 1) for (_, ours), (_, plain) in zip(*runs.values(), strict=True)))
        medians = {}
        for side in SIDES:
            counted = [taken for taken, _ in runs[side]][WARM_STEPS:]
            seconds[side] += counted
            medians[side] = statistics.median(counted)
        ours, plain = medians["ours"], medians["plain"]
        print(f"{index + 1:5d} {1000 * ours:9.1f} {1000 * plain:9.1f} {ours / plain:6.3f}", flush=True)
    ratio = statistics.median(seconds["ours"]) / statistics.median(seconds["plain"])
    # The same steps of the two sides, all together: what a step costs more on the whole, outliers included.
    whole = sum(seconds["ours"]) / sum(seconds["plain"])
    print(f"a step takes {ratio:.3f} times as long as without orchestration ({whole:.3f} by the sum of all steps)")
    print(f"losses differ by at most {worst:.1e} of their size")
    return int(ratio > BAR or worst > SAME_LOSS)


if __name__ == "__main__":
    sys.exit(main())
