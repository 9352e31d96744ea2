"""The teachers of each stage with their weights, and the outputs that the feed puts into its batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import STAGES, prepare, stage, with_teacher

from pocl_ray.config import DistillConfig
from pocl_ray.data.batching import Layout, MicroBatch
from pocl_ray.data.row_store import RowStore
from pocl_ray.distill.feed import Feed, Teachers, TeacherSource, load_teachers, teachers_of
from pocl_ray.distill.task import TrainTask
from pocl_ray.errors import StorageError
from pocl_ray.models.places import ModelRef
from pocl_ray.teacher_cache.top_k import top_k_of
from pocl_ray.teacher_cache.writer import write_index, write_shard

V = 300


class Speaker:
    """A live teacher whose hidden states say who it is."""

    reads_packed = True

    def __init__(self, value: float) -> None:
        self.value = value

    def hidden(
        self, input_ids_BT: torch.Tensor, attention_mask_BT: torch.Tensor, index_N: torch.Tensor, row_lengths: object
    ) -> torch.Tensor:
        return torch.full((len(index_N), 2), self.value)


def speakers(*settings: tuple[float, tuple[int, ...] | None]) -> Teachers:
    return Teachers(
        tuple(
            TeacherSource(live=Speaker(float(index)), index=index, weight=weight, stages=stages)  # type: ignore[arg-type]
            for index, (weight, stages) in enumerate(settings)
        )
    )


def shares(batch: MicroBatch) -> list[tuple[int, float]]:
    return [(teacher_outputs.teacher, teacher_outputs.weight) for teacher_outputs in batch.teacher_outputs]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> TrainTask:
    return prepare(tmp_path_factory.mktemp("teachers"))


def test_the_weights_of_a_stage_sum_to_1() -> None:
    teachers = speakers((1.0, (0,)), (3.0, None), (1.0, (1, 2)))
    by_stage = [[(one.index, one.weight) for one in teachers.in_stage(index).sources] for index in range(3)]
    assert by_stage == [[(0, 0.25), (1, 0.75)], [(1, 0.75), (2, 0.25)], [(1, 0.75), (2, 0.25)]]
    assert [one.weight for one in teachers.in_stage(None).sources] == [0.2, 0.6, 0.2]


def test_one_teacher_has_all_the_weight_whatever_its_own() -> None:
    assert [one.weight for one in speakers((7.0, None)).in_stage(0).sources] == [1.0]


def test_each_stage_is_taught_by_its_own_and_the_dev_rows_by_all(task: TrainTask) -> None:
    rows = RowStore.open(task.run_dir.local(task.rows.path))
    feed = Feed(rows, Layout(0, 4), 0, 1, speakers((1.0, (0,)), (1.0, (1,))))
    for planned in STAGES:
        batches = [b for g in feed.stage(planned, np.arange(16), 8, 5, 0) for b in g.micro_batches]
        assert all(shares(batch) == [(planned.index, 1.0)] for batch in batches)
        assert all(float(batch.teacher_outputs[0].tokens.mean()) == planned.index for batch in batches)  # type: ignore[union-attr]
    assert all(shares(batch) == [(0, 0.5), (1, 0.5)] for batch, _ in feed.evaluation())


def test_without_a_teacher_a_batch_says_nothing_of_one(task: TrainTask) -> None:
    rows = RowStore.open(task.run_dir.local(task.rows.path))
    batch = next(iter(Feed(rows, Layout(0, 4), 0, 1).stage(stage(0, 16), np.arange(16), 8, 5, 0)))
    assert all(part.teacher_outputs == () for part in batch.micro_batches)


def top_k_task(task: TrainTask, folder: str, top_k: int = 4, **changes: str) -> TrainTask:
    """A task of one teacher whose likeliest tokens are stored in `folder`."""
    generator = torch.Generator().manual_seed(0)
    rows = RowStore.open(task.run_dir.local(task.rows.path))
    for made in (task.rows, task.dev_rows):
        rows = RowStore.open(task.run_dir.local(made.path))
        kept = [top_k_of(torch.randn(int(n), V, generator=generator), top_k) for n in rows.response_lengths]
        place = Path(task.run_dir.uri_of(f"{folder}/{made.name}"))
        shard = write_shard(place, np.arange(made.num_rows), kept)
        marks = {"teacher": "teacher", "rows": made.fingerprint, **changes}
        write_index(place, [shard.name], marks["teacher"], marks["rows"])
    distill = DistillConfig(teacher_cache="topk", top_k=4)
    return replace(with_teacher(task, cache=folder), distill=distill)


def test_a_top_k_cache_needs_neither_the_teacher_nor_its_head(task: TrainTask) -> None:
    cached = top_k_task(task, "alone")
    gone = with_teacher(cached, ref=ModelRef("no/such/teacher"))
    loaded = load_teachers(gone, torch.device("cpu"))
    assert [(one.head, one.live) for one in loaded] == [(None, None)]
    teachers = teachers_of(gone, gone.rows, loaded, V)
    ids = np.array([5, 2])
    lengths_R = RowStore.open(task.run_dir.local(task.rows.path)).response_lengths[ids]
    (teacher_outputs,) = teachers.in_stage(0).stored(ids, lengths_R)
    assert len(teacher_outputs.tokens) == lengths_R.sum()


@pytest.mark.parametrize(
    ("changes", "top_k", "num_logits", "reason"),
    [
        ({"teacher": "another"}, 4, V, "made by another teacher; score again"),
        ({"rows": "others"}, 4, V, "belongs to other rows; score again"),
        ({}, 5, V, r"keeps 5 tokens, and distill\.top_k is 4; score again"),
        ({}, 4, V - 1, "over 300 tokens, more than the student's 299; score again"),
    ],
)
def test_a_top_k_cache_of_something_else_is_refused_with_the_reason(
    task: TrainTask, tmp_path: Path, changes: dict[str, str], top_k: int, num_logits: int, reason: str
) -> None:
    cached = top_k_task(task, tmp_path.name, top_k, **changes)
    loaded = load_teachers(cached, torch.device("cpu"))
    with pytest.raises(StorageError, match=reason) as error:
        teachers_of(cached, cached.rows, loaded, num_logits)
    assert "\n" not in str(error.value)


def test_each_teacher_has_its_own_cache(task: TrainTask) -> None:
    first, second = top_k_task(task, "first"), top_k_task(task, "second", teacher="second")
    (one,) = first.teachers
    other = replace(one, cache="second", fingerprint="second", weight=3.0, stages=(1,))
    both = replace(first, teachers=(one, other))
    assert [one.cache for one in both.teachers] == ["first", "second"]
    teachers = teachers_of(both, both.rows, load_teachers(both, torch.device("cpu")), V)
    assert [(t.teacher, t.weight) for t in teachers.in_stage(1).stored(np.array([0]), np.array([1]))] == [
        (0, 0.25),
        (1, 0.75),
    ]
    swapped = replace(both, teachers=(replace(one, cache="second"), other))
    with pytest.raises(StorageError, match="made by another teacher"):
        teachers_of(swapped, swapped.rows, load_teachers(swapped, torch.device("cpu")), V)
    assert second.teachers[0].cache == "second"
