"""Sides of whole training steps on the same rows: our loop, TRL's trainer, and what both read.

`trl_step.py` and `on_policy_step.py` prepare models, rows and the task of a training in a process of its own, and train
each side in another one. `Steps` holds what all sides read, and what is measured while one trains.
"""

from __future__ import annotations

import argparse
import pickle
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import SideRun, ask_side, peak_bytes, run_sides
from step_flops import StepCounter, training_flops
from step_sides import Row, random_model, random_rows, smollm2_shape
from training_inputs import loop_of, one_stage, real_rows, write_task
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    TrainerCallback,
)

from pocl_ray.config import TrainConfig
from pocl_ray.data.batching import global_batches
from pocl_ray.data.row_store import RowStore
from pocl_ray.data.tokenization import train_tokenizer
from pocl_ray.distill.loop import LoopHooks, TrainingLoop
from pocl_ray.distill.losses import resolve_loss
from pocl_ray.distill.step import StepSettings
from pocl_ray.distill.task import TrainTask
from pocl_ray.models.loading import load_tokenizer
from pocl_ray.models.prepare import cut_layers
from pocl_ray.run_directory.storage import RunDirectory

PREPARE, TASK = "prepare", "task.pickle"
WARM_STEPS = 2  # the first allocates moments and buffers, the FLOPs of the second are counted
SETTINGS = StepSettings(kd_temperature=1.0, kd_ratio=1.0, kd=resolve_loss("forward_kl"))
LEARNING_RATE = 1e-5
GPU_SHAPES = {  # teacher and student; GPT-2 1.5B to 0.1B and Qwen2.5 7B to 0.5B
    "gpt2": [GPT2Config(n_embd=1600, n_layer=48, n_head=25), GPT2Config()],
    "qwen2.5": [
        Qwen2Config(
            vocab_size=151936, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
            num_key_value_heads=4,
        ),
        Qwen2Config(
            vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
            num_key_value_heads=2, tie_word_embeddings=True,
        ),
    ],
}  # fmt: skip


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of models, rows and precision, and the folder in which `run_apart` keeps the inputs."""
    parser.add_argument("--teacher", help="directory of a Llama-style model; default: random weights")
    parser.add_argument("--rows", type=Path, help="file of rows, read with the teacher's tokenizer; default: random")
    parser.add_argument("--shape", choices=["smollm2", *GPU_SHAPES], default="smollm2")
    parser.add_argument("--teacher-layers", type=int, default=30, help="layers of a random teacher")
    parser.add_argument("--student-layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=49152, help="of a random teacher")
    parser.add_argument("--hidden", type=int, default=576, help="width of a random teacher")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=None, help="default: if the CPU can")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)


def run_apart(script: str, sides: Sequence[str], rounds: int, arguments: Sequence[str]) -> dict[str, list[SideRun]]:
    """Have a program write the inputs of all sides, and run these."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [*arguments, "--folder", folder]
        ask_side(script, PREPARE, arguments)
        return run_sides(script, sides, rounds, arguments)


def models_of(options: argparse.Namespace) -> dict[str, PreTrainedModel]:
    """Return teacher and student: a local model and layers cut from it, or random weights."""
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    if options.shape != "smollm2":
        torch.manual_seed(0)
        configs = dict(zip(("teacher", "student"), GPU_SHAPES[options.shape], strict=True))
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            models = {name: AutoModelForCausalLM.from_config(config) for name, config in configs.items()}
        return {"teacher": models["teacher"].to(dtype).eval(), "student": models["student"].float()}
    teacher: PreTrainedModel = (
        AutoModelForCausalLM.from_pretrained(options.teacher, local_files_only=True, dtype=torch.float32)
        if options.teacher
        else random_model(smollm2_shape(options.teacher_layers, options.vocabulary, options.hidden), seed=0)
    )
    student = cut_layers(teacher, options.student_layers).float()
    return {"teacher": teacher.to(dtype).eval(), "student": student}


