"""The student's README.md: its origin, its training, its figures, and how to load it."""

from __future__ import annotations

import math
import os.path
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import yaml

from pocl_ray.config import Config
from pocl_ray.records import STUDENT
from pocl_ray.report.figures import SetResult, is_of_text, perplexities, set_results
from pocl_ray.report.files import RunData, RunFiles, read_run
from pocl_ray.report.headline import describe_models, model_names, run_sentence
from pocl_ray.report.page import render_model_card
from pocl_ray.report.task_figures import TaskTable, task_table

MODEL_CARD = "student/README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TEMPLATES = {
    "alpaca": "the Alpaca text",
    "chat": "the tokenizer's chat template",
    "plain": "none: the instruction alone",
}


@dataclass(frozen=True)
class Origin:
    """A model or the rows that a student comes from.

    Attributes:
        role: Part that it had: `teacher`, `student` or `rows`.
        name: Hub id, or the name of a folder without its place on this machine.
        licence: Licence as the Hub spells it; None if it is not known.
        languages: Languages of its card.
    """

    role: str
    name: str
    licence: str | None
    languages: tuple[str, ...] = ()


def write_model_card(files: RunFiles) -> str:
    """Write `student/README.md` from the files of the run directory, and return its text.

    Raises:
        StorageError: A file of the run directory exists but cannot be read.
    """
    text = model_card(files)
    files.write_bytes(MODEL_CARD, text.encode("utf-8", errors="replace"))
    return text


def model_card(files: RunFiles, origins: Sequence[Origin] = ()) -> str:
    """Return the model card of a run's student.

    A student inherits the terms of its teacher and its rows, which a program cannot judge. The metadata name a licence
    only if all origins have the same one; the text lists those that are known, and those that are not.

    Args:
        files: Run directory. Without an evaluation the card has no figures.
        origins: Models and rows with their licences; without any the card says nothing of licences.

    Raises:
        StorageError: A file of the run directory exists but cannot be read.
    """
    run = read_run(files)
    names = model_names(run.config)
    has_prompts = run.config is not None and run.config.data.task != "text"
    template = run.config.data.prompt_template if run.config is not None and has_prompts else ""
    lora = run.config.student.lora if run.config else None
    results = set_results({name: found for name, found in run.evaluation.items() if not is_of_text(found)})
    tasks = task_table(run.tasks)
    context = {
        "front_matter": yaml.safe_dump(
            _front_matter(run, results, tasks, origins), sort_keys=False, allow_unicode=True
        ),
        "origins": origins,
        "name": run.config.name if run.config else "student",
        "intro": run_sentence(run, done=True),
        "models": describe_models(run.config) if run.config else None,
        "adapters_alone": lora is not None and not lora.merge,
        "run": run,
        "names": names,
        "results": results,
        "perplexities": perplexities(run.evaluation),
        "tasks": tasks,
        "known_template": _TEMPLATES.get(template, ""),
        "own_template": "" if template in _TEMPLATES else template,
    }
    return render_model_card(context)


def _front_matter(
    run: RunData, results: Sequence[SetResult], tasks: TaskTable | None, origins: Sequence[Origin]
) -> dict[str, Any]:
    matter: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    matter["tags"] = ["distillation", "pocl", "pocl-ray"]
    licences = {origin.licence for origin in origins}
    if len(licences) == 1 and (licence := licences.pop()) is not None:
        matter["license"] = licence
    if languages := sorted({language for origin in origins for language in origin.languages}):
        matter["language"] = languages
    config = run.config
    if config is None:
        return matter
    lora = config.student.lora
    base = hub_id((config.teacher if config.student.num_layers is not None else config.student).path or "")
    if base:
        relation = "adapter" if lora is not None and not lora.merge else "finetune"
        matter = {"base_model": base, "base_model_relation": relation, **matter}
    if rows := hub_id(config.data.train.path):
        matter["datasets"] = [rows]
    metrics = ["rouge", "exact_match"] if results else []
    metrics += sorted({row.metric.partition(",")[0] for row in tasks.rows} - set(metrics)) if tasks else []
    if found := [*_results_by_set(config, results), *_results_by_task(tasks)]:
        matter["metrics"] = metrics
        matter["model-index"] = [{"name": config.name, "results": found}]
    return matter


def _results_by_set(config: Config, results: Sequence[SetResult]) -> Iterator[dict[str, Any]]:
    """The student's figures in the form that the Hub reads (its model-index)."""
    for result in results:
        student = result.model(STUDENT)
        if student is None:
            continue
        source = config.data.tests.get(result.name) or config.data.dev or config.data.train
        figures = {
            ("rouge", "ROUGE-L, greedy"): student.rouge_l.greedy,
            ("rouge", "ROUGE-L, sampled"): student.rouge_l.mean,
            ("exact_match", "exact match, greedy"): student.exact_match.greedy,
            ("exact_match", "exact match, sampled"): student.exact_match.mean,
        }
        metrics = [
            {"type": kind, "name": name, "value": round(value, 2)}
            for (kind, name), value in figures.items()
            if math.isfinite(value)
        ]
        # The Hub wants an id here. For rows of one machine it is the name of the set.
        dataset = {"type": hub_id(source.path) or re.sub(r"[^\w.-]", "-", result.name), "name": result.name}
        if metrics:
            yield {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics}


def _results_by_task(tasks: TaskTable | None) -> Iterator[dict[str, Any]]:
    """The student's figures on lm-eval's tasks in the same form, with their standard errors beside them."""
    for (task, _), rows in groupby(tasks.rows if tasks else (), key=lambda row: (row.task, row.num_fewshot)):
        metrics: list[dict[str, Any]] = []
        for row in rows:
            measured = row.by_model.get(STUDENT)
            if measured is not None and math.isfinite(measured.value):
                named = {"type": row.metric.partition(",")[0], "name": row.metric, "value": round(measured.value, 4)}
                has_error = math.isfinite(measured.stderr)
                metrics.append({**named, **({"args": {"stderr": round(measured.stderr, 4)}} if has_error else {})})
        dataset = {"type": re.sub(r"[^\w.-]", "-", task), "name": task}
        if metrics:
            yield {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics}


def hub_id(path: str) -> str:
    """Return a place if it is an id on the Hub, else an empty text; a folder would mean nothing to others."""
    return path if _HUB_ID.fullmatch(path) and not os.path.exists(path) else ""
