"""The student's README.md: its origin, its training, its figures, and how to load it."""

from __future__ import annotations

import os.path
import re

import yaml

from pocl_ray.config import Config
from pocl_ray.config.sources import ModelConfig
from pocl_ray.report.figures import is_of_text, perplexities, set_results
from pocl_ray.report.files import RunFiles, read_run
from pocl_ray.report.headline import describe_models, model_names, run_sentence
from pocl_ray.report.page import render_model_card

MODEL_CARD = "student/README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TEMPLATES = {
    "alpaca": "the Alpaca text",
    "chat": "the tokenizer's chat template",
    "plain": "none: the instruction alone",
}


def write_model_card(files: RunFiles) -> str:
    """Write `student/README.md` from the files of the run directory, and return its text.

    The card names no licence. A student inherits the terms of its teacher and its rows, which a program cannot judge.

    Args:
        files: Run directory. Without an evaluation the card has no figures.

    Raises:
        StorageError: A file of the run directory exists but cannot be read.
    """
    run = read_run(files)
    names = model_names(run.config)
    has_prompts = run.config is not None and run.config.data.task != "text"
    template = run.config.data.prompt_template if run.config is not None and has_prompts else ""
    lora = run.config.student.lora if run.config else None
    context = {
        "front_matter": yaml.safe_dump(_front_matter(run.config), sort_keys=False, allow_unicode=True),
        "name": run.config.name if run.config else "student",
        "intro": run_sentence(run, done=True),
        "models": describe_models(run.config) if run.config else None,
        "adapters_alone": lora is not None and not lora.merge,
        "run": run,
        "names": names,
        "results": set_results({name: found for name, found in run.evaluation.items() if not is_of_text(found)}),
        "perplexities": perplexities(run.evaluation),
        "known_template": _TEMPLATES.get(template, ""),
        "own_template": "" if template in _TEMPLATES else template,
    }
    text = render_model_card(context)
    files.write_bytes(MODEL_CARD, text.encode("utf-8", errors="replace"))
    return text


def _front_matter(config: Config | None) -> dict[str, object]:
    matter: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    matter["tags"] = ["distillation", "pocl", "pocl-ray"]
    if config is None:
        return matter
    cut_from_teacher = config.student.num_layers is not None
    base = _hub_id(config.teacher if cut_from_teacher else config.student)
    return {"base_model": base, **matter} if base else matter


def _hub_id(model: ModelConfig) -> str:
    """The model's id on the Hub; a folder of one machine would mean nothing to the card's reader."""
    path = model.path or ""
    return path if _HUB_ID.fullmatch(path) and not os.path.isdir(path) else ""
