"""The steps in which the student writes the responses, and the replay buffer. Pure: neither torch nor Ray.

The adaptive schedule is DistiLLM's (arXiv 2402.03898, section 3.2). A threshold phi starts at 0 and rises when the dev
cross-entropy does, a sign that training on the rows alone no longer prepares the student for its own words. With u
drawn uniformly at step t of T,

    u < phi (1 - t/T), or u < phi while the buffer is not full:  write responses, keep them, train on them
    else u < phi:                                                train on responses drawn from the buffer
    else:                                                        train on the rows
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pocl_ray.config import RolloutConfig

Source = Literal["data", "student", "buffer"]
_DRAW, _REPLAY, _TOKENS = 11, 12, 13  # what is drawn at a step, each from a stream of its own
_DECIMALS = 9  # 0.1 ten times is 1 and not a little less


@dataclass(frozen=True)
class AdaptiveSchedule:
    """DistiLLM's rule, between two evaluations.

    Attributes:
        phi: Threshold.
        reference_ce: Dev cross-entropy at which phi last rose, or the first one; None before that.
        threshold_rise: Amount by which phi rises.
        loss_rise: Minimum of the dev cross-entropy above the reference.
    """

    phi: float = 0.0
    reference_ce: float | None = None
    threshold_rise: float = 0.1
    loss_rise: float = 0.1

    def observed(self, dev_ce: float) -> AdaptiveSchedule:
        """Return the schedule after an evaluation; the first one only sets the reference."""
        phi = self.phi
        if self.reference_ce is not None:
            if not dev_ce >= self.reference_ce + self.loss_rise:
                return self
            phi = min(1.0, round(phi + self.threshold_rise, _DECIMALS))
        return AdaptiveSchedule(phi, dev_ce, self.threshold_rise, self.loss_rise)

    def source(self, u: float, step: int, num_steps: int, buffer_is_full: bool) -> Source:
        """Return where the responses of a step come from.

        Args:
            u: Draw of the step, in [0, 1).
            step: Number t of optimizer steps done before it, over all stages.
            num_steps: Number T of optimizer steps of all stages.
            buffer_is_full: Whether the buffer is full.
        """
        if u >= self.phi:
            return "data"
        is_fresh = not buffer_is_full or u < self.phi * (1.0 - step / num_steps)
        return "student" if is_fresh else "buffer"


class ReplayBuffer:
    """The newest rollouts; each is a row id and the token ids of a response."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._kept: deque[tuple[int, np.ndarray]] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def is_full(self) -> bool:
        """Return whether another rollout would replace the oldest one."""
        return len(self._kept) == self.capacity

    def push(self, ids: Iterable[int], responses: Iterable[np.ndarray]) -> None:
        """Add rollouts, in place of the oldest ones if the buffer is full."""
        self._kept.extend((int(row), response) for row, response in zip(ids, responses, strict=True))

    def sample(self, num_rows: int, rng: np.random.Generator) -> tuple[np.ndarray, list[np.ndarray]]:
        """Draw rollouts without replacement; return row ids, shape (num_rows,), and responses."""
        drawn = [self._kept[place] for place in rng.choice(len(self._kept), num_rows, replace=False)]
        return np.array([row for row, _ in drawn], np.int64), [response for _, response in drawn]

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the content, oldest first: `ids`, `lengths`, and `tokens` of all responses in a row."""
        responses = [response for _, response in self._kept]
        return {
            "ids": np.array([row for row, _ in self._kept], np.int64),
            "lengths": np.array([len(response) for response in responses], np.int64),
            "tokens": np.concatenate([np.empty(0, np.int32), *responses]).astype(np.int32),
        }

    def fill(self, arrays: dict[str, np.ndarray]) -> None:
        """Replace the content by arrays of `to_arrays`."""
        ends = np.cumsum(arrays["lengths"])
        self._kept.clear()
        self.push(arrays["ids"].tolist(), np.split(arrays["tokens"], ends[:-1]) if len(ends) else [])


def draw_of(seed: int, step: int) -> float:
    """Return the draw u of a step: a function of (seed, step), so that all workers have the same one."""
    return float(_generator(_DRAW, seed, step).random())


def replay_generator(seed: int, step: int) -> np.random.Generator:
    """Return the generator that draws the rows of a step from the buffer."""
    return _generator(_REPLAY, seed, step)


def token_draws(seed: int, step: int, row: int, num_tokens: int) -> np.ndarray:
    """Return the draws of a row's tokens at a step, in [0, 1), float32; they are the same on every worker."""
    return _generator(_TOKENS, seed, step, row).random(num_tokens, dtype=np.float32)


def writing_seed(seed: int, step: int, row: int) -> int:
    """Return the seed of a row's response at a step, for a backend that draws tokens by itself."""
    return int(_generator(_TOKENS, seed, step, row).integers(2**31))


def source_of(
    config: RolloutConfig, schedule: AdaptiveSchedule, u: float, step: int, num_steps: int, buffer_is_full: bool
) -> Source:
    """Return where the responses of a step come from, in any mode."""
    if config.mode == "adaptive":
        return schedule.source(u, step, num_steps, buffer_is_full)
    share = {"off": 0.0, "on": 1.0, "mixed": config.mix_probability}[config.mode]
    return "student" if u < share else "data"


def limits_of(prompt_lengths: Sequence[int], max_tokens: int, max_new_tokens: int | None) -> list[int]:
    """Return the maximum number of tokens of each response, including the token that ends it."""
    most = max_tokens if max_new_tokens is None else max_new_tokens
    return [max(1, min(most, max_tokens - length)) for length in prompt_lengths]


def _generator(stream: int, *key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key, spawn_key=(stream,))))
