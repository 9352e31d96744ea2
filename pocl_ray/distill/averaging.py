"""Averages of the student's weights over training: exponential, or the mean of those at the last evaluations.

The average is kept in float32 by partition, as ZeRO has cut the master weights. It takes 4 bytes a trained weight over
all workers, and with `last_k` k times that, in host memory. A step costs one pass over a worker's own part, and nothing
is sent. For an evaluation, and where a stage hands its result on, average and weights change places.

Where an average is kept, dev figures are those of the average, the best checkpoint of a stage is chosen by them, and
the trained student is the average. The steps themselves, rollouts, the gaps of rows and rankings between stages that
continue are those of the weights. A stage that starts with fresh moments starts from the average of the one before, and
averages afresh; one that goes on goes on with weights, moments and average.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from pocl_ray.config import TrainConfig
from pocl_ray.distill.checkpoint import CheckpointWriter, state_reader, write_state
from pocl_ray.distill.state import WEIGHT, TrainingState

AVERAGE = "average"
"""The folder of a checkpoint with the averages, one folder for each copy of the weights."""


def ema_decay(step: int, most: float) -> float:
    """Return the decay of an exponential average at its update `step`, from 0.

    It rises as (1 + t) / (10 + t), so that the weights at the start are soon forgotten and a short run has an average
    of its last tenth or so; this is the warm-up of TensorFlow's `ExponentialMovingAverage` and of diffusers.
    """
    return min(most, (1 + step) / (10 + step))


class WeightAverage:
    """The average of an engine's weights; with `average: none` every method does nothing."""

    def __init__(self, state: TrainingState, train: TrainConfig) -> None:
        """Start an average at the present weights."""
        self._state, self._train = state, train
        # Of ema the average; of last_k the weights at the last evaluations, the oldest first.
        self._copies: list[list[Tensor]] = []
        self._num_steps = 0
        self.reset()

    @property
    def is_kept(self) -> bool:
        """Whether there is an average that differs from the weights."""
        return bool(self._copies) and (self._train.average == "last_k" or self._num_steps > 0)

    @property
    def most_copies(self) -> int:
        """The number of copies of the weights that a checkpoint holds at most."""
        return {"none": 0, "ema": 1, "last_k": self._train.average_last}[self._train.average]

    def reset(self) -> None:
        """Start afresh at the present weights."""
        self._num_steps = 0
        self._copies = [self._copy()] if self._train.average == "ema" else []

    @torch.no_grad()
    def see_step(self) -> None:
        """Take the weights after an optimizer step."""
        if self._train.average == "ema":
            share = 1.0 - ema_decay(self._num_steps, self._train.average_decay)
            torch._foreach_lerp_(self._copies[0], self._state.weights(), share)
            self._num_steps += 1

    def see_evaluation(self) -> None:
        """Take the weights at an evaluation."""
        if self._train.average == "last_k":
            self._copies = [*self._copies, self._copy("cpu")][-self._train.average_last :]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the student the average while the context lasts; collective.

        After an error the weights are left as they are: what others wait for would not come.
        """
        if not self.is_kept:
            yield
            return
        average = self._mean()
        self._state.exchange(average)
        self._state.refresh()
        yield
        self._state.exchange(average)
        self._state.refresh()

    def settle(self) -> None:
        """Give the student the average for good, and start afresh from there; collective."""
        if self.is_kept:
            self._state.exchange(self._mean())
            self._state.refresh()
        self.reset()

    def numbers(self) -> dict[str, int]:
        """Return what a checkpoint's progress holds of the average."""
        return {"copies": len(self._copies), "steps": self._num_steps} if self._copies else {}

    def write(self, directory: Path, writer: CheckpointWriter) -> None:
        """Gather the copies and start to write them into a checkpoint directory; collective, rank 0 writes."""
        for place, copy in enumerate(self._copies):
            self._state.exchange(copy)
            write_state(self._state, (WEIGHT,), directory / AVERAGE / str(place), writer)
            self._state.exchange(copy)

    def restore(self, numbers: dict[str, int], directory: Path | None) -> None:
        """Take the copies of a checkpoint, which rank 0 reads; collective. The weights are then to be loaded."""
        if self._train.average == "none":
            return
        self._copies = []
        for place in range(numbers.get("copies", 0)):
            source = None if directory is None else directory / AVERAGE / str(place)
            self._state.load(state_reader(source), (WEIGHT,), None)
            self._copies.append(self._copy("cpu" if self._train.average == "last_k" else None))
        self._num_steps = numbers.get("steps", 0)

    def _copy(self, device: str | None = None) -> list[Tensor]:
        return [weight.detach().to(device or weight.device, copy=True) for weight in self._state.weights()]

    def _mean(self) -> list[Tensor]:
        """The average; of last_k a new one, added up from the oldest to the newest."""
        if self._train.average == "ema":
            return self._copies[0]
        total = [weight.clone() for weight in self._copies[0]]
        for copy in self._copies[1:]:
            torch._foreach_add_(total, copy)
        torch._foreach_div_(total, len(self._copies))
        return total
