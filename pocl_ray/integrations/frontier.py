"""Frontier pacing in other trainers: a sampler that draws each stage's rows when they are due, by the gaps seen so far.

The trainer's own loss has the logits of student and teacher, from which each row's gap falls out. `accelerate` asks
for one batch more than is trained on, so the rows of a stage are drawn before the last step of the stage before: that
step's gaps count one stage later. This holds for any number of processes and accumulated batches, and after a resume,
so the rows are the same.

Axes: B rows of a batch, N their response tokens in one flat axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Sampler

from pocl_ray.data.batching import global_batches
from pocl_ray.distill.gaps import FRONTIER_FILE, FrontierRows, RowGaps
from pocl_ray.errors import DataError
from pocl_ray.integrations.curriculum import Curriculum
from pocl_ray.records import Stage

IntArray = npt.NDArray[np.int64]


class FrontierSampler(Sampler[int]):
    """A sampler of the data set's rows for all stages; each stage's rows are drawn when the first of them is due."""

    def __init__(self, curriculum: Curriculum, device: torch.device) -> None:
        """Start with the curriculum's gaps.

        Args:
            curriculum: Plan, with `frontier` and `gaps`.
            device: Device of collective operations.
        """
        assert curriculum.frontier is not None and curriculum.gaps is not None
        self.curriculum = curriculum
        nothing_R = np.zeros(len(curriculum.gaps), dtype=np.int64)  # neither lengths nor buckets are needed here
        self.gaps = RowGaps(curriculum.gaps, nothing_R, device)
        batch_rows, seed = curriculum.global_batch_rows, curriculum.seed
        self.rows = FrontierRows(curriculum.frontier, self.gaps, nothing_R, batch_rows, seed, _never_measure)
        self._first_stage = 0
        self._steps: dict[int, IntArray] = {}

    def __len__(self) -> int:
        return self.curriculum.num_steps * self.curriculum.global_batch_rows

    def __iter__(self) -> Iterator[int]:
        first_step, batch_rows = 0, self.curriculum.global_batch_rows
        for stage in self.curriculum.stages:
            if stage.index < self._first_stage:  # a resumed training skips them, whatever they are
                yield from (int(self.curriculum.dataset_rows[0]) for _ in range(stage.num_steps * batch_rows))
            else:
                for step, ids in enumerate(self._drawn(stage), start=first_step):
                    self._steps = {at: rows for at, rows in self._steps.items() if at >= step - 1} | {step: ids}
                    yield from self.curriculum.dataset_rows[ids].tolist()
            first_step += stage.num_steps

    def _drawn(self, stage: Stage) -> Iterator[IntArray]:
        is_restored = stage.index == self._first_stage and len(self.rows.drawn) > 0
        if not is_restored:
            self.rows.begin(stage)
        return global_batches(stage, self.rows.drawn, self.curriculum.global_batch_rows, self.curriculum.seed)

    def visit(self, step: int, place: int, lengths_B: IntArray, gap_N: Tensor) -> None:
        """Take the gaps of a batch of an optimizer step.

        Args:
            step: Optimizer step, from 0.
            place: Place of the batch among the step's batches, over accumulated batches and processes.
            lengths_B: Response tokens of each row.
            gap_N: Gap of each response token, row after row.
        """
        size = len(lengths_B)
        ids_B = self._steps[step][place * size : (place + 1) * size]
        has_tokens = lengths_B > 0
        self.gaps.visit(ids_B[has_tokens], lengths_B[has_tokens], gap_N)
        self.gaps.end_step(step)

    def write(self, directory: Path, is_first: bool) -> None:
        """Write gaps and drawn rows into a checkpoint; collective, and the first process writes."""
        self.gaps.settle()
        if is_first:
            self.rows.write(directory)

    def restore(self, directory: Path, step: int) -> None:
        """Go on from a checkpoint that was written after `step` optimizer steps; collective.

        Raises:
            DataError: The checkpoint holds no gaps.
        """
        if not (directory / FRONTIER_FILE).is_file():
            raise DataError(
                f"{directory / FRONTIER_FILE}: no such file, so it is not known which rows come next; resume from "
                "another checkpoint, or start again"
            )
        self.rows.restore(directory)
        self._first_stage = self.curriculum.at(step).stage


def _never_measure(gaps: RowGaps, ids: IntArray, stage: int) -> None:
    raise AssertionError("refresh rescore is refused")
