"""The actors of the scoring job, called as plain objects."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pocl_ray.config import DataConfig, DifficultyConfig, GenerationConfig, ScalingConfig, SourceConfig
from pocl_ray.data.row_store import RowStore
from pocl_ray.data.rows import prepare_rows
from pocl_ray.data.tokenization import train_tokenizer
from pocl_ray.difficulty import actors
from pocl_ray.difficulty.actors import ScoringTask, StudentActor, TeacherActor
from pocl_ray.difficulty.job import ScoringInputs, num_passes, score_rows
from pocl_ray.difficulty.tasks import unit_table
from pocl_ray.errors import ModelError
from pocl_ray.heartbeat import process_status
from pocl_ray.models.building import build_model
from pocl_ray.models.frozen import LiveTeacher
from pocl_ray.models.head_loading import load_head
from pocl_ray.models.heads import HeadWeights
from pocl_ray.models.loading import load_tokenizer
from pocl_ray.models.places import ModelRef
from pocl_ray.models.saving import save_model
from pocl_ray.records import RowsSummary
from pocl_ray.run_directory.storage import RunDirectory
from pocl_ray.teacher_cache.reader import HiddenCache, TopKCache
from pocl_ray.teacher_cache.top_k import top_k_of
from pocl_ray.teacher_cache.writer import write_index

NUM_ROWS = 6
BATCHES = [np.array([4, 1]), np.array([0, 5, 2, 3])]
LLAMA = {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> ScoringTask:
    """Six rows as `train`, the same as `dev`, and two tiny models."""
    scratch = tmp_path_factory.mktemp("actors")
    run_dir = RunDirectory.open(str(scratch), "run")
    lines = [
        json.dumps({"instruction": f"Count to {n}.", "output": " ".join("one" * n)}) for n in range(1, NUM_ROWS + 1)
    ]
    source = SourceConfig(path=str(scratch / "rows.jsonl"))
    Path(source.path).write_text("\n".join(lines), encoding="utf-8")
    train_tokenizer(lines, 300, run_dir.local("tokenizer"))
    tokenizer = load_tokenizer(str(run_dir.local("tokenizer")))
    config = DataConfig(train=source, holdout_rows=1, prompt_template="plain", max_prompt_tokens=20, max_tokens=40)
    for name in ("train", "dev"):
        prepare_rows(name, source, config, tokenizer, run_dir.local(f"rows/{name}.arrow"))
    refs = []
    for seed, width in enumerate((16, 32)):
        sizes = {"hidden_size": width, "intermediate_size": width, "max_position_embeddings": 40}
        model = build_model({**LLAMA, **sizes}, len(tokenizer), tokenizer.eos_token_id, None, seed)
        refs.append(ModelRef(str(save_model(model, tokenizer, run_dir.local(f"model_{width}")))))
    return ScoringTask(
        run_dir=run_dir,
        rows={name: f"rows/{name}.arrow" for name in ("train", "dev")},
        student_set="train",
        tokenizer="tokenizer",
        student=refs[0],
        teacher=refs[1],
        generation=GenerationConfig(sampling_temperature=0.01, max_new_tokens=4),
        max_tokens=40,
        seed=0,
        compare=True,
        cache="cache",
        cache_dtype="auto",
        use_gpu=False,
    )


def run(task: ScoringTask, name: str = "train") -> pa.Table:
    units = pa.concat_tables(StudentActor(task)(unit_table(name, BATCHES)))
    return pa.concat_tables(TeacherActor(task)(units)).sort_by("id")


def changed(task: ScoringTask, **fields: object) -> ScoringTask:
    return ScoringTask(**{**task.__dict__, **fields})


def test_without_comparison_no_hidden_states_pass_and_all_else_is_the_same(task: ScoringTask) -> None:
    alone = changed(task, compare=False, cache=None)
    units = pa.concat_tables(StudentActor(alone)(unit_table("train", BATCHES)))
    assert units["student_hidden"].null_count == len(BATCHES)
    table, full = run(alone), run(task)
    assert table["teacher_student_kl"].null_count == NUM_ROWS
    assert table["shard"].null_count == NUM_ROWS
    kept = [name for name in full.column_names if name not in ("teacher_student_kl", "shard")]
    assert table.select(kept).equals(full.select(kept))
    assert full["teacher_student_kl"].null_count == 0


def test_without_a_teacher_the_students_signals_are_the_same_and_no_others_are_there(task: ScoringTask) -> None:
    alone = changed(task, teacher=None, cache=None, compare=False)
    table = pa.concat_tables(StudentActor(alone)(unit_table("train", BATCHES))).sort_by("id")
    full = run(changed(task, cache=None))
    assert set(full.column_names) - set(table.column_names) == {
        "teacher_ce_loss",
        "teacher_student_kl",
        "teacher_entropy",
    }
    assert table.equals(full.select(table.column_names))


def test_without_prompts_nothing_is_answered_and_all_else_is_the_same(
    task: ScoringTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = run(task)
    monkeypatch.setattr(RowStore, "has_prompts", False)
    table = run(task)
    assert table["rouge_l"].null_count == table["answer_stopped"].null_count == NUM_ROWS
    kept = [name for name in full.column_names if name not in ("rouge_l", "answer_stopped", "shard")]
    assert table.select(kept).equals(full.select(kept))


@pytest.mark.parametrize(
    ("fields", "passes", "prompts"),
    [
        ({}, {16: 2, 32: 2}, NUM_ROWS),
        ({"answers": False}, {16: 2, 32: 2}, 0),
        ({"reads_student": False, "compare": False}, {32: 2}, NUM_ROWS),
    ],
)
def test_each_model_reads_what_is_asked_for_and_answers_only_then(
    task: ScoringTask,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, object],
    passes: dict[int, int],
    prompts: int,
) -> None:
    full = run(task)
    read: Counter[int] = Counter()
    answered: list[int] = []
    hidden, answer = LiveTeacher.hidden, actors.score_answers

    def counted_hidden(self: LiveTeacher, *args: torch.Tensor) -> torch.Tensor:
        hidden_NH = hidden(self, *args)
        read[hidden_NH.shape[-1]] += 1
        return hidden_NH

    def counted_answers(model: Any, tokenizer: Any, rows: RowStore, ids: Any, *rest: Any) -> Any:
        answered.extend(ids.tolist())
        return answer(model, tokenizer, rows, ids, *rest)

    monkeypatch.setattr(LiveTeacher, "hidden", counted_hidden)
    monkeypatch.setattr(actors, "score_answers", counted_answers)
    before = process_status().num_done
    own = changed(task, cache=None, **fields)
    table = run(own)
    summary = RowsSummary("train", task.rows["train"], NUM_ROWS, 0, 0, 0, 0, "")
    assert process_status().num_done - before == num_passes(own, [summary]), "the bar comes to its end"
    assert read == passes and len(answered) == prompts
    measured = [name for name in table.column_names if table[name].null_count == 0]
    assert table.select(measured).equals(full.select(measured))
    assert ("rouge_l" in measured) == bool(prompts) and ("ce_loss" in measured) == (16 in passes)


def test_a_scoring_that_asks_no_model_gives_the_lengths(task: ScoringTask) -> None:
    summary = RowsSummary("train", task.rows["train"], NUM_ROWS, 0, 0, 0, 0, "")
    inputs = ScoringInputs(
        rows=summary,
        dev_rows=summary,
        run_dir=task.run_dir,
        tokenizer="tokenizer",
        student=task.student,
        teacher=None,
        cache=None,
        difficulty=DifficultyConfig.model_validate({"signals": ["response_tokens"]}),
        max_tokens=40,
        seed=0,
        answers=False,
        reads_student=False,
    )
    table, counts = score_rows(inputs, ScalingConfig())
    full = run(changed(task, cache=None))
    assert table.equals(full.select(table.column_names))
    assert table.column_names == ["id", "num_prompt_tokens", "num_response_tokens"] and counts["num_rows"] == NUM_ROWS


def test_a_set_of_the_teacher_alone_passes_the_student_by(task: ScoringTask) -> None:
    table = run(task, "dev")
    assert table["set"].unique().to_pylist() == ["dev"]
    assert all(table[name].null_count == NUM_ROWS for name in ("rouge_l", "ce_loss", "teacher_student_kl"))
    assert table["teacher_ce_loss"].equals(run(task)["teacher_ce_loss"])


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_large_tasks_give_several_shards_that_make_one_cache(
    task: ScoringTask, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pocl_ray.difficulty.actors._MAX_SHARD_BYTES", 1)
    table = run(changed(task, cache=f"cache_{dtype}", cache_dtype=dtype))
    shards = table["shard"].unique().to_pylist()
    assert len(shards) == len(BATCHES)
    directory = task.run_dir.local(f"cache_{dtype}/train")
    meta = write_index(directory, shards, "teacher", "rows")
    assert meta.layout.dtype == ("float32" if dtype == "auto" else dtype)
    cache = HiddenCache.open(directory, "teacher", "rows", NUM_ROWS)
    assert cache.num_tokens(np.arange(NUM_ROWS)).tolist() == table["num_response_tokens"].to_pylist()
    assert task.teacher is not None
    head = load_head(task.teacher)
    cache.check_head(head, "teacher")
    with pytest.raises(ModelError, match=r"^teacher: the LM head read from its files gives other logits"):
        cache.check_head(HeadWeights(head.weight_VH.flip(0), head.bias_V, head.transform), "teacher")


@pytest.mark.parametrize(("dtype", "stored"), [("auto", "float32"), ("float16", "float16")])
def test_the_likeliest_tokens_are_kept_of_the_logits_that_give_the_signals(
    task: ScoringTask, dtype: str, stored: str
) -> None:
    table = run(changed(task, cache=f"topk_{dtype}", cache_dtype=dtype, top_k=5))
    assert table.drop_columns(["shard"]).equals(run(task).drop_columns(["shard"])), "signals are the same"
    directory = task.run_dir.local(f"topk_{dtype}/train")
    meta = write_index(directory, table["shard"].to_pylist(), "teacher", "rows")
    assert (meta.layout.dtype, meta.layout.width) == (stored, 5)
    cache = TopKCache.open(directory, "teacher", "rows", NUM_ROWS)
    teacher = LiveTeacher(task.teacher)
    actor, ids = TeacherActor(task), np.arange(NUM_ROWS)
    read = actor.read(teacher, actor.rows("train"), ids)
    taken, expected = cache.take(ids), top_k_of(teacher.head.logits(read.hidden_NH), 5)
    assert taken.vocab_size == teacher.head.vocab_size
    assert (taken.ids_NK == expected.ids_NK).float().mean() > 0.99, "but for near ties"
    torch.testing.assert_close(taken.log_probs(1.5), expected.log_probs(1.5), rtol=0, atol=2e-2)


def test_the_likeliest_tokens_are_of_the_vocabulary_that_both_models_share(task: ScoringTask) -> None:
    """The student's logits end before the teacher's do: a padded vocabulary."""
    tokenizer = load_tokenizer(str(task.run_dir.local("tokenizer")))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 40}
    model = build_model({**LLAMA, **sizes}, len(tokenizer) - 4, tokenizer.eos_token_id, None, 3)
    place = save_model(model, tokenizer, task.run_dir.local("model_short"))
    short = changed(task, student=ModelRef(str(place)), cache="topk_short", top_k=5, compare=False)
    table = pa.concat_tables(TeacherActor(short)(pa.concat_tables(StudentActor(task)(unit_table("dev", BATCHES)))))
    meta = write_index(task.run_dir.local("topk_short/dev"), table["shard"].to_pylist(), "teacher", "rows")
    assert meta.layout.vocab_size == len(tokenizer) - 4


def test_a_teacher_of_another_tokenizer_reads_its_own_rows_and_the_lengths_stay_the_students(task: ScoringTask) -> None:
    texts = ["Count to one one"]
    train_tokenizer(texts * 3, 270, task.run_dir.local("teacher_tokenizer"))
    own = load_tokenizer(str(task.run_dir.local("teacher_tokenizer")))
    source = SourceConfig(path=str(Path(task.run_dir.uri).parent / "rows.jsonl"))
    config = DataConfig(train=source, holdout_rows=1, prompt_template="plain", max_prompt_tokens=20, max_tokens=40)
    theirs = {"train": "rows/for_teacher/train.arrow"}
    prepare_rows("train", source, config, own, task.run_dir.local(theirs["train"]))
    alone = changed(task, rows=theirs, compare=False, cache="own")  # a run whose only tokenizer is the teacher's
    bridged = changed(task, teacher_rows=theirs, compare=False, cache="bridged")
    narrow = changed(bridged, cache="narrow", batch_tokens=60)
    ours, read, cut, expected = run(task), run(bridged), run(narrow), run(alone)

    for name in ("num_prompt_tokens", "num_response_tokens", "ce_loss", "rouge_l"):
        assert read[name].equals(ours[name])
    assert not read["num_response_tokens"].equals(expected["num_response_tokens"])
    for name in ("teacher_ce_loss", "teacher_entropy"):
        np.testing.assert_allclose(read[name].to_numpy(), expected[name].to_numpy(), rtol=1e-5)
        np.testing.assert_allclose(cut[name].to_numpy(), expected[name].to_numpy(), rtol=1e-5)
    assert read["teacher_student_kl"].null_count == NUM_ROWS

    taken = {}
    for place, table in (("own", expected), ("bridged", read), ("narrow", cut)):
        directory = task.run_dir.local(f"{place}/train")
        write_index(directory, table["shard"].unique().to_pylist(), "teacher", "rows")
        cache = HiddenCache.open(directory, "teacher", "rows", NUM_ROWS)
        assert cache.num_tokens(np.arange(NUM_ROWS)).tolist() == expected["num_response_tokens"].to_pylist()
        taken[place] = cache.take(np.arange(NUM_ROWS))
    torch.testing.assert_close(taken["bridged"], taken["own"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(taken["narrow"], taken["own"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_rows_on_which_a_model_overflows_are_refused_by_number_and_dtype(
    task: ScoringTask, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = LiveTeacher.hidden

    def overflows(model: LiveTeacher, ids_BT: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        """Float16 overflows in the first token of the second micro-batch."""
        hidden_NH = hidden(model, ids_BT, *rest).half()
        is_mine = hidden_NH.shape[1] == (32 if role == "teacher" else 16)
        return hidden_NH.index_fill(0, torch.tensor([0]), torch.inf) if is_mine and len(ids_BT) == 4 else hidden_NH

    monkeypatch.setattr(LiveTeacher, "hidden", overflows)
    expected = rf"^{role}: its outputs for row 1 of train are not finite in float16; set {role}.dtype to bfloat16"
    with pytest.raises(ModelError, match=expected):
        run(task)


def test_outputs_that_do_not_fit_the_caches_dtype_are_refused(
    task: ScoringTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = LiveTeacher.hidden
    monkeypatch.setattr(LiveTeacher, "hidden", lambda model, *batch: hidden(model, *batch) * 1e6)
    with pytest.raises(
        ModelError, match=r"^distill.cache_dtype: the teacher's outputs for rows 2, 5 of train overflow"
    ):
        run(changed(task, cache_dtype="float16"))
