"""The time for which a checkpoint stops training: written at once, and written during the next steps, alternately.

    python benchmarks/checkpoint_stall.py [--layers 8] [--rounds 3] [--steps 4]

A student of about 33 million parameters trains on one CPU worker; both sides gather, write, hash and copy the same
checkpoint to a directory that stands for storage. The stall is the time of some steps with one checkpoint among them
less that of as many steps without. Prints a line a round and the ratio of the medians; fails where a checkpoint is not
whole.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow.fs as pafs
import torch
import torch.distributed as dist
from step_sides import random_model, random_rows, smollm2_shape

from pocl_ray.config import TrainConfig
from pocl_ray.data.batching import MicroBatch, collate
from pocl_ray.distill.checkpoint import (
    BEST,
    STATE,
    CheckpointWriter,
    PendingCheckpoint,
    Progress,
    complete,
    read_progress,
    write_state,
)
from pocl_ray.distill.engine import Engine
from pocl_ray.distill.state import KINDS, TrainingState
from pocl_ray.distill.step import DistillationModule, StepSettings
from pocl_ray.ray_train.checkpoints import copy_checkpoint

ROWS = 4
BUFFER_BYTES = {"at once": 0, "beside": 4 << 30}


def made_engine(num_layers: int) -> tuple[Engine, list[MicroBatch]]:
    """An engine on one CPU worker, and a batch for it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]))
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    dist.init_process_group("gloo", rank=0, world_size=1)
    student = random_model(smollm2_shape(num_layers, vocabulary=8192), seed=0)
    train = TrainConfig(global_batch_rows=ROWS, micro_batch_rows=ROWS, precision="fp32")
    engine = Engine(DistillationModule(student), train, torch.device("cpu"), timeout_s=600.0)
    rows = random_rows(ROWS, 8192, seed=1)
    tokens = [row.ids_T.numpy() for row in rows]
    prompts = [ids[: row.num_prompt_tokens] for ids, row in zip(tokens, rows, strict=True)]
    responses = [ids[row.num_prompt_tokens :] for ids, row in zip(tokens, rows, strict=True)]
    return engine, [collate(prompts, responses, pad_id=0)]


def save(state: TrainingState, scratch: Path, storage: Path, writer: CheckpointWriter) -> None:
    """The work of the loop and its reporter on a checkpoint, without Ray."""
    directory = Path(tempfile.mkdtemp(dir=scratch))
    write_state(state, KINDS, directory / STATE, writer)
    written = PendingCheckpoint(directory, writer.submit(partial(complete, Progress(), directory, scratch / BEST)))
    writer.submit(partial(_take, written, storage))


def _take(written: PendingCheckpoint, storage: Path) -> None:
    shutil.rmtree(storage, ignore_errors=True)
    copy_checkpoint(written.wait(), pafs.LocalFileSystem(), str(storage))
    shutil.rmtree(written.directory)


def seconds(step: Callable[[], object], num_steps: int, first: Callable[[], object] = lambda: None) -> float:
    """Time of `first` and so many steps."""
    start = time.perf_counter()
    first()
    for _ in range(num_steps):
        step()
    return time.perf_counter() - start


def main() -> int:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="of the student; 8 are 33 million parameters")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="after each checkpoint")
    args = parser.parse_args()

    engine, batches = made_engine(args.layers)
    state = TrainingState(engine)
    num_parameters = sum(parameter.numel() for _, parameter in state.parameters)
    num_tokens = sum(batch.num_response_tokens for batch in batches)
    step = partial(engine.train_step, batches, StepSettings(1.0, 0.0), 1e-5, num_tokens)
    print(
        f"{num_parameters / 1e6:.0f}M parameters, checkpoints of {12 * num_parameters / 1e9:.2f} GB; stall in seconds"
    )
    stalls: dict[str, list[float]] = {side: [] for side in BUFFER_BYTES}
    with tempfile.TemporaryDirectory() as folder:
        seconds(step, 2)
        for number in range(args.rounds):
            for side, buffer_bytes in BUFFER_BYTES.items():
                writer, storage = CheckpointWriter(buffer_bytes), Path(folder) / side
                plain = seconds(step, args.steps)
                stalls[side].append(
                    seconds(step, args.steps, partial(save, state, Path(folder), storage, writer)) - plain
                )
                writer.join()
                writer.close()
                read_progress(storage)
            print(f"round {number + 1}: " + "   ".join(f"{side} {took[-1]:.2f}" for side, took in stalls.items()))
    medians = {side: statistics.median(took) for side, took in stalls.items()}
    print(
        f"a step {plain / args.steps:.2f} s; {medians['at once']:.2f} s of stall against {medians['beside']:.2f} s: "
        f"ratio {medians['at once'] / max(medians['beside'], 1e-3):.1f}"
    )
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
