"""A made-up finished run with the files that a comparison reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from pocl_ray.run_directory.manifest import VERSION

STEPS = ("rows", "scores", "distill", "evaluation", "report")


def figures(mean: float) -> dict[str, Any]:
    sampled = {"mean": mean, "std": 0.5, "by_seed": {"10": mean, "20": mean}}
    return {"rouge_l": sampled, "exact_match": sampled, "greedy": {"rouge_l": mean, "exact_match": mean}}


def make_run(
    folder: Path,
    mean: float,
    references: tuple[str, ...] = ("a", "b"),
    evaluation: dict[str, Any] | None = None,
    without: tuple[str, ...] = (),
    tasks: dict[str, Any] | None = None,
    **changes: Any,
) -> str:
    """The files of a run that a comparison reads; `tasks` are those of its evaluation.json."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = {
        "name": "mine",
        "data": {"train": {"path": "t.jsonl"}, "dev": {"path": "d.jsonl"}},
        "teacher": {"path": "teacher"},
        "student": {"num_layers": 1},
    }
    for key, value in changes.items():
        *parents, leaf = key.split("__")
        node = config
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    if tasks is not None:
        config.setdefault("evaluation", {}).setdefault("tasks", list(tasks))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "rows").mkdir()
    table = pa.table({"references": [[reference] for reference in references]})
    with pa.OSFile(str(folder / "rows" / "dev.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    summary = {
        "name": "dev", "path": "rows/dev.arrow", "num_rows": len(references), "num_rejected": 0, "num_prompt_tokens": 1,
        "num_response_tokens": 1, "max_response_tokens": 1, "fingerprint": "f",
    }  # fmt: skip
    (folder / "rows" / "summary.json").write_text(json.dumps({"sets": {"train": summary, "dev": summary}, "leaks": {}}))
    found = {"dev": {"student": figures(mean), "teacher": figures(50)}} if evaluation is None else evaluation
    (folder / "evaluation.json").write_text(json.dumps({"sets": found, "tasks": tasks or {}}))
    records = [{"step": step, "eval/dev/rouge_l": mean - 5 + step, "eval/dev/ce_loss": 2.0} for step in (0, 5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    counts = {"num_steps": 5, "num_tokens": 1000}
    done = {"status": "done", "fingerprint": "f", "outputs": [], "seconds": 10.0, "counts": counts}
    steps = {name: done for name in (*STEPS, *(["tasks"] if tasks else [])) if name not in without}
    (folder / "manifest.json").write_text(json.dumps({"version": VERSION, "steps": steps}))
    return str(folder)
