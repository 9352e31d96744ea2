"""`pocl-ray init`: what it recognises, what it chooses, and that the config it writes is one that can be planned."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocl_ray.advice.choices import Machine, choose_cache, choose_holdout, choose_tokens, choose_training
from pocl_ray.advice.cost import GIB, WorkerMemory
from pocl_ray.advice.first_rows import Lengths, recognise
from pocl_ray.advice.init import Request, init
from pocl_ray.advice.model_shape import ModelShape
from pocl_ray.config import load_config
from pocl_ray.data.readers import SourceRow
from pocl_ray.errors import ConfigError, DataError, ModelError, ResourceError, StorageError
from pocl_ray.models.shapes import ModelSize
from pocl_ray.preview import print_plan

TEACHER = "samples://quickstart-teacher"


def row(**values: Any) -> SourceRow:
    return SourceRow("rows.jsonl", 1, values)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return str(path)


def shape(num_weights: float, width: int = 1024, layers: int = 24) -> ModelShape:
    return ModelShape(
        int(num_weights), width, layers, 4096, ModelSize(int(num_weights), width * 50_000, width * layers)
    )


def lengths(prompts: list[int], responses: list[int]) -> Lengths:
    return Lengths(np.array(prompts), np.array(responses), 0, "", ("", ""), is_counted=True)


@pytest.mark.parametrize(
    ("columns", "task", "mapping"),
    [
        (["instruction", "input", "output"], "instruction", {}),
        (["prompt", "completion"], "instruction", {}),
        (["prompt", "response"], "instruction", {}),
        (["question", "answer"], "instruction", {}),
        (["messages", "id"], "instruction", {}),
        (["conversations"], "instruction", {}),
        (["text"], "text", {}),
        (["article", "highlights"], "summarization", {}),
        (["article", "summary"], "summarization", {"document": "article", "summary": "summary"}),
        (["Question", "Answer"], "instruction", {"prompt": "Question", "output": "Answer"}),
        (["query", "reply", "id"], "instruction", {"prompt": "query", "output": "reply"}),
    ],
)
def test_columns_are_recognised(columns: list[str], task: str, mapping: dict[str, str]) -> None:
    found = recognise("rows.jsonl", [row(**dict.fromkeys(columns, "a"))], {})
    assert (found.task, found.mapping) == (task, mapping)


def test_columns_that_say_nothing_are_named_with_the_way_to_map_them() -> None:
    with pytest.raises(DataError, match=r"rows.jsonl: .*found: foo, bar; .*--columns prompt=NAME,output=NAME"):
        recognise("rows.jsonl", [row(foo="a", bar="b")], {})
    found = recognise("rows.jsonl", [row(foo="a", bar="b")], {"prompt": "foo", "output": "bar"})
    assert found.mapping == {"prompt": "foo", "output": "bar"}
    with pytest.raises(DataError, match=r"no column 'fo'.*did you mean 'foo'"):
        recognise("rows.jsonl", [row(foo="a", bar="b")], {"prompt": "fo", "output": "bar"})


def test_lengths_that_fit_are_kept_whole() -> None:
    chosen = choose_tokens(lengths([20] * 99 + [200], [30] * 100), 512)
    assert chosen.max_prompt_tokens >= 20 and chosen.max_tokens >= 50
    assert chosen.cut_share <= 0.01
    assert chosen.max_prompt_tokens < chosen.max_tokens


@pytest.mark.parametrize(("prompt", "response"), [(4000, 20), (20, 4000), (3000, 3000)])
def test_rows_that_are_too_long_leave_room_for_both_sides(prompt: int, response: int) -> None:
    chosen = choose_tokens(lengths([prompt] * 10, [response] * 10), 512)
    assert chosen.max_tokens == 512 and 16 <= chosen.max_prompt_tokens < 512
    assert chosen.max_tokens - chosen.max_prompt_tokens >= min(response, 256)
    assert chosen.cut_share == 1.0


@pytest.mark.parametrize(("num_rows", "held_out"), [(1, 1), (60, 10), (300, 50), (2000, 100), (100_000, 500)])
def test_few_rows_hold_out_enough_to_see_a_difference(num_rows: int, held_out: int) -> None:
    assert choose_holdout(num_rows) == held_out


def machine(num_workers: int, gib: float, target: Any = "cluster") -> Machine:
    return Machine(target, num_workers, gib, 8, None, has_bf16=True, is_seen=False)


def test_a_small_student_takes_no_precautions() -> None:
    chosen = choose_training(machine(1, 24, "gpu"), shape(1.35e8, 576, 30), 28_000_000, 512, 10_000, is_cut=False)
    assert chosen.memory.zero_stage == 1 and not chosen.memory.gradient_checkpointing
    assert chosen.memory.precision == "bf16" and chosen.learning_rate == 5e-5
    assert chosen.global_batch_rows == 32 and chosen.num_steps == 3 * 10_000 // 32


def test_larger_students_take_higher_zero_stages() -> None:
    stages = [
        choose_training(machine(8, 80), shape(weights, 4096, 32), 10**8, 1024, 100_000, is_cut=False).memory.zero_stage
        for weights in (1e9, 1.2e10, 1.6e10, 3e10)
    ]
    assert stages == sorted(stages) and stages[0] == 1 and stages[-1] == 3


def test_a_student_that_fits_nowhere_is_refused() -> None:
    with pytest.raises(ResourceError, match=r"70B parameters needs about .* GiB on each of 1 worker.*--gpus"):
        choose_training(machine(1, 24, "gpu"), shape(7e10, 8192, 80), 10**8, 1024, 100_000, is_cut=False)


def test_memory_of_a_worker_by_hand() -> None:
    student = shape(1e9, 1000, 10)
    one = WorkerMemory("bf16", 1, 4, 1, gradient_checkpointing=False).num_bytes(student, 0, 0, chunk_mib=0)
    assert one == pytest.approx(2e9 + 2e9 + 12e9 / 4 + GIB)
    three = WorkerMemory("bf16", 3, 4, 1, gradient_checkpointing=False).num_bytes(student, 0, 0, chunk_mib=0)
    assert three == pytest.approx(16e9 / 4 + GIB)
    tokens = WorkerMemory("fp32", 1, 1, 2, gradient_checkpointing=False).num_bytes(student, 0, 100, chunk_mib=0)
    assert tokens == pytest.approx(4e9 + 4e9 + 12e9 + 200 * 68 * 1000 * 10 + GIB)


def test_a_cache_that_would_fill_the_disk_keeps_the_likeliest_tokens() -> None:
    here = Machine("gpu", 1, 24, 8, int(100 * GIB), has_bf16=True, is_seen=True)
    assert choose_cache(here, 10 * GIB)[0] == "hidden"
    assert choose_cache(here, 50 * GIB)[0] == "topk"


@pytest.mark.parametrize("target", ["laptop", "gpu", "cluster"])
def test_the_written_config_can_be_planned(
    target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    train = write(tmp_path / "rows.jsonl", [{"query": f"say {i}", "answer": "word " * (i % 7 + 1)} for i in range(300)])
    out = init(Request(TEACHER, "1", train, target=target))
    shown = capsys.readouterr().out
    assert out == Path("quickstart-teacher-1-layers.yaml")
    assert "prompt=query" in shown and f"pocl-ray run {out}" in shown
    config = load_config(out)
    assert config.curriculum.pacing == "frontier" and config.train.lr_schedule == "wsd"
    assert config.data.train.columns == {"prompt": "query", "output": "answer"}
    assert config.data.prompt_template == "chat" and config.data.holdout_rows == 50
    print_plan(config, None)
    assert "frontier: 250 rows" in capsys.readouterr().out


def test_a_file_that_is_there_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train = write(tmp_path / "rows.jsonl", [{"text": f"a story of {i}"} for i in range(64)])
    Path("c.yaml").write_text("mine", encoding="utf-8")
    request = Request(TEACHER, TEACHER, train, out=Path("c.yaml"), target="laptop")
    with pytest.raises(StorageError, match=r"c.yaml: is there already; .*--force"):
        init(request)
    assert Path("c.yaml").read_text(encoding="utf-8") == "mine"
    init(Request(**{**vars(request), "force": True}))
    assert load_config("c.yaml").data.task == "text"
    Path("runs").mkdir()
    Path("runs/mine").touch()
    with pytest.raises(StorageError, match=r"runs: cannot be written \(it is a directory\)"):
        init(Request(**{**vars(request), "force": True, "out": Path("runs")}))
    assert Path("runs/mine").exists()
    for out, name in (("o d\u00fc \n.yaml", "o-d"), ("\udcff.yaml", "run"), ("deep/er/own.yaml", "own")):
        init(Request(**{**vars(request), "out": Path(out)}))
        assert load_config(out).name == name
    with pytest.raises(StorageError, match=r"x: cannot be written \(File name too long\); choose another --out"):
        init(Request(**{**vars(request), "out": Path("x" * 300)}))


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"train": "none.jsonl"}, DataError, "none.jsonl: no such file"),
        ({"teacher": "./none"}, ModelError, "./none: no such model directory"),
        ({"columns": "prompt"}, ConfigError, "--columns 'prompt': write ROLE=NAME"),
        ({"columns": "prompt=a,prompt=b"}, ConfigError, "gives prompt=b and prompt=a; name each once"),
        ({"columns": "prompt=a,output=a"}, ConfigError, "gives output=a and prompt=a; name each once"),
        ({"train": ""}, DataError, "--train is empty; name a file"),
        ({"columns": "promt=a"}, ConfigError, "a role is one of prompt"),
        ({"student": "9"}, ModelError, "layers"),
        ({"student": "40"}, ModelError, "layers"),
        ({"student": "0"}, ConfigError, "--student 0: at least 1 layer of the teacher is needed"),
        ({"student": "-3"}, ConfigError, "--student -3: at least 1 layer of the teacher is needed"),
        ({"student": "./none"}, ModelError, "./none: no such model directory"),
        ({"student": ""}, ModelError, "--student is empty; name a model directory or a Hub id"),
        ({"teacher": " "}, ModelError, "--teacher is empty; name a model directory or a Hub id"),
        ({"teacher": "rows.jsonl"}, ModelError, "rows.jsonl: is a file; a model is a directory"),
        ({"student": "./rows.jsonl"}, ModelError, "./rows.jsonl: is a file; a model is a directory"),
        ({"gpu_gib": math.nan}, ConfigError, "--gpu-gib nan: write the memory of a GPU in GiB"),
        ({"gpu_gib": math.inf}, ConfigError, "--gpu-gib inf: write the memory of a GPU in GiB"),
        ({"train": "broken.jsonl"}, DataError, "none of its first 1 rows can be read"),
        ({"train": "empty.jsonl"}, DataError, "of the first 20 rows cannot be used"),
        ({"train": "one.jsonl"}, DataError, "one.jsonl: of one row no dev row can be held out; .*--dev"),
    ],
)
def test_a_mistake_writes_nothing(
    changes: dict[str, Any], error: type[Exception], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", [{"prompt": f"say {i}", "output": str(i)} for i in range(20)])
    write(tmp_path / "empty.jsonl", [{"prompt": f"say {i}", "output": "" if i % 3 else "a"} for i in range(20)])
    write(tmp_path / "one.jsonl", [{"prompt": "say 1", "output": "1"}])
    Path("broken.jsonl").write_text("{\n", encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=says.replace("(", r"\(")):
        init(Request(**{"teacher": TEACHER, "student": "1", "train": "rows.jsonl", "target": "laptop", **changes}))
    assert sorted(tmp_path.iterdir()) == before


def test_two_tokenizers_are_bridged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pocl_ray.advice import init as module

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "_differ", lambda *_: True)
    write(tmp_path / "rows.jsonl", [{"prompt": f"say {i}", "output": str(i)} for i in range(40)])
    config = load_config(init(Request(TEACHER, TEACHER, "rows.jsonl", target="laptop")))
    assert config.teacher.cross_tokenizer == "uld" and config.distill.loss == "uld"
    assert config.curriculum.pacing == "none" and config.curriculum.kd_ratio.bounds() == (0.6, 0.6)
    print_plan(config, None)


def test_models_that_cannot_be_looked_at_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pocl_ray.advice import model_shape
    from pocl_ray.errors import HubUnreachableError

    def unreachable(*_: Any) -> None:
        raise HubUnreachableError("owner/model: the Hub cannot be reached")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_shape, "skeleton", unreachable)
    write(tmp_path / "rows.jsonl", [{"prompt": f"say {i}", "output": str(i)} for i in range(40)])
    out = init(Request("owner/large-Instruct", "owner/small", "rows.jsonl", target="gpu"))
    shown = " ".join(capsys.readouterr().out.split())
    assert "the Hub cannot be reached" in shown and "3.5 characters a token" in shown
    assert load_config(out).data.prompt_template == "chat"
