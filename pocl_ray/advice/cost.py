"""Estimates of memory, time and disk. They are rough, and whoever prints them says so.

Memory of a training worker, with W weights, N workers, in bfloat16 (float32 in brackets):

    weights 2W [4W], gradients 2W [4W], and float32 weights and both moments 12W

ZeRO stage 1 splits the last over the workers, stage 2 the gradients as well, stage 3 everything. Activations take about
34 bytes [68] a token, layer and unit of width (Korthikanti et al., arXiv 2205.05198, without the attention matrix), or
with gradient checkpointing the input of each layer and one whole layer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import torch

from pocl_ray.advice.model_shape import ModelShape
from pocl_ray.arms import plan_race
from pocl_ray.config import Config
from pocl_ray.config.race import RACE
from pocl_ray.experiments.flops import FlopsCounter
from pocl_ray.records import RowsSummary, Stage
from pocl_ray.run_directory.disk import GIB

BYTES_AN_ACTIVATION = 17.0  # times the bytes of a number: 34 in bfloat16
CHUNKS = 3  # of logits that a loss holds at once: both models', and a gradient
FIXED_BYTES = 1.0 * GIB  # of a process: libraries, CUDA's context, buffers
ASSUMED_GPU_FLOPS = 1e14  # of an A100 in bfloat16 at a third of its peak
CPU_SHARE, DECODE_SHARE = 0.5, 0.05  # of the rate of a large product: training, and answers token by token
STEP_S, START_S = 0.03, 12.0  # of an optimizer step besides its products; of the start of workers or actors


@dataclass(frozen=True)
class WorkerMemory:
    """The settings of a training worker that its memory depends on."""

    precision: Literal["fp32", "bf16", "fp16"]
    zero_stage: int
    num_workers: int
    micro_batch_rows: int
    gradient_checkpointing: bool
    offload: bool = False

    def num_bytes(self, student: ModelShape, teacher_head: int, max_tokens: int, chunk_mib: int = 64) -> float:
        """Return the memory that one worker takes on its device.

        Args:
            student: Shape of the student.
            teacher_head: Weights of the teacher's LM head, or all its weights if it runs live.
            max_tokens: Tokens of the longest row.
            chunk_mib: Logits held at a time, `distill.chunk_mib`.
        """
        width = 4 if self.precision == "fp32" else 2
        weights, share = student.num_weights, 1 / self.num_workers
        parts = [width * weights, width * weights, 0 if self.offload else 12 * weights]
        whole_until = (3, 2, 1)  # the ZeRO stage from which each part is split
        state = sum(
            part * (share if self.zero_stage >= stage else 1) for part, stage in zip(parts, whole_until, strict=True)
        )
        tokens = self.micro_batch_rows * max_tokens
        layer = BYTES_AN_ACTIVATION * width * student.width
        per_token = layer * student.num_layers
        if self.gradient_checkpointing:
            per_token = width * student.width * student.num_layers + layer
        return state + width * teacher_head + tokens * per_token + CHUNKS * chunk_mib * 2**20 + FIXED_BYTES


@dataclass(frozen=True)
class Estimate:
    """The time of a run by its parts, in seconds, and its bytes on disk.

    Attributes:
        scoring_s: First pass of both models over the rows, which fills the teacher cache.
        training_s: Optimizer steps, of the control as well.
        evaluation_s: Answers of all models to all sets.
        start_s: Start of Ray, its workers and its actors.
        checkpoint_bytes: Checkpoints and student.
    """

    scoring_s: float
    training_s: float
    evaluation_s: float
    start_s: float
    checkpoint_bytes: float

    @property
    def total_s(self) -> float:
        """Seconds of the whole run."""
        return self.scoring_s + self.training_s + self.evaluation_s + self.start_s


def measured_flops() -> float:
    """Return the operations a second of a large matrix product on this machine, on its GPU if it has one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (768, torch.float32)
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):  # the first is slower, and other work on the machine comes and goes
        start = time.perf_counter()
        product = matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    del product
    return 2.0 * size**3 / best


def estimate(
    config: Config, stages: tuple[Stage, ...], rows: RowsSummary, shapes: tuple[ModelShape, ModelShape], flops: float
) -> Estimate:
    """Return what a run costs.

    Args:
        config: Config of the run.
        stages: Its plan.
        rows: Training rows with their tokens, counted or estimated.
        shapes: Shapes of teacher and student.
        flops: Operations a second of one worker or actor, in training.
    """
    teacher, student = shapes
    parts = FlopsCounter(student.size, teacher.size, rows).planned(config, stages)
    workers = config.scaling.max_workers
    num_steps = sum(stage.num_steps for stage in stages)
    training = (parts.training + parts.refreshing) / (flops * workers) + num_steps * STEP_S
    sides = 1 if config.control is None else 2 + 2 * len(config.control.seeds)
    raced = plan_race(config, rows.num_rows).plan.most_steps / num_steps - 1 if config.curriculum.pacing == RACE else 0
    training *= sides + raced
    evaluation = config.evaluation
    answers = len(evaluation.seeds) + int(evaluation.greedy)
    models = [student, *([student] if evaluation.student_before else []), *([teacher] if evaluation.teacher else [])]
    models += [student] if config.control is not None else []
    num_rows = config.data.holdout_rows or config.evaluation.max_dev_rows or 256
    tokens = answers * num_rows * rows.num_response_tokens / rows.num_rows
    decoded = sum(2.0 * (one.size.body_weights + one.size.head_weights) * tokens for one in models)
    actors = config.scaling.evaluation_actors
    return Estimate(
        scoring_s=parts.scoring / flops,
        training_s=training,
        evaluation_s=decoded / (flops * DECODE_SHARE / CPU_SHARE * actors),
        start_s=4 * START_S,
        checkpoint_bytes=(12.0 * config.train.num_checkpoints + 4) * student.num_weights,
    )


def duration(seconds: float) -> str:
    """Return a duration in the unit that suits it, without digits that an estimate does not have."""
    if seconds < 90:
        return f"{max(10, round(seconds, -1)):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"