def tokenizer_of(options: argparse.Namespace, run_dir: RunDirectory) -> PreTrainedTokenizerBase:
    """Write and return the teacher's tokenizer, or a small one for random rows, which come as tokens."""
    directory = run_dir.local("tokenizer")
    if options.teacher:
        load_tokenizer(options.teacher).save_pretrained(directory)
    else:
        train_tokenizer(["one two three four five six"] * 9, 270, directory)
    return load_tokenizer(str(directory))


def prepare(options: argparse.Namespace, change: Callable[[Row], Row] = lambda row: row) -> None:
    """Write the inputs of all sides into the folder; in a process of its own, whose memory no side inherits.

    Args:
        options: Options of the program.
        change: Function that changes a row before it is written.
    """
    run_dir = RunDirectory.open(str(options.folder), "run")
    tokenizer, models = tokenizer_of(options, run_dir), models_of(options)
    num_rows, vocabulary = options.batch * options.steps, models["student"].config.vocab_size
    if options.rows and options.teacher:
        rows = real_rows(options.rows, tokenizer, num_rows, options.folder / "scratch")
        if len(rows) < num_rows:
            raise SystemExit(f"{options.rows}: {len(rows)} rows can be used, {num_rows} are needed; lower --steps")
    else:
        rows = random_rows(num_rows, vocabulary, seed=0)
    rows = [change(row) for row in rows]
    train = TrainConfig(
        global_batch_rows=options.batch,
        micro_batch_rows=options.batch,
        precision="bf16" if options.bf16 else "fp32",
        learning_rate=LEARNING_RATE,
        lr_schedule="constant",
    )
    stage = one_stage(num_rows, options.steps, SETTINGS.kd_temperature, SETTINGS.kd_ratio)
    task = write_task(run_dir, models, tokenizer, {"train": rows, "dev": rows[:1]}, stage, train)
    (options.folder / TASK).write_bytes(pickle.dumps(task))
    print("{}")


class Steps:
    """The rows of each step as our loop draws them, and what is measured while a side trains on them."""

    def __init__(self, task: TrainTask, is_live: bool) -> None:
        """Take the task of all sides, and whether the work includes the teacher's forward pass."""
        self.task, batch = task, task.train.global_batch_rows
        store = RowStore.open(task.run_dir.local(task.rows.path))
        ids = global_batches(task.stages[0], np.arange(task.rows.num_rows), batch, task.seed)
        self.rows: list[list[Row]] = []
        for one in ids:
            pairs = zip(*store.tokens(one), strict=True)
            self.rows.append([Row(torch.tensor(np.concatenate(pair)).long(), len(pair[0])) for pair in pairs])
        self.needed = training_flops(task, self.rows, is_live)
        self.counter = StepCounter()
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.num_positions, self.peak = 0, 0

    @property
    def autocast(self) -> torch.autocast:
        """The precision of the sides that keep their weights in float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.task.train.precision == "bf16")

    @property
    def device(self) -> torch.device:
        """The device that all sides train on."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def end_step(self, seconds: float, loss: float | None = None) -> None:
        """Take the seconds of the step that has ended, count FLOPs from its end to the next one's if it is the first.

        The memory is that of the steps: what comes after the last one, such as a checkpoint, is not in it.
        """
        self.seconds.append(seconds)
        self.losses += [] if loss is None else [loss]
        self.peak = peak_bytes()
        if len(self.rows) <= WARM_STEPS:
            return  # a run for its losses alone
        if len(self.seconds) == WARM_STEPS - 1:
            self.counter.begin()
        elif len(self.seconds) == WARM_STEPS:
            self.counter.end()

    def report(self) -> SideRun:
        """Return what the round reports."""
        tokens = [sum(len(row.ids_T) for row in rows) for rows in self.rows]
        if len(tokens) <= WARM_STEPS:
            return SideRun(self.seconds, sum(tokens), self.peak, self.losses)
        return SideRun(
            seconds=self.seconds[WARM_STEPS:],
            num_tokens=sum(tokens[WARM_STEPS:]),
            peak_bytes=self.peak,
            losses=self.losses,
            padding=1 - sum(tokens) / self.num_positions,
            flops_needed=sum(self.needed[WARM_STEPS:]),
            needed_over_done=self.needed[WARM_STEPS - 1] / self.counter.flops,
        )


