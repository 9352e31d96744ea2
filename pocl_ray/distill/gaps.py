"""The gaps of rows during training, and the rows that frontier pacing draws by them.

The gap of a row is the mean KL(teacher || student) at temperature 1 over its response tokens. It is computed from the
logits that a step has anyway. If the loss is that KL, the gap is the loss; otherwise it takes one more reduction of
each chunk. A row's gap is that of its last visit; rows not yet visited have the gap of the first scoring. Each worker
notes what it sees, and nothing is sent until gaps are needed: before a stage, and for a checkpoint. Then the latest
visit of each row wins, on whichever worker it was, so that gaps do not depend on how rows are dealt or on how often
checkpoints are written.

Axes: B rows of a micro-batch, N its response tokens in one flat axis, C those of a chunk, V vocabulary, R all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from safetensors.numpy import load_file, save_file
from torch import Tensor

from pocl_ray.config.training import FrontierConfig
from pocl_ray.curriculum.frontier import draw_rows, row_weights
from pocl_ray.curriculum.schedule import bucket_ends
from pocl_ray.data.batching import MicroBatch
from pocl_ray.distill.chunked import ChunkValues, HeadLoss, TeacherTargets
from pocl_ray.distill.collectives import from_rank_zero
from pocl_ray.distill.losses import LOG_ZERO, ResolvedLoss
from pocl_ray.records import Stage

FRONTIER_FILE = "frontier.safetensors"
"""The file in a checkpoint with the gaps of all rows, and the rows that the stage has drawn."""

QUANTILES = (5, 25, 50, 75, 95)
"""Percentiles of the gaps of a bucket in the metrics."""
DRAW_BINS = (0, 1, 2, 3, 5, 9, 17)
"""Numbers of draws of a row at which the counts in the metrics start; the last has no end."""

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


_BLOCK_ELEMENTS = 2**18
"""Logits that `plain_kl` takes at once on a CPU: what it makes of them, a megabyte an array, stays in the cache."""


@torch.no_grad()
def plain_kl(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    temperature: float = 1.0,
    log_norm_N: Tensor | None = None,
) -> Tensor:
    """KL(p||q) without a gradient, for a fraction of the time of `forward_kl`; shape (N,), float32.

    With t and s the logits of teacher and student, and Z_t and Z_s their logarithms of the sum of exponentials,
    KL(p||q) = sum p (t - s) - Z_t + Z_s. Z_t follows from one entry of the softmax, the largest. On a CPU tokens are
    taken a few at a time, since arrays of a whole chunk would cost more to allocate than to compute.

    Args:
        student_logits_NV: Logits of the student.
        teacher_logits_NV: Logits of the teacher.
        temperature: Temperature that softens both.
        log_norm_N: Z_s over the student's whole vocabulary at temperature 1, if it is known; a cross-entropy has it.
    """
    num_tokens, num_shared = len(student_logits_NV), min(student_logits_NV.shape[-1], teacher_logits_NV.shape[-1])
    if log_norm_N is not None and num_shared < student_logits_NV.shape[-1]:  # the padding is no part of the KL
        padding_NV = student_logits_NV[:, num_shared:] - log_norm_N[:, None]
        log_norm_N = log_norm_N + torch.log1p(-padding_NV.exp_().sum(-1))
    on_cpu = student_logits_NV.device.type == "cpu"
    size = max(1, _BLOCK_ELEMENTS // num_shared if on_cpu else num_tokens)
    blocks = [slice(start, start + size) for start in range(0, num_tokens, size)]
    found = [
        _plain_kl(
            student_logits_NV[rows, :num_shared],
            teacher_logits_NV[rows, :num_shared],
            temperature,
            None if log_norm_N is None else log_norm_N[rows],
        )
        for rows in blocks
    ]
    return torch.cat(found) if found else student_logits_NV.new_zeros(0, dtype=torch.float32)


def _plain_kl(student_NV: Tensor, teacher_NV: Tensor, temperature: float, log_norm_N: Tensor | None) -> Tensor:
    dtype = torch.promote_types(student_NV.dtype, torch.float32)
    student_NV, teacher_NV = student_NV.to(dtype), teacher_NV.to(dtype)
    if temperature != 1.0:
        student_NV, teacher_NV = student_NV / temperature, teacher_NV / temperature
    if log_norm_N is None:
        log_norm_N = student_NV.logsumexp(-1)
    p_NV = torch.softmax(teacher_NV, dim=-1)
    teacher_norm_N = teacher_NV.amax(-1) - p_NV.amax(-1).log()
    # Where the teacher masks a token p is 0, and 0 times infinity is no number; where the student alone does, the KL is
    # read as it is with `LOG_ZERO`. Logits that are no numbers still show in both norms.
    difference_NV = (teacher_NV - student_NV).nan_to_num_(nan=0.0, posinf=-LOG_ZERO, neginf=0.0)
    return (difference_NV.mul_(p_NV).sum(-1) - teacher_norm_N + log_norm_N).float()


@dataclass(frozen=True)
class RowGapMeter:
    """Takes the gap of each token of one micro-batch; NaN if no teacher is used."""

    gap_N: Tensor

    def measure(self, rows: slice, chunk: ChunkValues, teacher: Tensor | TeacherTargets, loss: HeadLoss) -> None:
        """Take the tokens of a chunk. Liger's kernel gives one sum and no value per token, so our own code is used."""
        is_gap = isinstance(loss.kd, ResolvedLoss) and loss.kd.name == "forward_kl" and loss.kd_temperature == 1.0
        if is_gap:
            self.gap_N[rows] = chunk.kd_C
        elif isinstance(teacher, Tensor):
            self.gap_N[rows] = plain_kl(chunk.student_logits_CV, teacher, log_norm_N=chunk.log_norms())
        else:  # other vocabularies than the cross-entropy's, so its norm is of no use
            self.gap_N[rows] = teacher.divergence(plain_kl, chunk.student_logits_CV, 1.0)


