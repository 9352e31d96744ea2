"""A curriculum for other trainers: the rows of its steps are those of pocl-ray's own loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler
from trainings import BATCH_ROWS, NUM_ROWS, plan

from pocl_ray.config import Config, CurriculumConfig
from pocl_ray.config.loading import dump_config
from pocl_ray.curriculum.schedule import plan_stages
from pocl_ray.data.batching import global_batches, random_order
from pocl_ray.data.row_store import ROWS_SCHEMA
from pocl_ray.errors import ConfigError, DataError
from pocl_ray.integrations.curriculum import Curriculum


def test_the_sampler_yields_the_global_batches_of_every_stage() -> None:
    curriculum = plan()
    expected = [
        ids
        for stage in curriculum.stages
        for ids in global_batches(stage, curriculum.ranked[: stage.end_rank], BATCH_ROWS, curriculum.seed)
    ]
    sampler = curriculum.sampler()
    assert len(expected) == curriculum.num_steps == 8
    assert len(sampler) == 8 * BATCH_ROWS
    assert list(sampler) == list(sampler) == np.concatenate(expected).tolist()


def test_the_first_stage_sees_the_easiest_rows_alone() -> None:
    curriculum = plan()
    first = list(curriculum.sampler())[: curriculum.stages[0].num_steps * BATCH_ROWS]
    assert set(first) <= set(curriculum.ranked[:6].tolist())


def test_random_pacing_takes_the_order_of_the_seed() -> None:
    curriculum = plan(pacing="random")
    rows = set(random_order(NUM_ROWS, curriculum.seed)[:6].tolist())
    assert set(list(curriculum.sampler())[: 2 * BATCH_ROWS]) <= rows


def test_a_point_tells_stage_temperature_and_ratio_of_a_step() -> None:
    curriculum = plan()
    points = [curriculum.at(step) for step in (0, 1, 2, 7, 99)]
    assert [(p.stage, p.stage_step, p.kd_temperature, p.kd_ratio) for p in points] == [
        (0, 0, 1.0, 0.5),
        (0, 1, 1.0, 0.5),
        (1, 0, 2.0, 1.0),
        (1, 5, 2.0, 1.0),
        (1, 5, 2.0, 1.0),
    ]


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_processes_share_the_rows_of_each_step(num_processes: int) -> None:
    curriculum = plan()
    micro_rows, accumulation = 1, BATCH_ROWS // num_processes
    shards = [
        list(BatchSamplerShard(BatchSampler(curriculum.sampler(), micro_rows, False), num_processes, rank))
        for rank in range(num_processes)
    ]
    for step, expected in enumerate(curriculum.batches()):
        mine = [shard[step * accumulation : (step + 1) * accumulation] for shard in shards]
        assert sorted(row for share in mine for batch in share for row in batch) == sorted(expected.tolist())


def test_signals_are_ranked_in_memory() -> None:
    config = CurriculumConfig(pacing="one_pass", num_buckets=3, interval_epochs=1)
    curriculum = Curriculum.from_signals({"ce_loss": [3.0, 1.0, 2.0, 0.5, 2.5, 0.1]}, config, 2)
    assert curriculum.ranked.tolist() == [5, 3, 1, 2, 4, 0]
    assert [set(rows.tolist()) for rows in curriculum.batches()] == [{5, 3}, {1, 2}, {4, 0}]


def a_run(folder: Path, source_rows: list[int]) -> Config:
    """The files of a scored run; row i has rank i + 1."""
    config = Config.model_validate(
        {
            "name": "scored",
            "storage_path": str(folder),
            "data": {"train": {"path": "x.jsonl"}, "holdout_rows": 1},
            "teacher": {"path": "t"},
            "student": {"path": "s"},
            "curriculum": {"num_buckets": 2, "interval_epochs": 1},
            "train": {"global_batch_rows": 2, "seed": 9, "learning_rate": 1e-5},
        }
    )
    num_rows = len(source_rows)
    (folder / "scored" / "rows").mkdir(parents=True)
    (folder / "scored" / "config.yaml").write_text(dump_config(config))
    pq.write_table(pa.table({"id": range(num_rows), "rank": range(1, num_rows + 1)}), folder / "scored/scores.parquet")
    rows = pa.table(
        [
            pa.array(range(num_rows)),
            pa.array(source_rows),
            pa.nulls(num_rows, pa.string()),
            ["p"] * num_rows,
            [["r"]] * num_rows,
            pa.array([[1]] * num_rows, pa.list_(pa.int32())),
            pa.array([[2]] * num_rows, pa.list_(pa.int32())),
        ],
        schema=ROWS_SCHEMA,
    )
    with pa.OSFile(str(folder / "scored/rows/train.arrow"), "wb") as file, pa.ipc.new_file(file, ROWS_SCHEMA) as out:
        out.write_table(rows)
    return config


def test_a_finished_run_names_the_rows_of_its_source(tmp_path: Path) -> None:
    config = a_run(tmp_path, source_rows=[1, 2, 4, 6, 7])  # 3 was rejected, 5 held out
    curriculum = Curriculum.from_run(str(tmp_path), "scored")
    assert curriculum.stages == plan_stages(config, 5)
    assert (curriculum.seed, curriculum.global_batch_rows) == (9, 2)
    assert set(next(curriculum.batches()).tolist()) == {0, 1}
    assert set(curriculum.sampler()) <= {0, 1, 3, 5, 6}


def test_a_run_whose_source_rows_are_not_one_data_set_is_refused(tmp_path: Path) -> None:
    a_run(tmp_path, source_rows=[1, 2, 1, 2])
    with pytest.raises(DataError, match="no place in one data set"):
        Curriculum.from_run(str(tmp_path), "scored")


def test_a_run_on_the_teachers_responses_is_refused(tmp_path: Path) -> None:
    config = a_run(tmp_path, source_rows=[1, 2])
    data = config.data.model_copy(update={"responses": "teacher"})
    (tmp_path / "scored" / "config.yaml").write_text(dump_config(config.model_copy(update={"data": data})))
    with pytest.raises(ConfigError, match="ranks other responses than the data set holds"):
        Curriculum.from_run(str(tmp_path), "scored")


def test_a_run_that_is_not_scored_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"config\.yaml: no such file; run `pocl-ray score`"):
        Curriculum.from_run(str(tmp_path), "none")


def test_ranks_that_are_no_ranking_are_refused() -> None:
    with pytest.raises(DataError, match="each of 1 to 3 once"):
        Curriculum.from_ranks([0, 1, 2], CurriculumConfig(num_buckets=1), 1)


def test_stages_of_open_length_are_refused() -> None:
    with pytest.raises(ConfigError, match="plateau leaves the length of a stage open"):
        plan(advance="plateau")


def test_a_ranking_alone_has_no_gaps_to_draw_rows_by() -> None:
    with pytest.raises(ConfigError, match=r"give Curriculum\.from_signals the signal teacher_student_kl"):
        Curriculum.from_ranks(np.arange(1, 13), CurriculumConfig(pacing="frontier"), BATCH_ROWS)
    with pytest.raises(ConfigError, match="give the signal teacher_student_kl as well"):
        Curriculum.from_signals({"ce_loss": np.arange(12.0)}, CurriculumConfig(pacing="frontier"), BATCH_ROWS)


def test_gaps_that_cannot_be_drawn_by_are_refused() -> None:
    signals = {"ce_loss": np.arange(12.0), "teacher_student_kl": np.ones(12)}
    rescore = CurriculumConfig.model_validate({"pacing": "frontier", "frontier": {"refresh": "rescore"}})
    with pytest.raises(ConfigError, match="refresh rescore reads rows between stages, which other trainers do not"):
        Curriculum.from_signals(signals, rescore, BATCH_ROWS)


def test_frontier_pacing_takes_its_own_defaults_where_nothing_is_set() -> None:
    config = CurriculumConfig.model_validate({"num_steps": 24, "frontier": {"num_stages": 3}})
    made = Curriculum.from_signals({"teacher_student_kl": np.ones(12)}, config, BATCH_ROWS, pacing="frontier")
    assert [stage.num_steps for stage in made.stages] == [8, 8, 8]
    assert not made.restarts
    assert (made.at(0).kd_temperature, made.at(23).kd_temperature, made.at(0).kd_ratio) == (1.0, 2.0, 1.0)
    other = Curriculum.from_signals({"teacher_student_kl": np.full(12, 2.0)}, config, BATCH_ROWS, pacing="frontier")
    assert made.digest != other.digest


def test_another_data_set_or_batch_is_refused() -> None:
    curriculum = plan()
    with pytest.raises(DataError, match="ranks row 11"):
        curriculum.check(NUM_ROWS - 1, BATCH_ROWS)
    with pytest.raises(ConfigError, match=r"takes 8 rows .* planned with 4"):
        curriculum.check(NUM_ROWS, 8)


def test_the_digest_is_that_of_plan_and_ranking() -> None:
    assert plan().digest == plan().digest
    assert plan().digest != plan(kd_ratio={"start": 0.6, "end": 1.0}).digest
