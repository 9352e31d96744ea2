"""Rollouts: responses of the student to the prompts of a global batch, in place of the rows' own or next to them.

Each worker writes for its share of the rows, and all get all responses, since which worker trains on a row depends on
the lengths. What is written depends on seed, step and row, not on the worker or on what was drawn before. So nothing
of a generator has to be stored; a checkpoint holds the replay buffer and the threshold alone.

A response is tokens, as they were sampled: it keeps the token that ended it and is never decoded and tokenized again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.numpy import load_file, save_file

from pocl_ray.config import RolloutConfig
from pocl_ray.data.batching import Layout, MicroBatch
from pocl_ray.data.row_store import RowStore
from pocl_ray.distill.collectives import from_rank_zero
from pocl_ray.distill.engine import Engine
from pocl_ray.distill.feed import GlobalBatch
from pocl_ray.distill.rollout_schedule import (
    AdaptiveSchedule,
    ReplayBuffer,
    draw_of,
    limits_of,
    replay_generator,
    source_of,
)
from pocl_ray.distill.rollout_writers import RolloutWriter

BUFFER = "rollouts.safetensors"


class Rollouts:
    """Puts the student's responses into the global batches of a run; every worker runs the same one."""

    def __init__(
        self,
        config: RolloutConfig,
        engine: Engine,
        writer: RolloutWriter,
        rows: RowStore,
        layout: Layout,
        max_tokens: int,
        seed: int,
        num_steps: int,
    ) -> None:
        """Set them up.

        Args:
            config: Steps with rollouts, and settings of the sampling.
            engine: Engine with the student.
            writer: Backend that writes with that student.
            rows: Training rows.
            layout: How rows share forward passes.
            max_tokens: Maximum tokens of prompt and response together.
            seed: Seed of all random draws.
            num_steps: Number of optimizer steps of the whole run.
        """
        self.config, self.engine, self.writer, self.rows = config, engine, writer, rows
        self.max_tokens, self.seed, self.num_steps = max_tokens, seed, num_steps
        self.layout, self.stop_ids = layout, set(writer.stop_ids)
        self._unstopped_share = 0.0
        self.schedule = AdaptiveSchedule(config.threshold_start, None, config.threshold_rise, config.loss_rise)
        self.buffer = ReplayBuffer(config.buffer_rows)

    def respond(self, batch: GlobalBatch, step: int) -> GlobalBatch:
        """Return the batch of the optimizer step `step`, counted over all stages; collective."""
        if not self.config.is_on:
            return batch
        u = draw_of(self.seed, step)
        source = source_of(self.config, self.schedule, u, step, self.num_steps, self.buffer.is_full)
        if source == "data":
            return batch
        if source == "buffer":
            ids, responses = self.buffer.sample(len(batch.ids), replay_generator(self.seed, step))
        else:
            ids, responses = self._write(batch.ids, step)
            if self.config.mode == "adaptive":
                self.buffer.push(ids.tolist(), responses)
        written = replace(
            batch,
            micro_batches=self._micro_batches(ids, responses),
            num_response_tokens=sum(map(len, responses)),
            source=source,
        )
        return _together(batch, written) if self.config.beside_data else written

    def observe(self, figures: dict[str, float]) -> None:
        """Take the figures of an evaluation, which may raise the threshold; they are equal on all workers."""
        if self.config.mode == "adaptive":
            self.schedule = self.schedule.observed(figures["eval/dev/ce_loss"])

    def figures(self, batch: GlobalBatch) -> dict[str, Any]:
        """Return the entries of a metric record about a batch's source; empty without rollouts."""
        if not self.config.is_on:
            return {}
        known: dict[str, Any] = {"rollout/source": batch.source}
        if batch.source == "student":
            known["rollout/unstopped_share"] = self._unstopped_share
        if self.config.mode == "adaptive":
            known |= {"rollout/phi": self.schedule.phi, "rollout/buffer_rows": len(self.buffer)}
        return known

    def state(self) -> dict[str, Any]:
        """Return the numbers of the schedule for a checkpoint; empty in modes without one."""
        if self.config.mode != "adaptive":
            return {}
        return {"phi": self.schedule.phi, "reference_ce": self.schedule.reference_ce}

    def write(self, directory: Path) -> None:
        """Write the buffer into a checkpoint directory; rank 0."""
        if self.config.mode == "adaptive":
            save_file(self.buffer.to_arrays(), directory / BUFFER)

    def restore(self, state: dict[str, Any], directory: Path | None) -> None:
        """Restore the state of a checkpoint; collective, rank 0 reads `directory` and sends its content."""
        if self.config.mode != "adaptive":
            return
        self.schedule = replace(self.schedule, phi=state["phi"], reference_ce=state["reference_ce"])
        arrays = load_file(directory / BUFFER) if directory is not None else {}
        dtypes = {"ids": torch.int64, "lengths": torch.int64, "tokens": torch.int32}
        shared = {name: from_rank_zero(arrays.get(name), dtype, self.engine.device) for name, dtype in dtypes.items()}
        self.buffer.fill(shared)

    def _write(self, ids: np.ndarray, step: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Have the student answer the prompts of rows; return them in order of length, with all responses."""
        by_length = ids[np.argsort(-self.rows.prompt_lengths[ids], kind="stable")]
        mine = by_length[self.engine.rank :: self.engine.world_size]
        prompts, _ = self.rows.tokens(mine)
        limits = limits_of([len(prompt) for prompt in prompts], self.max_tokens, self.config.max_new_tokens)
        written = self.writer.write(mine.tolist(), prompts, limits, step)
        parts = gather_responses(written, self.engine.device)
        responses = [parts[place % len(parts)][place // len(parts)] for place in range(len(by_length))]
        self._unstopped_share = sum(int(response[-1]) not in self.stop_ids for response in responses) / len(responses)
        return by_length, responses

    def _micro_batches(self, ids: np.ndarray, responses: list[np.ndarray]) -> list[MicroBatch]:
        """Deal rollouts to the workers and collate this one's, as the feed does with rows."""
        prompts, _ = self.rows.tokens(ids)
        lengths = np.array([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)])
        places = self.layout.deal(lengths, self.engine.rank, self.engine.world_size)
        return [
            replace(self.layout.collate([prompts[i] for i in part], [responses[i] for i in part]), is_rollout=True)
            for part in places
        ]


def gather_responses(responses: list[np.ndarray], device: torch.device) -> list[list[np.ndarray]]:
    """Return every worker's responses, by rank; collective, and every worker brings equally many."""
    width = torch.tensor([max(map(len, responses))], device=device)
    dist.all_reduce(width, op=dist.ReduceOp.MAX)
    padded = np.zeros((len(responses), int(width) + 1), np.int32)
    for row, response in enumerate(responses):
        padded[row, 0], padded[row, 1 : len(response) + 1] = len(response), response
    mine = torch.from_numpy(padded).to(device)
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    return [[row[1 : row[0] + 1] for row in part.cpu().numpy()] for part in parts]


def _together(data: GlobalBatch, written: GlobalBatch) -> GlobalBatch:
    """One optimizer step on rows and rollouts, normalised by the response tokens of both."""
    return replace(
        written,
        micro_batches=[*data.micro_batches, *written.micro_batches],
        num_response_tokens=data.num_response_tokens + written.num_response_tokens,
    )