@dataclass
class _Seen:
    """The visits of a worker since gaps were last combined: the row, the step, the sum and the tokens of each visit."""

    ids: list[IntArray] = field(default_factory=list)
    steps: list[IntArray] = field(default_factory=list)
    sums: list[FloatArray] = field(default_factory=list)
    num_tokens: list[IntArray] = field(default_factory=list)


class RowGaps:
    """The gap of every training row; every worker has a copy, and all copies agree after `settle`."""

    def __init__(self, first_R: FloatArray, lengths_R: npt.NDArray[np.integer], device: torch.device) -> None:
        """Start with the gaps of the first scoring.

        Args:
            first_R: Gaps of the first scoring, in nats per token.
            lengths_R: Number of response tokens of each row.
            device: Device of collective operations.
        """
        self.values_R = np.array(first_R, dtype=np.float64)
        self.lengths_R, self.device = lengths_R, device
        self._open: list[tuple[IntArray, IntArray, Tensor]] = []
        self._seen = _Seen()

    def meter(self, batch: MicroBatch, device: torch.device) -> RowGapMeter | None:
        """Return the meter for a micro-batch that will run next; None if the student wrote its responses."""
        if batch.row_ids_B is None:
            return None
        gap_N = torch.full((batch.num_response_tokens,), torch.nan, device=device)
        self.visit(batch.row_ids_B, self.lengths_R[batch.row_ids_B], gap_N)
        return RowGapMeter(gap_N)

    def visit(self, ids_B: IntArray, lengths_B: npt.NDArray[np.integer], gap_N: Tensor) -> None:
        """Take rows of the current step: their ids, their numbers of tokens, and the gap of each token in turn."""
        self._open.append((ids_B, lengths_B.astype(np.int64), gap_N))

    def end_step(self, step: int) -> None:
        """Record the measurements of an optimizer step, counted over all stages.

        Called once its losses are on the host, when the tokens' values can be fetched without waiting. They are added
        up there, where the order of summation is fixed.
        """
        seen = self._seen
        for ids, lengths, gap_N in self._open:
            starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
            sums = np.add.reduceat(gap_N.cpu().numpy().astype(np.float64), starts)
            known = np.isfinite(sums)  # not for a step with kd_ratio 0, nor for figures of a diverging student
            seen.ids.append(ids[known])
            seen.steps.append(np.full(int(known.sum()), step, dtype=np.int64))
            seen.sums.append(sums[known])
            seen.num_tokens.append(lengths[known])
        self._open.clear()

    def settle(self) -> None:
        """Combine the visits of all workers; collective."""
        num_rows, seen = len(self.values_R), self._seen
        ids = np.concatenate([np.zeros(0, np.int64), *seen.ids])
        steps = np.concatenate([np.zeros(0, np.int64), *seen.steps])
        sums, num_tokens = np.concatenate([np.zeros(0), *seen.sums]), np.concatenate([np.zeros(0), *seen.num_tokens])
        self._seen = _Seen()
        last_R = np.full(num_rows, -1, dtype=np.int64)
        np.maximum.at(last_R, ids, steps)
        last_R = self._reduced(last_R, dist.ReduceOp.MAX)
        # A row may be used twice in its last step, on one worker or on two. Its gap is then the mean of both.
        is_last = steps == last_R[ids]
        found = [np.bincount(ids[is_last], values[is_last], num_rows) for values in (sums, num_tokens)]
        sums_R, tokens_R = (self._reduced(values, dist.ReduceOp.SUM) for values in found)
        visited = last_R >= 0
        self.values_R[visited] = sums_R[visited] / tokens_R[visited]

    def _reduced(self, values: np.ndarray, op: dist.ReduceOp.RedOpType) -> np.ndarray:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return values
        tensor = torch.from_numpy(values).to(self.device)
        dist.all_reduce(tensor, op)
        return tensor.cpu().numpy()


