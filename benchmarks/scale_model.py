"""Time and memory of a distillation on clusters that are not here, from FLOPs, bytes, network and storage.

    python benchmarks/scale_model.py                         7B to 0.5B, 1M rows, on 8, 64 and 512 GPUs

The form of a step's time, `FLOPs / rate + overhead`, is checked by `scale_measured.py`. The rates of a GPU cannot be
measured on a machine without one: those below are stated assumptions, to be replaced by your own (--mfu, --network,
--storage).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

GB, GIB, TERA = 1e9, float(1 << 30), 1e12


@dataclass(frozen=True)
class Model:
    """The shape of a transformer.

    Attributes:
        body: Parameters without embedding and LM head.
        hidden: Width.
        layers: Blocks.
        vocabulary: Rows of the embedding.
        kv_bytes: Bytes of a token's keys and values in bfloat16.
    """

    body: float
    hidden: int
    layers: int
    vocabulary: int
    kv_bytes: int

    @property
    def head(self) -> float:
        """Parameters of the LM head."""
        return float(self.hidden * self.vocabulary)


TEACHER_7B = Model(6.53e9, 3584, 28, 152064, 2 * 28 * 4 * 128 * 2)
STUDENT_05B = Model(0.358e9, 896, 24, 151936, 2 * 24 * 2 * 64 * 2)


@dataclass(frozen=True)
class Work:
    """The work of a distillation.

    Attributes:
        rows: Training rows, with so many prompt and response tokens each.
        passes: Over all rows, in all stages together; POCL's four stages of 2 epochs are 5.
        batch: Rows of an optimizer step.
        generated: Tokens of a scoring answer.
        num_checkpoints: Written in the whole run.
    """

    rows: float = 1e6
    prompt: float = 150.0
    response: float = 150.0
    passes: float = 5.0
    batch: int = 512
    generated: float = 150.0
    num_checkpoints: int = 100


@dataclass(frozen=True)
class Machine:
    """The speeds of a cluster's GPUs, links and disks; the defaults are assumptions for nodes with eight H100.

    Attributes:
        flops: Peak operations per second of a GPU in bfloat16.
        mfu: Share of it in training, where the micro-batch fills the GPU; `mfu_forward` in a forward pass.
        half_tokens: Tokens a GPU and step at which that share is halved.
        hbm: Memory bytes a second; `memory` is its size.
        link: Bytes a second between the GPUs of a node; `network` those that a node sends to others.
        storage: Bytes a second of a node to shared storage; `storage_total` of all nodes together.
        disk: Bytes a second that a node reads from its own disk.
        overhead: Seconds of a step that no GPU shortens: Python, launches, the optimizer's kernels.
        latency: Seconds of one hop of a reduction.
        per_node: GPUs.
    """

    flops: float = 989 * TERA
    mfu: float = 0.35
    mfu_forward: float = 0.5
    half_tokens: float = 1500.0
    hbm: float = 3.35e12 * 0.6
    memory: float = 80 * GIB
    link: float = 300 * GB
    network: float = 40 * GB
    storage: float = 2 * GB
    storage_total: float = 40 * GB
    disk: float = 5 * GB
    overhead: float = 0.03
    latency: float = 2e-5
    per_node: int = 8


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step, by their cause; reading runs at the same time as computing."""

    compute: float
    reduce: float
    read: float
    overhead: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return max(self.compute, self.read) + self.reduce + self.overhead


def training_flops(student: Model, teacher: Model, tokens: float, response: float) -> float:
    """FLOPs of a step: forward and backward of the student, its head on response tokens, the teacher's head forward.

    Logits go through the head in chunks that are recomputed in the backward pass, hence 8 and not 6.
    """
    return 6 * student.body * tokens + 8 * student.head * response + 4 * teacher.head * response


