"""The settings that fit some rows, two models and a machine, each with its reason. Nothing is read here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pocl_ray.advice.cost import GIB, WorkerMemory
from pocl_ray.advice.first_rows import Lengths
from pocl_ray.advice.model_shape import ModelShape, amount
from pocl_ray.errors import ResourceError

Target = Literal["laptop", "gpu", "cluster"]

MOST_TOKENS: dict[Target, int] = {"laptop": 512, "gpu": 2048, "cluster": 4096}
"""The longest rows that are kept whole; longer ones cost more than the few that have them are worth."""

COVERED = 0.99  # of the rows are not cut, where they fit
USED = 0.85  # of a device's memory; the rest is for fragments and for what the estimate does not know
LARGEST_MICRO_BATCH = 32
NUM_STAGES = 8
FEWEST_DEV, MOST_DEV = 50, 500  # rows held out: with fewer, one answer moves a dev figure by points
CACHE_SHARE = 0.25  # of the free disk that the teacher's hidden states may take


@dataclass(frozen=True)
class Machine:
    """The machine that a config is for.

    Attributes:
        target: Kind of machine.
        num_workers: Training workers: GPUs, or 1 without them.
        memory_gib: Memory of a GPU, or of the machine without GPUs.
        num_cpus: Cores of this machine; a cluster's are not known.
        free_disk: Free bytes where runs are stored; None if that is elsewhere.
        has_bf16: Whether the device computes in bfloat16.
        is_seen: Whether memory and GPUs were measured, and not assumed.
    """

    target: Target
    num_workers: int
    memory_gib: float
    num_cpus: int
    free_disk: int | None
    has_bf16: bool
    is_seen: bool


@dataclass(frozen=True)
class TokenLimits:
    """`data.max_prompt_tokens`, `data.max_tokens`, tokens of an answer, and the share of rows that are cut."""

    max_prompt_tokens: int
    max_tokens: int
    max_new_tokens: int
    cut_share: float


def choose_tokens(lengths: Lengths, most: int) -> TokenLimits:
    """Return limits that leave `COVERED` of the rows whole, as far as the longest row allowed permits.

    Args:
        lengths: Lengths of the first rows.
        most: Tokens of the longest row allowed.
    """
    prompt, response, whole = lengths.quantile(COVERED)
    max_prompt = max(16, _up(prompt, 16))
    max_tokens = max(_up(whole, 32), max_prompt + 16)
    if max_tokens > most:
        max_tokens = most
        room = min(
            _up(response, 16), most // 2
        )  # neither side takes more than it needs, or than half where both are long
        max_prompt = max(1, min(max_prompt, max_tokens - room))
    cut = (lengths.prompts > max_prompt) | (lengths.prompts + lengths.responses > max_tokens)
    max_new = min(max(8, _up(response, 8)), max_tokens - 1)
    return TokenLimits(max_prompt, max_tokens, max_new, float(cut.mean()))


def choose_holdout(num_rows: int) -> int:
    """Return how many training rows become the dev set: a twentieth, but of few rows up to a sixth.

    Args:
        num_rows: Training rows before any are held out.
    """
    return max(1, min(MOST_DEV, max(num_rows // 20, min(FEWEST_DEV, num_rows // 6))))


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class Training:
    """The settings of training, the memory that they take, and why.

    Attributes:
        memory: Settings of a worker that its memory depends on.
        num_bytes: Memory that a worker takes by estimate; None if the student's shape is not known.
        global_batch_rows: Rows of an optimizer step.
        num_steps: Optimizer steps.
        num_passes: Passes over the rows that these steps make.
        num_stages: Stages of frontier pacing.
        learning_rate: Peak of the learning rate.
        why_memory: Reason for ZeRO stage and micro-batch.
    """

    memory: WorkerMemory
    num_bytes: float | None
    global_batch_rows: int
    num_steps: int
    num_passes: float
    num_stages: int
    learning_rate: float
    why_memory: str


def choose_training(
    machine: Machine, student: ModelShape | None, teacher_head: int, max_tokens: int, num_rows: int, is_cut: bool
) -> Training:
    """Return batch, ZeRO stage, steps and learning rate.

    Args:
        machine: Machine that trains.
        student: Shape of the student; None if it is not known.
        teacher_head: Weights of the teacher's LM head, which each worker loads.
        max_tokens: Tokens of the longest row.
        num_rows: Training rows.
        is_cut: Whether the student is made of layers of the teacher.

    Raises:
        ResourceError: The student does not fit the memory at any setting.
    """
    batch = next((size for size, least in ((8, 1000), (16, 4000), (32, 20_000)) if num_rows < least), 64)
    batch = max(1, min(batch, num_rows // 2))
    batch = _up(batch, machine.num_workers) if num_rows >= machine.num_workers else batch
    passes = next((times for times, most in ((4, 2000), (3, 50_000), (2, 200_000)) if num_rows < most), 1)
    num_steps = max(NUM_STAGES, passes * num_rows // batch)
    memory, num_bytes, why = _choose_memory(machine, student, teacher_head, max_tokens, batch)
    weights = 0 if student is None else student.num_weights
    rate = next(
        (rate for rate, most in ((5e-3, 1e6), (1e-3, 2e7), (5e-5, 3e8), (2e-5, 1.5e9)) if 0 < weights < most), 1e-5
    )
    return Training(
        memory=memory,
        num_bytes=num_bytes,
        global_batch_rows=batch,
        num_steps=num_steps,
        num_passes=num_steps * batch / num_rows,
        num_stages=NUM_STAGES,
        learning_rate=max(rate, 7e-4) if is_cut else 2e-5 if student is None else rate,
        why_memory=why,
    )


def _choose_memory(
    machine: Machine, student: ModelShape | None, teacher_head: int, max_tokens: int, batch: int
) -> tuple[WorkerMemory, float | None, str]:
    """The cheapest settings that fit: first ZeRO stage 1 and whole activations, then what costs time."""
    workers = machine.num_workers
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    if machine.target != "laptop":
        precision = "bf16" if machine.has_bf16 else "fp16"
    largest = _power_of_two(min(LARGEST_MICRO_BATCH, max(1, batch // workers)))
    if student is None:
        memory = WorkerMemory(precision, 2 if workers > 1 else 1, workers, min(4, largest), True)
        return memory, None, "careful, since the student could not be looked at"
    room = USED * machine.memory_gib * GIB
    stages = (1, 2, 3) if workers > 1 else (1,)
    tries = [(stage, again, False) for stage in stages for again in (False, True)] + [(max(stages), True, True)]
    for enough in (min(4, largest), 1):
        for stage, checkpointing, offload in tries:
            micro = largest
            while micro >= enough:
                memory = WorkerMemory(precision, stage, workers, micro, checkpointing, offload)
                needed = memory.num_bytes(student, teacher_head, max_tokens)
                if needed <= room:
                    return memory, needed, _why(memory, needed, machine)
                micro //= 2
    least = WorkerMemory(precision, max(stages), workers, 1, True, True).num_bytes(student, teacher_head, max_tokens)
    raise ResourceError(
        f"a student of {amount(student.num_weights)} parameters needs about {least / GIB:.0f} GiB on each of "
        f"{workers} worker(s), and {machine.memory_gib:.0f} GiB are there; give more or larger GPUs (--gpus, "
        "--gpu-gib, --for cluster), or a smaller student"
    )


def _power_of_two(number: int) -> int:
    return 1 << (number.bit_length() - 1)


def _why(memory: WorkerMemory, needed: float, machine: Machine) -> str:
    extra = ", with gradient checkpointing" if memory.gradient_checkpointing else ""
    extra += " and the optimizer in host memory" if memory.offload else ""
    seen = "" if machine.is_seen else " assumed"
    return f"about {needed / GIB:.1f} of {machine.memory_gib:.0f} GiB{seen} a worker by estimate{extra}"


def check_teacher_fits(machine: Machine, teacher: ModelShape | None) -> None:
    """Check that the teacher fits one device whole, as scoring loads it.

    Raises:
        ResourceError: It does not.
    """
    if teacher is None:
        return
    width = 4 if machine.target == "laptop" else 2
    needed = width * teacher.num_weights + GIB
    if needed > machine.memory_gib * GIB:
        where = "this machine" if machine.target == "laptop" else "one GPU"
        raise ResourceError(
            f"the teacher of {amount(teacher.num_weights)} parameters takes about {needed / GIB:.0f} GiB, and {where} "
            f"has {machine.memory_gib:.0f} GiB; choose a smaller teacher, or a larger machine (--for, --gpu-gib)"
        )


def choose_cache(machine: Machine, num_bytes: float | None) -> tuple[Literal["hidden", "topk"], str]:
    """Return the kind of teacher cache, and why.

    Args:
        machine: Machine with the disk.
        num_bytes: Size of a cache of hidden states; None if it is not known.
    """
    if num_bytes is None:
        return "hidden", "exact; its size is known once the rows are prepared"
    size = f"{num_bytes / GIB:.2f} GiB"
    if machine.free_disk is not None and num_bytes > CACHE_SHARE * machine.free_disk:
        return "topk", f"whole hidden states would take {size} of {machine.free_disk / GIB:.0f} GiB free"
    return "hidden", f"exact, about {size}; the teacher runs once"
