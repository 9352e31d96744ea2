"""Several trainings in one process: each comes out as if alone, and one that diverges leaves the next one whole."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp
from runs import prepare

from pocl_ray.config import EvaluationConfig
from pocl_ray.distill.task import TrainTask
from pocl_ray.errors import DivergedError
from pocl_ray.trainings.judge import JudgeTask
from pocl_ray.trainings.process import Job, TrainingProcess


def job(task: TrainTask, name: str, **changes: Any) -> Job:
    evaluation = EvaluationConfig.model_validate({"seeds": [3, 4], "generation": {"max_new_tokens": 6}})
    teacher = task.teachers[0].ref
    judged = JudgeTask(task.run_dir, {"test": task.dev_rows.path}, teacher, "tokenizer", evaluation, task.max_tokens)
    return Job(name, replace(task, **changes), judged, row_steps=(3, task.num_steps))


def _worker(_: int, task: TrainTask, target: Path) -> None:
    process, results, told = TrainingProcess(num_threads=1, use_gpu=False), [], []
    diverging = task.train.model_copy(update={"learning_rate": 1e30})
    again, other = job(task, "again"), job(task, "other", seed=6)
    unread = job(task.without_unread_answers(), "unread")
    for each in (job(task, "first"), job(task, "bad", train=diverging), again, other, unread):
        try:
            results.append(process.run(each, lambda step, tokens: told.append(step)))
        except DivergedError as error:
            results.append({"failure": str(error)})
    has_inductor = "torch._inductor.compile_fx" in sys.modules
    target.write_text(json.dumps([results, told, has_inductor]), encoding="utf-8")


def test_trainings_share_a_process_and_nothing_else(tmp_path: Path) -> None:
    task, target = prepare(tmp_path), tmp_path / "results.json"
    mp.start_processes(_worker, (task, target), 1, start_method="forkserver")
    (first, bad, again, other, unread), told, has_inductor = json.loads(target.read_text(encoding="utf-8"))
    assert not has_inductor, "DeepSpeed compiles an optimizer that nobody uses, and a start pays for it"
    assert set(first["figures"]["test"]) == {
        "rouge_l", "exact_match", "sampled_rouge_l", "sampled_exact_match", "kl", "ce_loss",
    }  # fmt: skip
    for key in ("figures", "curve", "losses", "row_losses", "num_steps", "num_tokens"):
        assert first[key] == again[key]
    assert first["num_steps"] == task.num_steps
    rows = first["row_losses"]
    assert set(rows) == {"kl", "ce_loss"} and set(rows["kl"]) == {"3", str(task.num_steps)}
    assert len(rows["kl"]["3"]) == task.dev_rows.num_rows and rows["kl"]["3"] != rows["kl"][str(task.num_steps)]
    assert other["figures"] != first["figures"]
    assert (unread["figures"], unread["losses"]) == (first["figures"], first["losses"]), "dev answers change no weight"
    assert all("rouge_l" in point for point in first["curve"])
    assert all("ce_loss" in point and "rouge_l" not in point for point in unread["curve"])
    assert "in a row that are not finite" in bad["failure"]
    assert max(told) == task.num_steps


def test_dev_answers_that_training_reads_are_kept(tmp_path: Path) -> None:
    task = prepare(tmp_path)
    assert task.without_unread_answers().max_dev_rows == 0
    best = replace(task, hand_off="best")
    ends_early = replace(task, stages=(*task.stages[:-1], replace(task.stages[-1], min_epochs=1)))
    assert best.without_unread_answers() == best and ends_early.without_unread_answers() == ends_early