def training_step(work: Work, student: Model, teacher: Model, machine: Machine, num_gpus: int) -> Step:
    """Predict one optimizer step on `num_gpus`, of which each gets at least one row."""
    used = min(num_gpus, work.batch)
    tokens, response = work.batch * (work.prompt + work.response), work.batch * work.response
    share = tokens / used
    rate = machine.flops * machine.mfu * share / (share + machine.half_tokens)
    nodes = math.ceil(used / machine.per_node)
    gradient = 2 * (student.body + student.head)  # bytes in bfloat16
    inside = 2 * gradient * (1 - 1 / min(used, machine.per_node)) / machine.link
    between = 2 * gradient * (1 - 1 / nodes) / machine.network
    hops = machine.latency * 2 * math.log2(used) if used > 1 else 0.0
    read = response * teacher.hidden * 2 / nodes / machine.disk
    compute = training_flops(student, teacher, tokens, response) / used / rate
    return Step(compute, inside + between + hops, read, machine.overhead)


def gpu_bytes(work: Work, student: Model, teacher: Model, num_gpus: int, chunk: float = 512 * 2**20) -> float:
    """Memory of a training GPU under ZeRO-1, with the largest micro-batch of 8 rows and activations recomputed."""
    weights = student.body + student.head
    state = 4 * weights + 12 * weights / min(num_gpus, work.batch)  # bfloat16 weights and gradients; float32 shards
    rows = min(8.0, math.ceil(work.batch / num_gpus))
    tokens = rows * (work.prompt + work.response)
    activations = tokens * student.hidden * 2 * (student.layers + 34)  # a block's input each, and one block whole
    cached = rows * work.response * teacher.hidden * 2
    return state + 2 * teacher.head + activations + cached + 3 * chunk


@dataclass(frozen=True)
class Prediction:
    """Seconds of the steps of a run, memory, and bytes."""

    num_gpus: int
    scoring: float
    fetch: float
    training: float
    checkpoints: float
    step: Step
    memory: float
    cache: float

    @property
    def total(self) -> float:
        """Seconds of the whole run, without evaluation."""
        return self.scoring + self.fetch + self.training + self.checkpoints


def scoring_seconds(work: Work, student: Model, teacher: Model, machine: Machine, num_gpus: int) -> float:
    """Both models over all rows: teacher and student forward, the student's answers, and the cache to storage.

    Writing runs at the same time as computing. A token of the answers reads the student's weights once for a batch of
    256 rows.
    """
    tokens, rows = work.rows * (work.prompt + work.response), work.rows
    heads = 2 * (teacher.head + student.head) * work.response * rows
    forward = (2 * (teacher.body + student.body) * tokens + heads) / machine.flops / machine.mfu_forward
    batch = 256.0
    context = work.prompt + work.generated / 2
    token = (2 * (student.body + student.head) + batch * context * student.kv_bytes) / machine.hbm
    launches = student.layers * 1e-4  # of a token's kernels, which its little work does not hide
    answers = rows / batch * work.generated * max(token, launches)
    written = cache_bytes(work, teacher) / _storage(machine, num_gpus)
    return max((forward + answers) / num_gpus, written)


def cache_bytes(work: Work, teacher: Model) -> float:
    """Bytes of the teacher's hidden states."""
    return work.rows * work.response * teacher.hidden * 2


def _storage(machine: Machine, num_gpus: int) -> float:
    return min(math.ceil(num_gpus / machine.per_node) * machine.storage, machine.storage_total)


def predict(work: Work, student: Model, teacher: Model, machine: Machine, num_gpus: int) -> Prediction:
    """Predict a run. Each node fetches the whole cache once, as its workers need any row of it."""
    step = training_step(work, student, teacher, machine, num_gpus)
    nodes = math.ceil(num_gpus / machine.per_node)
    each = min(machine.storage, machine.storage_total / nodes)
    checkpoint = 12 * (student.body + student.head)
    return Prediction(
        num_gpus=num_gpus,
        scoring=scoring_seconds(work, student, teacher, machine, num_gpus),
        fetch=cache_bytes(work, teacher) / each,
        training=step.total * work.rows * work.passes / work.batch,
        checkpoints=work.num_checkpoints * checkpoint / machine.storage,
        step=step,
        memory=gpu_bytes(work, student, teacher, num_gpus),
        cache=cache_bytes(work, teacher),
    )


