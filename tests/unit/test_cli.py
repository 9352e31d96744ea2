"""The command line: what it prints, and one line with exit code 2 for what a user got wrong."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pocl_ray import cli
from pocl_ray.errors import GaveUpError

Call = Any


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Runs `pocl-ray` in this process; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pocl-ray", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def config(tmp_path: Path) -> str:
    rows = [{"instruction": f"say {i}", "input": "", "output": str(i)} for i in range(20)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    tree = {
        "name": "run",
        "storage_path": "runs",
        "data": {"train": {"path": "train.jsonl"}, "dev": {"path": "dev.jsonl"}},
        "teacher": {"path": "./teacher"},
        "student": {"num_layers": 1},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return "c.yaml"


def refusal(result: tuple[int, str, str]) -> str:
    """The one line that a user's mistake gives."""
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err


def test_plan_prints_the_stages_of_the_paper_without_touching_anything(call: Call, config: str, tmp_path: Path) -> None:
    code, out, err = call("plan", config, "--num-rows", "11435")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines() if line.strip()]
    stages = [line for line in lines if line[0] in "0123" and len(line) == 8]
    assert [line[4] for line in stages] == ["352", "712", "1064", "1424"]
    assert [line[5] for line in stages] == ["1", "1.33", "1.67", "2"]
    assert [line[6] for line in stages] == ["0.7", "0.8", "0.9", "1"]
    assert "11435 rows" in out and "3552 optimizer steps of 64 rows" in out
    assert not (tmp_path / "runs").exists()


def test_plan_counts_the_rows_of_the_source(call: Call, config: str) -> None:
    code, out, _ = call("plan", config, "train.global_batch_rows=4", "control={}")
    assert code == 0
    assert "20 rows" in out and "control: plain distillation" in out


def test_evaluate_prints_the_figures_of_given_answers_as_json(call: Call, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"text": "The cat sat."}\n{"prediction": "nothing"}\n')
    (tmp_path / "r.jsonl").write_text('{"output": ["a dog", "the cat sat"]}\n{"output": "something else"}\n')
    code, out, err = call("evaluate", "--predictions", "p.jsonl", "--references", "r.jsonl")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"rouge_l": 50.0, "exact_match": 50.0, "num_rows": 2}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "none.yaml"], "none.yaml: no such config file"),
        (["plan", "quickstrat"], "quickstrat: no such config file; did you mean quickstart? The package brings "),
        (["init", "--teacher", "t", "--student", "s", "--train", "r", "--for", "phone"], "--for phone: unknown"),
        (["plan", "c.yaml", "train.learning_rte=1"], "did you mean train.learning_rate?"),
        (["run", "c.yaml", "trian.eps=1"], "did you mean train?"),
        (["plan", "c.yaml", "train.eps=-1"], "c.yaml: train.eps"),
        (["plan", "c.yaml", "train.eps"], "write it as key.sub=value"),
        (
            ["plan", "c.yaml", "distill.loss=revrse_kl"],
            "distill.loss: loss 'revrse_kl' is unknown; did you mean",
        ),
        (["plan", "c.yaml", "distill={loss: generalized_jsd, loss_args: {beta: 1.2}}"], "beta must be a number in [0"),
        (["plan", "c.yaml", "difficulty.signals=[ce_los]"], "did you mean ce_loss"),
        (["plan", "c.yaml", "c.yml"], "c.yml: no such config file; did you mean c.yaml?"),
        (["plan", "c.yaml", "curriculum.kd_ratio=[0.1, 0.2]"], "lists 2 values, but there are 4 stages"),
        (["plan", "c.yaml", "data.train.path=none.jsonl"], "none.jsonl"),
        (["plan", "c.yaml", "data.train.path=empty.jsonl"], "empty.jsonl"),
        (["plan", "c.yaml", "curriculum.num_buckets=21"], "21 buckets cannot be made of 20 rows"),
        (["plan", "c.yaml"], "fewer than one global batch of 64"),
        (["report", "c.yaml"], "no run stands there yet"),
        (["fetch", "nothing"], "fetch nothing: unknown; there is smollm2"),
        (["evaluate", "--predictions", "none.jsonl", "--references", "none.jsonl"], "none.jsonl"),
        (["plan", "c.yaml", "[bold]=1"], "unknown key [bold]"),
    ],
)
def test_a_users_mistake_gives_one_line_and_exit_code_2(
    call: Call, config: str, tmp_path: Path, arguments: list[str], says: str
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert says in refusal(call(*arguments))
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


@pytest.mark.parametrize(
    "arguments", [["evaluate"], ["evaluate", "c.yaml", "--predictions", "p"], ["nosuch"], ["plan"]]
)
def test_wrong_usage_exits_with_2(call: Call, config: str, arguments: list[str]) -> None:
    code, _, err = call(*arguments)
    assert code == 2 and "Traceback" not in err and err


def pipeline_that_raises(error: BaseException) -> type:
    class Failing:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def close(self) -> None:
            pass

        @property
        def ranking(self) -> str:
            raise error

    return Failing


def test_an_interrupted_run_says_how_to_go_on(call: Call, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pocl_ray import pipeline

    monkeypatch.setattr(pipeline, "Pipeline", pipeline_that_raises(KeyboardInterrupt()))
    code, _, err = call("score", config)
    assert code == 1 and err == "interrupted; the same command goes on from the last checkpoint\n"


def test_a_full_disk_that_a_library_reports_as_an_error_of_its_own_is_one_line(
    call: Call, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pocl_ray import pipeline

    error = Exception("No space left on device (os error 28)")  # as `tokenizers` says it
    monkeypatch.setattr(pipeline, "Pipeline", pipeline_that_raises(error))
    code, _, err = call("score", config)
    assert code == 2 and err.startswith("error: the disk is full while the run writes (No space left on device")
    monkeypatch.setattr(pipeline, "Pipeline", pipeline_that_raises(ZeroDivisionError("another")))
    with pytest.raises(ZeroDivisionError):
        call("score", config)


def test_what_failed_too_often_ends_with_its_traceback_and_one_line_that_says_so(
    call: Call, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def give_up(*_: Any) -> None:
        raise GaveUpError("distill: gave up after 4 tries [/]") from RuntimeError("worker 1 died")

    monkeypatch.setattr(cli, "_run_until", give_up)
    code, out, err = call("distill", config)
    assert code == 1
    assert out == ""
    assert "RuntimeError: worker 1 died" in err
    assert err.splitlines()[-1] == "error: distill: gave up after 4 tries [/]"


def test_what_may_not_be_read_is_one_line(call: Call, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:  # the tests may run as root, who may read all
        raise PermissionError(errno.EACCES, "Permission denied", "runs/mine/models")

    monkeypatch.setattr(cli, "_run_until", refuse)
    told = "error: runs/mine/models: permission denied; allow this user to read and write there\n"
    assert call("distill", config) == (2, "", told)
