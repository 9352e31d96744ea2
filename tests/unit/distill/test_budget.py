"""The token budget that fills a GPU: the line through two measurements, and rehearsals that change nothing."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from runs import STAGES, TRAIN, prepare

from pocl_ray.distill.budget import MARGIN, find_budget, fitting_tokens
from pocl_ray.distill.state import TrainingState
from pocl_ray.distill.task import TrainTask
from pocl_ray.errors import ConfigError, ResourceError

GIB = 2**30


class Gpu:
    """A stand-in whose peak grows in a straight line."""

    def __init__(self, fixed: float, a_token: float) -> None:
        self.fixed, self.a_token, self.tried = fixed, a_token, []

    def peak_bytes(self, num_tokens: int) -> int:
        self.tried.append(num_tokens)
        return round(self.fixed + self.a_token * num_tokens)


class Memory:
    """A stand-in for the memory of a GPU: a line in the tokens that a rehearsed step reads, with teachers' on top."""

    num_bytes = 1000

    def __init__(self, engine: Any) -> None:
        self.tokens, self.peaks = 0, []
        rehearsed = engine.rehearse

        def counted(batch: Any, settings: Any) -> None:
            self.tokens = batch.input_ids_BT.numel()
            # The moments stand before the first peak is taken.
            assert all(state["exp_avg"].numel() for state in TrainingState(engine).adam.state.values())
            rehearsed(batch, settings)

        engine.rehearse = counted

    def start(self) -> None:
        self.tokens = 0

    def peak_bytes(self) -> int:
        self.peaks.append(100 + 10 * self.tokens)
        return self.peaks[-1]


class Teacher:
    """A live teacher that counts the tokens which it reads."""

    def __init__(self) -> None:
        self.read: list[tuple[tuple[int, ...], Any]] = []

    def hidden(self, ids_BT: Any, mask_BT: Any, index_N: Any, row_lengths: Any = None) -> Any:
        self.read.append((tuple(ids_BT.shape), row_lengths))
        return torch.zeros(len(index_N), 4)


def test_the_budget_follows_the_line_to_the_memory_less_a_margin() -> None:
    gpu = Gpu(10 * GIB, GIB / 1000)
    found = fitting_tokens(gpu.peak_bytes, 500, 10**6, 80 * GIB)
    assert gpu.tried == [500, 1000]
    assert found == pytest.approx(((1 - MARGIN) * 80 - 10) * 1000, abs=2)


def test_a_step_that_might_not_fit_is_not_tried() -> None:
    gpu = Gpu(38 * GIB, 40 * GIB / 1000)  # of 80 GiB a row takes 58, and two would take 78, all but the model's twice
    assert fitting_tokens(gpu.peak_bytes, 500, 10**6, 80 * GIB) == pytest.approx(750, abs=2)
    assert gpu.tried == [500, 256]
    gpu = Gpu(60 * GIB, GIB / 1000)
    assert fitting_tokens(gpu.peak_bytes, 500, 10**6, 80 * GIB) == pytest.approx(8000, abs=2)
    assert gpu.tried == [500, 256]


def test_the_budget_is_never_more_than_a_share_needs() -> None:
    assert fitting_tokens(Gpu(0, 1).peak_bytes, 500, 4000, 80 * GIB) == 4000
    assert fitting_tokens(lambda num_tokens: GIB, 500, 4000, 80 * GIB) == 4000  # too small to be seen in the peak


def test_a_row_that_does_not_fit_is_one_line() -> None:
    with pytest.raises(ResourceError, match=r"a row of 500 tokens takes 70\.5 of the GPU's 80\.0 GiB.*or set") as error:
        fitting_tokens(Gpu(70 * GIB, GIB / 1000).peak_bytes, 500, 10**6, 80 * GIB)
    assert "\n" not in str(error.value)


def _worker(_: int, task: TrainTask, target: Path) -> None:
    from pocl_ray.distill.loop import LoopHooks
    from pocl_ray.distill.setup import set_up_loop

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found: dict[str, Any] = {}
    for zero_stage in (1, 3):
        for rehearses in (False, True):
            train = TRAIN.model_copy(
                update={"zero_stage": zero_stage, "micro_batch_rows": None, "micro_batch_tokens": 48}
            )
            loop = set_up_loop(replace(task, train=train), torch.device("cpu"), LoopHooks())
            if rehearses:
                memory, teacher = Memory(loop.engine), Teacher()
                found["packed"] = find_budget(loop.engine, 9, 80, True, [teacher], memory)
                found["padded"] = find_budget(loop.engine, 9, 80, False, (), memory)
                found["peaks"], found["read"] = memory.peaks, teacher.read
            try:
                find_budget(loop.engine, 9, 8, True)
            except ConfigError as error:
                found["refusal"] = str(error)
            loop.run()
            records = [{key: value for key, value in m.items() if key != "step_s"} for m in loop.progress.metrics]
            found.setdefault(str(zero_stage), []).append(records)
            loop.engine.deepspeed.destroy()
    found["kept"], found["auto"] = _auto(task)
    target.write_text(json.dumps(found), encoding="utf-8")


def _auto(task: TrainTask) -> tuple[list[int | None], list[Any]]:
    """The budget of a run with `auto` that found 48 tokens: at first, and resumed with other budgets; its records."""
    from pocl_ray.distill import setup
    from pocl_ray.distill.loop import LoopHooks

    setup.find_budget = lambda *_: 48  # type: ignore[assignment]
    train = TRAIN.model_copy(update={"zero_stage": 1, "micro_batch_rows": None, "micro_batch_tokens": "auto"})
    loop = setup.set_up_loop(replace(task, train=train), torch.device("cpu"), LoopHooks())
    budgets = [loop.progress.micro_batch_tokens]
    loop.run()
    records = [{key: value for key, value in m.items() if key != "step_s"} for m in loop.progress.metrics]
    for before in (40, None, 64):
        progress = replace(loop.progress, micro_batch_tokens=before)
        loop.feed.layout.micro_batch_tokens = 48
        loop._keep_budget(progress)
        assert progress.micro_batch_tokens == loop.feed.layout.micro_batch_tokens
        budgets.append(progress.micro_batch_tokens)
    return budgets, records


def test_rehearsals_leave_the_training_as_it_is(tmp_path: Path) -> None:
    task, target = replace(prepare(tmp_path), stages=STAGES[:1]), tmp_path / "found.json"
    mp.start_processes(_worker, (task, target), 1, start_method="forkserver")
    found = json.loads(target.read_text(encoding="utf-8"))
    for zero_stage in ("1", "3"):
        plain, rehearsed = found[zero_stage]
        assert len(plain) > 4 and rehearsed == plain
    assert "auto measures a GPU's memory, and this worker has none" in found["refusal"]
    # Of 850 bytes beside the margin 100 are held in any case, and a token takes 10; padded rows are 16 tokens wide.
    assert found["peaks"] == [190, 280, 260, 420] and (found["packed"], found["padded"]) == (75, 75)
    assert found["read"] == [[[1, 9], [9]], [[1, 18], [9, 9]]]
    # A run goes on with what it began with, unless less fits now; it is the run with a budget of that number.
    assert found["kept"] == [48, 40, 48, 48] and found["auto"] == found["1"][0]
