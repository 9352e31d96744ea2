"""Figures of lm-eval's tasks on the page, in the model card, and in the trackers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from fake_run import CONFIG, LocalFiles, make_run

from pocl_ray.report.build import build_report
from pocl_ray.report.model_card import write_model_card
from pocl_ray.report.task_figures import task_table
from pocl_ray.run_directory.storage import RunDirectory
from pocl_ray.tracking.results import read_results

VALUES = {"student_before": 0.25, "student_kd": 0.5, "student": 0.625, "teacher": 0.75}


def figures(value: float, metric: str = "acc", **more: Any) -> dict[str, Any]:
    measured = {"value": value, "stderr": 0.125, "higher_is_better": metric == "acc", "num_rows": 16}
    return {"metrics": {metric: measured}, "num_rows": 16, "num_fewshot": 0, "group": None, **more}


TASKS: dict[str, Any] = {
    "both": {
        "both": {name: figures(value) for name, value in VALUES.items()},
        "pick <b>": {name: figures(value, group="both") for name, value in VALUES.items()},
        "write": {"student": figures(3.5, "bits,strict", group="both")},
    },
    "earlier": {"earlier": {"student": figures(0.99)}},
}


def a_run(folder: Path) -> LocalFiles:
    files = make_run(folder, num_rows=64)
    config = yaml.safe_load(CONFIG)
    config["evaluation"] = {"tasks": [{"name": "both", "path": "tasks"}]}
    files.write_text("config.yaml", yaml.safe_dump(config))
    evaluation = RunDirectory(str(folder)).read_json("evaluation.json")
    files.write_json("evaluation.json", {**evaluation, "tasks": TASKS})
    return files


def test_a_row_has_the_figures_of_all_models_and_a_task_lies_below_its_group() -> None:
    assert task_table({}) is None
    table = task_table({"both": TASKS["both"]})
    assert table is not None and table.models == tuple(VALUES)
    assert [(row.task, row.depth, row.metric, row.arrow) for row in table.rows] == [
        ("both", 0, "acc", "↑"),
        ("pick <b>", 1, "acc", "↑"),
        ("write", 1, "bits,strict", "↓"),
    ]
    assert {name: measured.value for name, measured in table.rows[0].by_model.items()} == VALUES
    assert str(table.rows[2].by_model["teacher"].value) == "nan"


def test_the_pages_show_the_tasks_that_the_config_names(tmp_path: Path) -> None:
    files = a_run(tmp_path)
    build_report(files)
    page, text = (files.read_bytes(f"report.{kind}").decode() for kind in ("html", "md"))
    assert 'id="tasks"' in page and 'href="#tasks"' in page and "pick &lt;b&gt;" in page and "pick <b>" not in page
    assert '0.6250 <span class="sd">± 0.1250</span>' in page
    assert "| both | acc ↑ | 0.2500 ± 0.1250 | 0.5000 ± 0.1250 | 0.6250 ± 0.1250 | 0.7500 ± 0.1250 | 16 | 0 |" in text
    assert "earlier" not in text and "0.9900" not in page


def test_the_card_shows_them_and_tells_them_to_the_hub(tmp_path: Path) -> None:
    card = write_model_card(a_run(tmp_path))
    assert "| task | metric | undistilled student | plain KD | **this model** | teacher | rows | shots |" in card
    matter = yaml.safe_load(card.split("---\n")[1])
    assert matter["metrics"] == ["rouge", "exact_match", "acc", "bits"]
    assert matter["model-index"][0]["results"][-2] == {
        "task": {"type": "text-generation"},
        "dataset": {"type": "pick--b-", "name": "pick <b>"},
        "metrics": [{"type": "acc", "name": "acc", "value": 0.625, "args": {"stderr": 0.125}}],
    }


def test_trackers_get_them_with_the_other_final_figures(tmp_path: Path) -> None:
    a_run(tmp_path)
    run_dir = RunDirectory(str(tmp_path))
    run_dir.delete("predictions.parquet")
    found = read_results(run_dir, 8, {}, 0, ["both"]).figures
    assert found["final/both/student/acc.value"] == 0.625 and found["final/both/student/acc.stderr"] == 0.125
    assert found["final/both/write/student/bits,strict.value"] == 3.5
    assert not [key for key in found if "earlier" in key or "higher" in key]