def our_loop(steps: Steps, task: TrainTask) -> TrainingLoop:
    """Return the loop of a worker with its engine, which tells `steps` of each step."""

    def on_step(_: Any, record: dict[str, Any]) -> None:
        if "train/loss" in record:
            steps.end_step(record["step_s"], record["train/loss"])

    loop = loop_of(task, LoopHooks(on_step=on_step))
    train_step = loop.engine.train_step

    def counted(micro_batches: Any, *arguments: Any) -> Any:
        steps.num_positions += sum(batch.input_ids_BT.numel() for batch in micro_batches)
        return train_step(micro_batches, *arguments)

    loop.engine.train_step = counted  # type: ignore[method-assign]
    return loop


def train_ours(steps: Steps, task: TrainTask) -> SideRun:
    """Train through the loop and the engine of a worker."""
    our_loop(steps, task).run()
    return steps.report()


def load_pair(steps: Steps) -> dict[str, PreTrainedModel]:
    """Return teacher and student as the other sides load them: the teacher in its dtype, the student in float32."""
    refs = {"teacher": steps.task.teachers[0].ref, "student": steps.task.student}
    models = {}
    for name, ref in refs.items():
        dtype = torch.float32 if name == "student" else "auto"
        models[name] = AutoModelForCausalLM.from_pretrained(ref.path, local_files_only=True, dtype=dtype)
        models[name].to(steps.device)
    models["teacher"].eval().requires_grad_(False)
    return models


class Watch(TrainerCallback):
    """Tells `Steps` of each step of TRL's trainer, from the end of one to the end of the next."""

    def __init__(self, steps: Steps) -> None:
        self.steps, self.started = steps, 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Take the time of a step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ended = time.perf_counter()
        self.steps.end_step(ended - self.started)
        self.started = ended

    def on_log(self, _: Any, __: Any, ___: Any, logs: dict[str, float] | None = None, **____: Any) -> None:
        """Take the loss of a step."""
        if logs and "loss" in logs:
            self.steps.losses.append(logs["loss"])


def trl_trainer(steps: Steps, scratch: str, **changes: Any) -> Any:
    """Return TRL's GKDTrainer with its own collator on the rows in our order; `changes` are further arguments of it."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    models, train = load_pair(steps), steps.task.train
    settings: dict[str, Any] = {
        "lmbda": 0.0,
        "beta": 0.0,
        "temperature": 1.0,
        "per_device_train_batch_size": train.global_batch_rows,
        "max_steps": len(steps.rows),
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "bf16": train.precision == "bf16",
        "use_cpu": steps.device.type == "cpu",
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    arguments = GKDConfig(output_dir=scratch, **{**settings, **changes})
    tokenizer = load_tokenizer(str(steps.task.run_dir.local(steps.task.tokenizer)))
    tokenizer.chat_template = tokenizer.chat_template or "{{ messages }}"  # asked for, though rows come as tokens
    rows = [
        {
            "prompt": "",
            "input_ids": row.ids_T.tolist(),
            "completion_mask": [int(place >= row.num_prompt_tokens) for place in range(len(row.ids_T))],
        }
        for batch in steps.rows
        for row in batch
    ]
    trainer = GKDTrainer(
        model=models["student"],
        teacher_model=models["teacher"],
        args=arguments,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        callbacks=[Watch(steps)],
    )
    collate = trainer.data_collator

    def counted(examples: Any) -> Any:
        batch = collate(examples)
        steps.num_positions += batch["input_ids"].numel()
        return batch

    trainer.data_collator = counted
    return trainer
