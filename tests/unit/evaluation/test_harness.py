"""Tasks of lm-eval on tiny models, without Ray: figures against log-likelihoods by hand, resuming, and bad input."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml
from conftest import make_model, make_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl_ray.config import Config, EvaluationTaskConfig
from pocl_ray.config.loading import with_overrides
from pocl_ray.errors import ConfigError
from pocl_ray.evaluation import benchmarks, harness
from pocl_ray.evaluation.benchmarks import EvaluatedModel, TaskActor, evaluate_items, plan_items
from pocl_ray.evaluation.harness import check_tasks, folder_digest, run_task
from pocl_ray.models.places import ModelRef
from pocl_ray.models.saving import save_model
from pocl_ray.run_directory.storage import RunDirectory

NUM_ROWS = 9
SEED = 3
CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
}
WRITES = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"max_gen_toks": 2, "until": ["w1"]},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def rows() -> list[dict[str, Any]]:
    choices = [[f"w{n + 1}", f"w{n + 2} w{n + 3}", f"w{2 * n + 9}"] for n in range(NUM_ROWS)]
    return [{"question": f"w{n + 4} w5", "choices": choices[n], "answer": n % 3} for n in range(NUM_ROWS)]


def write_task(folder: Path, name: str, **content: Any) -> None:
    folder.mkdir(exist_ok=True)
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}, "test_split": "test"}
    data["dataset_kwargs"]["cache_dir"] = str(folder.parent / "cache")
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **content}), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of tasks: `pick` chooses between answers, `write` writes one, `both` is their group."""
    place = tmp_path / "tasks"
    write_task(place, "pick", **CHOICES)
    write_task(place, "write", **WRITES)
    both = {"group": "both", "task": ["pick", "write"], "aggregate_metric_list": [{"metric": "acc"}]}
    (place / "both.yaml").write_text(yaml.safe_dump(both), encoding="utf-8")
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    return place


def task(folder: Path, name: str, **keys: Any) -> EvaluationTaskConfig:
    return EvaluationTaskConfig(name=name, path=str(folder), **keys)


@pytest.fixture(scope="module")
def student() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return make_model("llama_tied"), make_tokenizer()


