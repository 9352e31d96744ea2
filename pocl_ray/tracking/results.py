"""The results of a run as trackers take them: final figures, a table of them, sample answers, and files."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from pocl_ray.data.row_store import RowStore
from pocl_ray.records import ID, RowsSummary
from pocl_ray.run_directory.storage import RunDirectory
from pocl_ray.tracking.run import leaves

FILES = ("config.yaml", "environment.json", "plan.json", "evaluation.json", "pairs.json", "report.html", "report.md")
PREDICTIONS = "predictions.parquet"

Table = list[dict[str, Any]]


@dataclass(frozen=True)
class Results:
    """Everything that is sent once a run is evaluated.

    Attributes:
        step: Number of optimizer steps of the training.
        figures: Final figures by name, such as `final/dev/student/rouge_l`.
        table: The same figures with one row for each set and model.
        answers: Sample prompts with the reference and an answer of each model.
        files: Local paths of config, report and so on, by name.
        plots: Local paths of the report's plots, by name.
    """

    step: int
    figures: Mapping[str, float]
    table: Table
    answers: Table
    files: Mapping[str, Path]
    plots: Mapping[str, Path]


def read_results(
    run_dir: RunDirectory,
    step: int,
    sets: Mapping[str, RowsSummary],
    num_answers: int,
    tasks: Collection[str] = (),
) -> Results:
    """Return the results that stand in a run directory.

    Args:
        run_dir: Directory of a run that is evaluated and reported.
        step: Number of optimizer steps of the training.
        sets: Evaluation sets by name.
        num_answers: Number of sample prompts of each set.
        tasks: Entries of `evaluation.tasks`, whose figures stand next to those of the sets.
    """
    content = run_dir.read_json("evaluation.json")
    evaluation = {**content["sets"], **_by_task(content.get("tasks", {}), tasks)}
    table = [
        {"set": name, "model": model, **flat(found)}
        for name, models in evaluation.items()
        for model, found in models.items()
    ]
    figures = {
        f"final/{row['set']}/{row['model']}/{key}": float(value)
        for row in table
        for key, value in row.items()
        if key not in ("set", "model")
    }
    plots = run_dir.local("plots") if run_dir.exists("plots") else None
    return Results(
        step=step,
        figures=figures,
        table=table,
        answers=list(_answers(run_dir, sets, num_answers)) if run_dir.exists(PREDICTIONS) else [],
        files={name: run_dir.local(name) for name in FILES if run_dir.exists(name)},
        plots={path.stem: path for path in sorted(plots.glob("*.png"))} if plots is not None else {},
    )


def _by_task(entries: Mapping[str, Any], named: Collection[str]) -> dict[str, dict[str, Any]]:
    """The figures of each task by model; that of an entry's own name has that name alone."""
    return {
        name if name == entry else f"{entry}/{name}": {model: found["metrics"] for model, found in models.items()}
        for entry, tasks in entries.items()
        if entry in named
        for name, models in tasks.items()
    }


def flat(found: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of an entry of evaluation.json by dotted name, without those of single seeds."""
    return {
        key: float(value)
        for key, value in leaves(found)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and "by_seed" not in key.split(".")
    }


def as_markdown(table: Table) -> str:
    """Return a table in Markdown; what would break a cell is escaped."""
    if not table:
        return ""
    names = list(dict.fromkeys(key for row in table for key in row))
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(_cell(row.get(name, "")) for name in names) + " |" for row in table]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _answers(run_dir: RunDirectory, sets: Mapping[str, RowsSummary], num_answers: int) -> Iterator[dict[str, Any]]:
    """One row for each sample prompt: greedy answers where there are any, else those of the first seed."""
    answers = run_dir.read_table(PREDICTIONS, ["model", "set", ID, "seed", "text"])
    seed = pc.min(answers["seed"]).as_py()
    answers = answers.filter(pc.field("seed") == seed)
    for name, summary in sets.items():
        rows = RowStore.open(run_dir.local(summary.path))
        of_set = answers.filter(pc.field("set") == name)
        ids = sorted(of_set[ID].unique().to_pylist())[:num_answers]
        for row_id in ids:
            of_row = of_set.filter(pc.field(ID) == row_id).to_pylist()
            (references,) = rows.references([row_id])
            yield {
                "set": name,
                "row": row_id,
                "prompt": rows.prompts([row_id])[0],
                "reference": references[0],
                **{one["model"]: one["text"] for one in of_row},
            }


def as_json(table: Table) -> str:
    """Return a table as JSON."""
    return json.dumps(table, ensure_ascii=False, indent=2) + "\n"
