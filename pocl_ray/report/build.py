"""Builds report.html, report.md and plots/*.png from the files of a run directory alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pocl_ray.config import ReportConfig
from pocl_ray.records import NUM_PROMPT_TOKENS, NUM_RESPONSE_TOKENS, RANK, STUDENT, STUDENT_KD
from pocl_ray.report.curves import Curve, curve_of, num_not_finite
from pocl_ray.report.difficulty import (
    Example,
    SignalSpread,
    buckets_of,
    example_rows,
    reranked,
    signal_names,
    spearman,
    spread_by_bucket,
    topic_table,
    topics_of_rows,
)
from pocl_ray.report.figures import compare_with_control, is_of_text, perplexities, perplexity_sentences, set_results
from pocl_ray.report.files import RunData, RunFiles, is_done, read_run, reject_lines, step_times, total_seconds
from pocl_ray.report.frontier import FrontierGaps, frontier_gaps
from pocl_ray.report.headline import (
    adapter_sentences,
    model_names,
    pair_sentences,
    race_sentences,
    result_sentences,
    run_sentence,
    tiles,
    weak_teacher_sentences,
)
from pocl_ray.report.page import render_html, render_markdown
from pocl_ray.report.task_figures import task_table

if TYPE_CHECKING:
    from pocl_ray.report.plots import Plot

_MAX_TOPICS = 26
_LABELS = {
    "rouge_l": "student ROUGE-L",
    "ce_loss": "student CE (nats/token)",
    "teacher_ce_loss": "teacher CE (nats/token)",
    "teacher_student_kl": "KL, teacher to student (nats/token)",
    "student_confidence": "student confidence",
    "teacher_entropy": "teacher entropy (nats/token)",
    NUM_RESPONSE_TOKENS: "response length (tokens)",
}
_LOSSES = {
    "train/loss": "training loss (nats/token)",
    "train/kd_loss": "KD loss (nats/token)",
    "train/ce_loss": "CE loss (nats/token)",
}
_DEV_LOSSES = {"eval/dev/ce_loss": "dev CE (nats/token)", "eval/dev/kd_loss": "dev KD loss (nats/token)"}


@dataclass(frozen=True)
class DifficultySection:
    """The part of the page that shows the scores."""

    spreads: list[SignalSpread]
    plots: list[Plot]
    topics: Plot | None
    correlated: list[str]
    correlation: np.ndarray
    easiest: list[Example]
    hardest: list[Example]
    num_rows: int


def build_report(files: RunFiles) -> str:
    """Write `report.html`, `report.md` and `plots/*.png` of a run, and return the place of the page.

    The page leaves out the section of a step that has not been run, and names that step.

    Args:
        files: Run directory.

    Returns:
        Path or URL of report.html.

    Raises:
        StorageError: A file of the run directory exists but cannot be read.
    """
    run = read_run(files)
    answered = {name: models for name, models in run.evaluation.items() if not is_of_text(models)}
    results, texts = set_results(answered), perplexities(run.evaluation)
    names = model_names(run.config)
    drawn = _drawn(run)
    plots = [*_plots(run), *_plots_of_draws(drawn)]
    difficulty = _difficulty(run)
    context = {
        "name": run.config.name if run.config else "run",
        "run": run,
        "names": names,
        "intro": run_sentence(run, done=is_done(run.steps, "distill")),
        "sentences": [
            *adapter_sentences(run),
            *race_sentences(run),
            *result_sentences(run, results),
            *pair_sentences(run),
            *weak_teacher_sentences(results),
            *perplexity_sentences(texts, names),
        ],
        "tiles": tiles(run, results),
        "missing": _missing(run),
        "warnings": _warnings(run),
        "results": results,
        "perplexities": texts,
        "tasks": task_table(run.tasks),
        "any_unstopped": any(m.unstopped_share >= 0 for result in results for m in result.models),
        "comparisons": [(result.name, compare_with_control(result)) for result in results],
        "difficulty": difficulty,
        "drawn": drawn,
        "reranked": reranked(run.rescored, run.plan) if run.plan else [],
        "plots": {plot.name: plot for plot in plots},
        "steps": step_times(run.steps),
        "total_seconds": total_seconds(run.steps),
        "cuts": run.cuts,
        "rejects": reject_lines(run.rejects) if run.rejects else [],
    }
    for plot in [*plots, *(difficulty.plots if difficulty else []), *_topic_plots(difficulty)]:
        files.write_bytes(f"plots/{plot.name}.png", plot.png)
    files.write_bytes("report.md", render_markdown(context).encode("utf-8", errors="replace"))
    files.write_bytes("report.html", render_html(context).encode("utf-8", errors="replace"))
    return files.uri_of("report.html")


def _topic_plots(difficulty: DifficultySection | None) -> list[Plot]:
    return [difficulty.topics] if difficulty and difficulty.topics else []


def _plots(run: RunData) -> Iterator[Plot]:
    from pocl_ray.report import plots  # matplotlib takes a second to import, so import it only if something is drawn

    names = model_names(run.config)
    ends = run.plan.stage_ends if run.plan else ()
    if answered := {name: models for name, models in run.evaluation.items() if not is_of_text(models)}:
        figure = plots.final_figures(set_results(answered), names)
        yield plots.render("evaluation", "ROUGE-L of each model", figure)
    if run.plan and run.plan.stages and ends[-1] > 0:
        lr = curve_of(run.metrics.train, "train/lr") if run.metrics else None
        title = "Rows admitted and learning rate over the stages"
        yield plots.render("stage_rows", title, plots.stage_rows(run.plan.stages, lr))
        title = "Temperature and kd_ratio over the stages"
        yield plots.render("stage_settings", title, plots.stage_settings(run.plan.stages))
    if scores := _curves(run, "evals", "eval/dev/rouge_l"):
        mark = run.config is not None and run.config.curriculum.hand_off == "best"
        losses = next(
            (c[STUDENT] for key in ("kd", "ce") if STUDENT in (c := _curves(run, "evals", f"eval/dev/{key}_loss"))),
            None,
        )
        figure = plots.dev_score(scores, names, ends, mark_best=mark, losses=losses)
        yield plots.render("dev_rouge_l", "Dev ROUGE-L", figure)
    for kind, labels in (("train", _LOSSES), ("evals", _DEV_LOSSES)):
        for key, label in labels.items():
            if curves := _curves(run, kind, key):
                figure = plots.curves_over_steps(curves, names, label, ends, raw=kind == "train")
                yield plots.render(key.replace("eval/", "").replace("/", "_"), label, figure)


def _drawn(run: RunData) -> FrontierGaps | None:
    return frontier_gaps(run.metrics.frontier, run.plan.bucket_ends) if run.metrics and run.plan else None


def _plots_of_draws(drawn: FrontierGaps | None) -> Iterator[Plot]:
    if drawn is None:
        return
    from pocl_ray.report import plots  # see _plots

    yield plots.render("frontier_gaps", "Gap of each bucket over the stages", plots.gaps_by_stage(drawn))
    yield plots.render("frontier_draws", "Share of draws by bucket over the stages", plots.draws_by_stage(drawn))


def _curves(run: RunData, kind: str, key: str) -> dict[str, Curve]:
    """A metric of the control, if there is one, and then of the student, which is drawn on top."""
    sources = {STUDENT_KD: run.control, STUDENT: run.metrics}
    found = {model: curve_of(getattr(metrics, kind), key) for model, metrics in sources.items() if metrics}
    return {model: curve for model, curve in found.items() if curve is not None}


def _difficulty(run: RunData) -> DifficultySection | None:
    if run.scores is None or not len(run.scores.get(RANK, ())):
        return None
    from pocl_ray.report import plots  # see _plots

    scores = run.scores
    fused = tuple(run.config.difficulty.signals) if run.config else ()
    signals = signal_names(scores, fused)
    ends = run.plan.bucket_ends if run.plan else (len(scores[RANK]),)
    buckets = buckets_of(scores[RANK], ends)
    shown = [*signals, *([NUM_RESPONSE_TOKENS] if NUM_RESPONSE_TOKENS in scores else [])]
    spreads = [spread_by_bucket(name, scores[name], buckets, len(ends), fused=name in fused) for name in shown]
    spreads = [spread for spread in spreads if any(box.num_rows for box in spread.boxes)]
    boxes = []
    for spread in spreads:
        label = _LABELS.get(spread.name, spread.name)
        boxes.append(plots.render(f"difficulty_{spread.name}", label, plots.signal_by_bucket(spread, label)))
    names = [name for name in (*signals, RANK, NUM_PROMPT_TOKENS, NUM_RESPONSE_TOKENS) if name in scores]
    num_examples = (run.config.report if run.config else ReportConfig()).num_examples
    examples = example_rows(run.rows, scores, signals, num_examples) if run.rows is not None else ([], [])
    return DifficultySection(
        spreads=spreads,
        plots=boxes,
        topics=_topics(run, buckets, len(ends)),
        correlated=names,
        correlation=spearman([scores[name] for name in names]),
        easiest=examples[0],
        hardest=examples[1],
        num_rows=len(buckets),
    )


def _topics(run: RunData, buckets: np.ndarray, num_buckets: int) -> Plot | None:
    if run.rows is None or run.scores is None or num_buckets < 2:
        return None
    topics = topics_of_rows(run.rows, run.scores["id"])
    if topics is None:
        return None
    from pocl_ray.report import plots  # see _plots

    table = topic_table(topics, run.scores[RANK], buckets, num_buckets, _MAX_TOPICS)
    return plots.render("topics", "Share of each topic's rows by bucket", plots.topics_by_bucket(table))


def _missing(run: RunData) -> list[tuple[str, str]]:
    """The steps that have left nothing to show, each with the part of the page that is missing."""
    lacks = {
        "rows": ("example rows and topics", run.rows is None),
        "scores": ("difficulty", run.scores is None),
        "plan": ("buckets and the stage timeline", run.plan is None),
        "distill": ("training curves", run.metrics is None),
        "control": (
            "plain distillation as a control",
            run.config is not None and run.config.control is not None and run.control is None,
        ),
        "evaluation": ("final figures", not run.evaluation),
    }
    return [(step, what) for step, (what, lacking) in lacks.items() if lacking]


def _warnings(run: RunData) -> list[str]:
    """The warnings that a reader needs to judge the curves."""
    found = []
    for who, metrics in (("distillation", run.metrics), ("control", run.control)):
        count = num_not_finite(metrics, "train/loss") if metrics else 0
        if count:
            found.append(f"{count:,} optimizer steps of the {who} logged a training loss that is not finite.")
    for name, step in run.steps.items():
        if name != "report" and not is_done(run.steps, name):
            found.append(f"Step {name} has the status “{step.get('status', 'unknown')}”.")
    return found