def stops_at(totals: Sequence[tuple[int, float]], gain: float = 1.25) -> int:
    """Return the number of GPUs from which twice as many make a run less than `gain` times as fast; the last if none.

    Args:
        totals: (GPUs, seconds), each with twice the GPUs of the one before.
        gain: Minimum gain of a doubling that is worth it.
    """
    for (count, seconds), (_, doubled) in pairwise(totals):
        if seconds / doubled < gain:
            return count
    return totals[-1][0]


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Fit `seconds = FLOPs / rate + overhead` by least squares of the relative error; (FLOPs a second, seconds)."""
    a11 = sum((f / s) ** 2 for f, s in points)
    a12 = sum(f / s**2 for f, s in points)
    a22 = sum(1 / s**2 for _, s in points)
    b1, b2 = sum(f / s for f, s in points), sum(1 / s for _, s in points)
    determinant = a11 * a22 - a12**2
    slope, overhead = (b1 * a22 - b2 * a12) / determinant, (a11 * b2 - a12 * b1) / determinant
    return 1 / slope, overhead


def show(work: Work, machine: Machine, counts: Sequence[int]) -> None:
    """Print the table, and where it ends."""
    student, teacher = STUDENT_05B, TEACHER_7B
    print(
        f"7B to 0.5B: {work.rows:,.0f} rows of {work.prompt:.0f}+{work.response:.0f} tokens, {work.passes:g} passes, "
        f"batch {work.batch}; teacher cache {cache_bytes(work, teacher) / 1e12:.2f} TB"
    )
    print(
        f"{'GPUs':>5} {'scoring':>9} {'fetch':>8} {'training':>9} {'ckpts':>7} {'total':>8}  {'step ms: compute':>16}",
        end="",
    )
    print(f" {'reduce':>7} {'read':>6} {'fixed':>6} {'GiB':>6}")
    for count in counts:
        made = predict(work, student, teacher, machine, count)
        hours = [f"{s / 3600:.2f} h" for s in (made.scoring, made.fetch, made.training, made.checkpoints, made.total)]
        parts = [made.step.compute, made.step.reduce, made.step.read, made.step.overhead]
        ms = [f"{1000 * s:.0f}" for s in parts]
        fits = "" if made.memory < machine.memory else "  does not fit"
        print(
            f"{count:5d} {hours[0]:>9} {hours[1]:>8} {hours[2]:>9} {hours[3]:>7} {hours[4]:>8}  {ms[0]:>16} {ms[1]:>7}"
            f" {ms[2]:>6} {ms[3]:>6} {made.memory / GIB:6.1f}{fits}"
        )
    doublings = [2**n for n in range(13)]
    runs = [predict(work, student, teacher, machine, n) for n in doublings]
    for name in ("scoring", "training", "total"):
        last = stops_at([(run.num_gpus, getattr(run, name)) for run in runs])
        print(f"{name} stops scaling at {last} GPUs: twice as many make it less than 1.25 times as fast")


def main() -> None:
    """Print the table for the work and the machine that the arguments describe."""
    defaults, work = Machine(), Work()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default="8,64,512", help="comma-separated")
    parser.add_argument("--rows", type=float, default=work.rows)
    parser.add_argument("--batch", type=int, default=work.batch)
    parser.add_argument("--mfu", type=float, default=defaults.mfu)
    parser.add_argument("--network", type=float, default=defaults.network / GB, help="GB/s that a node sends")
    parser.add_argument("--storage", type=float, default=defaults.storage / GB, help="GB/s of a node")
    args = parser.parse_args()
    machine = replace(defaults, mfu=args.mfu, network=args.network * GB, storage=args.storage * GB)
    show(replace(work, rows=args.rows, batch=args.batch), machine, [int(n) for n in args.gpus.split(",")])


if __name__ == "__main__":
    main()
