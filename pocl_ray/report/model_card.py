"""The student's README.md: its origin, its training, its figures, and how to load it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import yaml

from pocl_ray.config import Config
from pocl_ray.data.columns import SUMMARIZE, Request
from pocl_ray.data.prompts import PromptTemplate
from pocl_ray.records import STUDENT
from pocl_ray.report.figures import SetResult, is_of_text, perplexities, set_results
from pocl_ray.report.files import RunData, RunFiles, read_run
from pocl_ray.report.headline import describe_models, model_names, run_sentence
from pocl_ray.report.page import render_model_card
from pocl_ray.report.task_figures import TaskTable, task_table
from pocl_ray.run_directory.paths import hub_id

MODEL_CARD = "student/README.md"
_QUESTION = "Name the capital of France."
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


def model_card(files: RunFiles, origins: Sequence[Origin] = (), repo: str = "", is_adapter: bool = False) -> str:
    """Return the model card of a run's student.

    A student inherits the terms of its teacher and its rows, which a program cannot judge. The metadata name a licence
    only if all origins have the same one; the text lists those that are known, and those that are not.

    Args:
        files: Run directory. Without an evaluation the card has no figures.
        origins: Models and rows with their licences; without any the card says nothing of licences.
        repo: Repository on the Hub that the card is for; without one it tells how to load the folder that it lies in.
        is_adapter: Whether the repository holds the adapters alone, without a folder around them.

    Raises:
        StorageError: A file of the run directory exists but cannot be read.
    """
    run = read_run(files)
    names = model_names(run.config)
    has_prompts = run.config is not None and run.config.data.task != "text"
    template = run.config.data.prompt_template if run.config is not None and has_prompts else ""
    lora = run.config.student.lora if run.config else None
    is_unmerged = lora is not None and not lora.merge
    place = f'"{repo}"' if repo else '"."  # where this file lies'
    if repo and (is_adapter or is_unmerged):  # peft finds a folder of a repository only on this machine
        place = f"snapshot_download({place})"
    results = set_results({name: found for name, found in run.evaluation.items() if not is_of_text(found)})
    tasks = task_table(run.tasks)
    context = {
        "front_matter": yaml.safe_dump(
            _front_matter(run, results, tasks, origins, is_adapter), sort_keys=False, allow_unicode=True
        ),
        "origins": origins,
        "repo": repo,
        "place": place,
        "adapter": "folder" if is_adapter else 'f"{folder}/adapter"' if is_unmerged else "",
        "asked": _asked(run.config, template) if run.config else "",
        "max_new_tokens": (run.config.evaluation.generation.max_new_tokens if run.config else None) or 64,
        "name": run.config.name if run.config else "student",
        "intro": run_sentence(run, done=True),
        "models": describe_models(run.config, run.environment) if run.config else None,
        "run": run,
        "names": names,
        "results": results,
        "perplexities": perplexities(run.evaluation),
        "tasks": tasks,
        "known_template": _TEMPLATES.get(template, ""),
        "own_template": "" if template in _TEMPLATES else template,
    }
    return render_model_card(context)


def _asked(config: Config, template: str) -> str:
    """The line of Python that makes a prompt as the student has read them; empty for a template of the user's own."""
    if config.data.task == "text":
        return 'tokenizer("Once upon a time", return_tensors="pt")'
    request = Request(_QUESTION, "", system="", history=(), references=(), topic=None)
    if config.data.task == "summarization":
        request = replace(request, instruction=SUMMARIZE, input="A long text.")
    if template == "chat":
        args = "".join(f", {name}={value!r}" for name, value in config.data.template_args.items())
        text = f"{request.instruction}\n\n{request.input}" if request.input else request.instruction
        chat = f'[{{"role": "user", "content": {json.dumps(text)}}}]'
        return (
            f"tokenizer.apply_chat_template(\n    {chat},\n"
            f'    add_generation_prompt=True, return_dict=True, return_tensors="pt"{args},\n)'
        )
    if template not in _TEMPLATES:
        return ""
    prompt = PromptTemplate(template, None).render(request)
    return f'tokenizer({json.dumps(prompt)}, return_tensors="pt")'


def _front_matter(
    run: RunData, results: Sequence[SetResult], tasks: TaskTable | None, origins: Sequence[Origin], is_adapter: bool
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
    base = on_hub((config.teacher if config.student.num_layers is not None else config.student).path, run.environment)
    if base:
        relation = "adapter" if is_adapter or (lora is not None and not lora.merge) else "finetune"
        matter = {"base_model": base, "base_model_relation": relation, **matter}
    if rows := on_hub(config.data.train.path, run.environment):
        matter["datasets"] = [rows]
    metrics = ["rouge", "exact_match"] if results else []
    metrics += sorted({row.metric.partition(",")[0] for row in tasks.rows} - set(metrics)) if tasks else []
    if found := [*_results_by_set(config, results, run.environment), *_results_by_task(tasks)]:
        matter["metrics"] = metrics
        matter["model-index"] = [{"name": config.name, "results": found}]
    return matter


def on_hub(path: str | None, environment: Mapping[str, Any]) -> str:
    """Return a place of the config if it is an id on the Hub, else an empty text: a folder means nothing to others.

    Args:
        path: Place of a model or of rows.
        environment: Content of environment.json, which lists the ids where this version wrote it.
    """
    listed = environment.get("on_hub")
    is_there = path is not None and (path in listed if listed is not None else bool(hub_id(path)))
    return path if path is not None and is_there else ""


def _results_by_set(
    config: Config, results: Sequence[SetResult], environment: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
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
        own = re.sub(r"[^\w.-]", "-", result.name)
        dataset = {"type": on_hub(source.path, environment) or own, "name": result.name}
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