Measure = Callable[[RowGaps, IntArray, int], None]


class FrontierRows:
    """Draws the rows of each stage by their gaps; every worker draws the same."""

    def __init__(
        self, config: FrontierConfig, gaps: RowGaps, buckets_R: IntArray, batch_rows: int, seed: int, measure: Measure
    ) -> None:
        """Set up the draws.

        Args:
            config: Weights, and the source of gaps.
            gaps: Gaps of the training rows.
            buckets_R: Bucket of each row in the ranking, by which figures are told.
            batch_rows: Rows of an optimizer step over all workers.
            seed: Seed of the run.
            measure: Function that makes the student read some rows before a stage, and updates the gaps; collective.
        """
        self.config, self.gaps, self.measure = config, gaps, measure
        self.buckets_R, self.batch_rows, self.seed = buckets_R, batch_rows, seed
        self.drawn: IntArray = np.zeros(0, dtype=np.int64)
        self.counts_R: IntArray = np.zeros(len(buckets_R), dtype=np.int64)

    @property
    def step_gaps(self) -> RowGaps | None:
        """The gaps that a step updates; None if all rows are measured before the next stage anyway."""
        is_measured = self.config.refresh == "rescore" and self.config.rescore_rows is None
        return None if is_measured else self.gaps

    def begin(self, stage: Stage) -> None:
        """Draw the rows of a stage that begins; collective."""
        self.gaps.settle()
        if self.config.refresh == "rescore" and stage.index > 0:
            self.measure(self.gaps, self._rescored(stage), stage.index)
            self.gaps.settle()
        config = self.config
        weights = row_weights(self.gaps.values_R, config.power, config.floor, config.saturation)
        self.drawn = draw_rows(weights, stage.num_steps * self.batch_rows, self.seed, stage.index)
        self.counts_R += np.bincount(self.drawn, minlength=len(self.counts_R))

    def figures(self) -> dict[str, float]:
        """Return what the metrics hold of a stage that has begun: gaps and share of draws by bucket, and how often
        rows were drawn since the beginning of the run."""
        found: dict[str, float] = {"frontier/gap_mean": float(self.gaps.values_R.mean())}
        drawn = np.bincount(self.buckets_R[self.drawn], minlength=int(self.buckets_R.max()) + 1) / len(self.drawn)
        for bucket, share in enumerate(drawn):
            gaps = self.gaps.values_R[self.buckets_R == bucket]
            found[f"frontier/gap_mean/{bucket}"] = float(gaps.mean())
            for percent, value in zip(QUANTILES, np.percentile(gaps, QUANTILES), strict=True):
                found[f"frontier/gap_q{percent:02d}/{bucket}"] = float(value)
            found[f"frontier/draws/{bucket}"] = float(share)
        ends = (*DRAW_BINS[1:], np.inf)
        for first, end in zip(DRAW_BINS, ends, strict=True):
            found[f"frontier/rows_drawn/{first}"] = int(((first <= self.counts_R) & (self.counts_R < end)).sum())
        return found

    def _rescored(self, stage: Stage) -> IntArray:
        num_rows, wanted = len(self.gaps.values_R), self.config.rescore_rows
        if wanted is None or wanted >= num_rows:
            return np.arange(num_rows)
        sequence = np.random.SeedSequence([self.seed, stage.index], spawn_key=(3,))
        return np.sort(np.random.Generator(np.random.PCG64(sequence)).permutation(num_rows)[:wanted])

    def gaps_by_bucket(self, ranked: npt.NDArray[np.integer], num_buckets: int) -> list[float]:
        """Return the mean gap of each bucket, the easiest first; collective.

        Args:
            ranked: Row ids in the order of the ranking.
            num_buckets: Number of buckets of the curriculum.
        """
        self.gaps.settle()
        buckets = np.split(ranked, bucket_ends(len(ranked), num_buckets)[:-1])
        return [float(self.gaps.values_R[ids].mean()) for ids in buckets]

    def write(self, directory: Path) -> None:
        """Write gaps and drawn rows into a checkpoint directory; rank 0, after `settle`."""
        arrays = {"gaps": self.gaps.values_R, "drawn": self.drawn, "counts": self.counts_R}
        save_file(arrays, directory / FRONTIER_FILE)

    def restore(self, directory: Path | None) -> None:
        """Restore the state of a checkpoint, which rank 0 reads; collective."""
        arrays = {} if directory is None else load_file(directory / FRONTIER_FILE)
        self.gaps.values_R = from_rank_zero(arrays.get("gaps"), torch.float64, self.gaps.device)
        self.drawn = from_rank_zero(arrays.get("drawn"), torch.int64, self.gaps.device)
        # A checkpoint of an earlier version has no counts; the report's are then those since the resume.
        counts_R = arrays.get("counts", np.zeros_like(self.counts_R))
        self.counts_R = from_rank_zero(counts_R, torch.int64, self.gaps.device)
