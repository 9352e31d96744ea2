"""Averages of weights against a plain loop, without an engine: what is averaged, when, and what is put back."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from pocl_ray.config import Config, TrainConfig
from pocl_ray.curriculum.schedule import plan_stages
from pocl_ray.distill.averaging import WeightAverage, ema_decay
from pocl_ray.distill.state import TrainingState
from pocl_ray.fingerprints import distill_dependencies, sft_dependencies
from pocl_ray.preview import average_note
from pocl_ray.run_directory.digests import fingerprint
from pocl_ray.tuning.space import SEARCHABLE_KEYS

NUM_STEPS = 30


class FakeState:
    """Two tensors in place of an engine's partitions."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.parts = [torch.randn(7, generator=generator), torch.randn(3, generator=generator)]
        self.num_refreshes = 0

    def weights(self) -> list[torch.Tensor]:
        return self.parts

    def exchange(self, other: list[torch.Tensor]) -> None:
        TrainingState.exchange(cast(TrainingState, self), other)

    def refresh(self) -> None:
        self.num_refreshes += 1

    def step(self, number: int) -> None:
        for part in self.parts:
            part += torch.randn(part.shape, generator=torch.Generator().manual_seed(number))

    def now(self) -> torch.Tensor:
        return torch.cat(self.parts).clone()


def made(**train: Any) -> tuple[FakeState, WeightAverage]:
    state = FakeState()
    return state, WeightAverage(cast(TrainingState, state), TrainConfig(**train))


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_the_exponential_average_is_that_of_a_plain_loop(decay: float) -> None:
    state, average = made(average="ema", average_decay=decay)
    expected = state.now().double()
    for number in range(NUM_STEPS):
        state.step(number)
        average.see_step()
        share = min(decay, (1 + number) / (10 + number))
        expected = share * expected + (1 - share) * state.now().double()
    raw = state.now()
    with average.applied():
        torch.testing.assert_close(state.now().double(), expected, rtol=1e-5, atol=1e-5)
        inside = state.now()
    assert torch.equal(state.now(), raw), "the weights come back to the bit"
    with average.applied():
        assert torch.equal(state.now(), inside)
    average.settle()
    assert torch.equal(state.now(), inside)
    assert not average.is_kept, "what comes next is averaged afresh"


def test_the_decay_rises_to_what_the_config_says() -> None:
    decays = [ema_decay(step, 0.99) for step in range(2000)]
    assert decays[0] == 0.1 and decays == sorted(decays) and decays[-1] == 0.99
    weight_of_start = torch.tensor(decays[:100], dtype=torch.float64).prod()
    assert weight_of_start < 1e-10, "the weights at the start are forgotten"


def test_the_mean_is_that_of_the_weights_at_the_last_evaluations() -> None:
    state, average = made(average="last_k", average_last=3)
    seen = []
    for number in range(5):
        state.step(number)
        average.see_step()
        average.see_evaluation()
        seen.append(state.now())
        with average.applied():
            kept = seen[-3:]
            torch.testing.assert_close(state.now(), torch.stack(kept).mean(0), rtol=1e-6, atol=1e-6)
        assert torch.equal(state.now(), seen[-1])
    assert average.numbers() == {"copies": 3, "steps": 0}


def test_without_an_average_nothing_is_kept_or_moved() -> None:
    state, average = made()
    state.step(0)
    average.see_step()
    average.see_evaluation()
    with average.applied():
        pass
    average.settle()
    assert (average.numbers(), average.most_copies, state.num_refreshes) == ({}, 0, 0)


def test_an_average_makes_another_run_and_leaves_fine_tuning_and_other_runs_alone() -> None:
    tree: dict[str, Any] = {
        "name": "run",
        "data": {"train": {"path": "train.jsonl"}, "dev": {"path": "dev.jsonl"}},
        "teacher": {"path": "teacher"},
        "student": {"path": "student", "sft": {}},
    }

    def config(**train: Any) -> Config:
        return Config.model_validate({**tree, "train": train})

    def digest(made: Config) -> str:
        return fingerprint(distill_dependencies(made, "r", "s", plan_stages(made, 1000)))

    plain, ema = config(), config(average="ema")
    assert digest(config(average_decay=0.9, average_last=2)) == digest(plain)
    assert digest(config(average="ema", average_last=2)) == digest(ema)
    others = [
        plain,
        ema,
        config(average="ema", average_decay=0.9),
        config(average="last_k"),
        config(average="last_k", average_last=2),
    ]
    assert len({digest(one) for one in others}) == len(others)
    assert {fingerprint(sft_dependencies(one, "student")) for one in others} == {
        fingerprint(sft_dependencies(plain, "student"))
    }
    assert "decay 0.999" in average_note(ema.train) and "last 4 evaluations" in average_note(others[3].train)
    assert "train.average" in SEARCHABLE_KEYS