def log_likelihood(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> float:
    """The sum over the answer's tokens of log q(token | all before), one sequence at a time."""
    start, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(f"{prompt} {answer}", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        log_q = model(ids).logits[0].double().log_softmax(-1)
    return float(sum(log_q[place - 1, ids[0, place]] for place in range(start, ids.shape[1])))


def test_figures_are_those_of_the_log_likelihoods(folder: Path, student: Any) -> None:
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    for row in rows():
        sums = [log_likelihood(*student, row["question"], choice) for choice in row["choices"]]
        per_letter = [value / len(choice) for value, choice in zip(sums, row["choices"], strict=True)]
        right["acc"].append(sums.index(max(sums)) == row["answer"])
        right["acc_norm"].append(per_letter.index(max(per_letter)) == row["answer"])
    found = run_task(*student, task(folder, "pick"), folder, SEED, batch_rows=4)["pick"]
    assert (found["num_rows"], found["num_fewshot"], found["group"]) == (NUM_ROWS, 0, None)
    for metric, hits in right.items():
        share = sum(hits) / NUM_ROWS
        assert 0 < share < 1, "rows that tell something"
        assert found["metrics"][metric]["value"] == pytest.approx(share)
        assert found["metrics"][metric]["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / (NUM_ROWS - 1)))
        assert found["metrics"][metric]["higher_is_better"] is True


def test_a_group_comes_before_its_tasks_and_a_limit_takes_the_first_rows(folder: Path, student: Any) -> None:
    found = run_task(*student, task(folder, "both", limit=4), folder, SEED, batch_rows=4)
    assert list(found) == ["both", "pick", "write"]
    assert [one["group"] for one in found.values()] == [None, "both", "both"]
    assert found["both"]["metrics"]["acc"] == found["pick"]["metrics"]["acc"], "of 4 rows, as the others have no acc"
    assert found["both"]["num_rows"] == 8
    assert found["pick"]["num_rows"] == found["write"]["num_rows"] == 4
    assert "exact_match" in found["write"]["metrics"]


def test_examples_are_drawn_by_the_seed(folder: Path, student: Any) -> None:
    def sums(seed: int) -> Any:
        content = {**CHOICES, "metric_list": [{"metric": "acc"}, {"metric": "brier_score"}]}
        write_task(folder, "pick", **content)
        return run_task(*student, task(folder, "pick", num_fewshot=2), folder, seed, batch_rows=4)["pick"]

    found = sums(SEED)
    assert found["num_fewshot"] == 2
    assert found == sums(SEED) != sums(SEED + 1)


def a_config(folder: Path, *names: str) -> Config:
    tree = {
        "name": "run",
        "seed": SEED,
        "data": {"train": {"path": "rows.jsonl"}, "holdout_rows": 8},
        "teacher": {"path": "teacher"},
        "student": {"path": "student"},
        "evaluation": {"tasks": [{"name": name, "path": str(folder)} for name in names]},
    }
    return Config.model_validate(tree)


def test_only_what_is_missing_is_evaluated(folder: Path, student: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = RunDirectory.open(str(folder.parent), "run")
    save_model(*student, run_dir.local("student"))
    student[1].save_pretrained(run_dir.local("tokenizer"))
    run_dir.write_json("evaluation.json", {"sets": {}})
    ref = ModelRef(str(run_dir.local("student")))
    models = {name: EvaluatedModel(ref, [name], "tokenizer") for name in ("student", "student_before")}
    evaluated: list[tuple[str, str]] = []

    def here(items: Any, seed: int, batch_rows: int, scaling: Any, run_dir: RunDirectory) -> None:
        evaluated.extend((item.name, item.task.name) for item in items)
        list(TaskActor(run_dir, items, seed, batch_rows, False)(pa.table({"item": list(range(len(items)))})))

    monkeypatch.setattr(benchmarks, "_run", here)
    monkeypatch.setattr(
        benchmarks, "run_task", lambda *given: {given[2].name: {"num_rows": NUM_ROWS, "group": None, "metrics": {}}}
    )

    def evaluate(*names: str) -> Any:
        config = a_config(folder, *names)
        counts = evaluate_items(plan_items(config, models), config, run_dir)
        return run_dir.read_json("evaluation.json")["tasks"], counts

    tasks, counts = evaluate("pick")
    assert list(tasks["pick"]["pick"]) == list(models) and counts == {"num_rows": 2 * NUM_ROWS}
    run_dir.delete(plan_items(a_config(folder, "pick"), models)[0].path)  # as if killed before this one
    evaluate("pick", "write")
    assert evaluated[2:] == [("student", "pick"), ("student", "write"), ("student_before", "write")]
    (folder / "rows.jsonl").write_text(json.dumps(rows()[0]) + "\n", encoding="utf-8")
    tasks, _ = evaluate("pick")
    assert evaluated[5:] == [("student", "pick"), ("student_before", "pick")]
    assert list(tasks) == ["pick"]
    found = tasks["pick"]["pick"]["student"]  # what a comparison of runs looks at
    assert found["folder"] == folder_digest(str(folder))[:12] and found["lm_eval"] == harness.harness_version()


def test_a_check_warns_of_a_number_of_examples_that_lm_eval_does_not_take(folder: Path) -> None:
    assert check_tasks([task(folder, "pick", num_fewshot=1), task(folder, "both")], SEED) == []
    write_task(folder, "pick", **CHOICES, num_fewshot=0)
    (warning,) = check_tasks([task(folder, "pick", num_fewshot=1)], SEED)
    assert warning == "evaluation.tasks: pick sets num_fewshot 0, which lm-eval keeps, not 1"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("pikc", {}, r"pikc: path .* defines no such task; did you mean 'pick'\?"),
        ("pick", {"dataset_kwargs": {"data_files": {"test": "none.jsonl"}}}, "pick: .*Unable to find.*none.jsonl"),
        ("pick", {"doc_to_text": "{{question"}, "pick: lm-eval cannot run it .*correct its YAML"),
        ("pick", {"metric_list": [{"metric": "acc", "aggregation": "mode"}]}, "pick: .*how to aggregate metric acc"),
        ("pick", {"metric_list": [{"metric": "accc"}]}, "pick: .*accc"),
        ("pick", {"test_split": "later"}, "pick: lm-eval cannot run it .*later"),
        ("pick", {"unsafe_code": True}, "pick runs code that a model writes"),
        ("pick", {"dataset_path": "nobody/nothing", "dataset_kwargs": {}}, "data set cannot be downloaded.*HF_HOME"),
    ],
)
def test_a_task_that_cannot_be_made_is_one_line(
    folder: Path, name: str, content: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write_task(folder, "pick", **{**CHOICES, **content})
    with pytest.raises(ConfigError, match=says) as caught:
        check_tasks([task(folder, name)], SEED)
    assert str(caught.value).startswith("evaluation.tasks: ") and "\n" not in str(caught.value)


def test_more_examples_than_rows_and_code_that_fails_are_one_line(folder: Path, student: Any) -> None:
    with pytest.raises(ConfigError, match="pick: lm-eval cannot run it"):
        check_tasks([task(folder, "pick", num_fewshot=NUM_ROWS + 1)], SEED)
    (folder / "own.py").write_text("def judge(doc, results):\n    return 1 / 0\n", encoding="utf-8")
    path = folder / "pick.yaml"
    path.write_text(path.read_text(encoding="utf-8") + "process_results: !function own.judge\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"pick: lm-eval cannot run it \(ZeroDivisionError: division by zero\)"):
        run_task(*student, task(folder, "pick"), folder, SEED, batch_rows=4)


def test_a_folder_that_is_none_or_too_large_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"pick: path .*pick.yaml is no folder"):
        check_tasks([task(folder / "pick.yaml", "pick")], SEED)
    monkeypatch.setattr(harness, "_MAX_FOLDER_MIB", 0)
    with pytest.raises(ConfigError, match=r"pick: path .*name a folder of tasks alone"):
        check_tasks([task(folder, "pick")], SEED)


def test_without_lm_eval_the_line_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    assert check_tasks([], SEED) == []
    with pytest.raises(ConfigError, match=r"lm-eval is not installed: pip install 'pocl-ray\[lm-eval\]'"):
        check_tasks([task(folder, "pick")], SEED)


def test_the_digest_of_a_folder_leaves_compiled_code_out(folder: Path) -> None:
    before = folder_digest(str(folder))
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "own.pyc").write_bytes(b"1")
    assert folder_digest(str(folder)) == before
    (folder / "own.py").write_text("1", encoding="utf-8")
    assert folder_digest(str(folder)) != before


def test_lm_eval_is_imported_by_one_file_and_only_where_it_is_used() -> None:
    package = Path(harness.__file__).parents[1]
    importers = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            source = node.module if isinstance(node, ast.ImportFrom) else None
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else [source or ""]
            if any(name.split(".")[0] == "lm_eval" for name in names):
                importers.add((path.name, node.col_offset > 0))
    assert importers == {("harness.py", True)}


def test_entries_of_the_config_are_names_or_have_keys(folder: Path) -> None:
    config = a_config(folder)
    tasks = with_overrides(
        config, {"evaluation.tasks": ["arc_easy", {"name": "mine", "path": "tasks"}]}
    ).evaluation.tasks
    assert [(one.name, one.path, one.num_fewshot, one.limit) for one in tasks] == [
        ("arc_easy", None, None, None),
        ("mine", "tasks", None, None),
    ]
    for value, says in (
        (["arc_easy", {"name": "arc_easy", "limit": 5}], "evaluation.tasks: arc_easy stands twice"),
        ([{"name": "mine", "pth": "tasks"}], r"unknown key evaluation.tasks.0.pth; did you mean .*path"),
        ([""], "evaluation.tasks.0.name"),
    ):
        with pytest.raises(ConfigError, match=says):
            with_overrides(config, {"evaluation.tasks": value})
