"""The summary of a run in a few sentences and figures: the models, and the result, whichever side won."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pocl_ray.config import Config
from pocl_ray.config.race import PLAIN, RACE
from pocl_ray.config.sources import ModelConfig
from pocl_ray.records import STUDENT, STUDENT_BEFORE, STUDENT_KD, TEACHER, Coverage
from pocl_ray.report.figures import Comparison, ModelResult, SetResult, compare_with_control, in_a_sentence
from pocl_ray.report.files import RunData, total_seconds
from pocl_ray.report.page import duration, fixed, percent, signed

_MAX_SENTENCE_SETS = 2
_PLUS_MINUS = "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"

PAIR_FIGURES = {
    "rouge_l": "greedy ROUGE-L",
    "sampled_rouge_l": "sampled ROUGE-L",
    "kl": "KL from the teacher (nats, less is better)",
}
"""Figures of `pairs.json` that the report shows, in its words."""

_WAYS = {
    "baby_step": "from easy to hard",
    "one_pass": "from easy to hard, each row in one of them",
    "competence": "from easy to hard, by competence",
    "anti": "from hard to easy",
    "random": "in random order",
    "frontier": "of rows drawn by what is left to learn from them",
    "rank": "from easy to hard",
    "race": "of the curriculum that won a race",
}


@dataclass(frozen=True)
class Tile:
    """A large figure at the top of the page, with a line below it."""

    label: str
    value: str
    note: str


def model_names(config: Config | None) -> dict[str, str]:
    """Return the name of each model of `records` in the report."""
    is_pocl = config is None or config.curriculum.pacing == "baby_step"
    return {
        STUDENT_BEFORE: "undistilled student",
        STUDENT_KD: "plain KD",
        STUDENT: "POCL" if is_pocl else "distilled student",
        TEACHER: "teacher",
    }


def describe_models(config: Config, environment: Mapping[str, Any]) -> tuple[str, str]:
    """Return short descriptions of teacher and student, without the folders of this machine.

    Args:
        config: Config of the run.
        environment: Content of its environment.json, which tells ids on the Hub from folders.
    """
    on_hub = environment.get("on_hub")
    teacher = _source(config.teacher, on_hub) + (" with its adapter" if config.teacher.adapter is not None else "")
    layers, lora = config.student.num_layers, config.student.lora
    student = f"{layers} of the teacher's layers" if layers is not None else _source(config.student, on_hub)
    return teacher, student + (f", adapters of rank {lora.rank}" if lora is not None else "")


def _source(model: ModelConfig, on_hub: Collection[str] | None) -> str:
    if model.path is not None:
        is_folder = model.path.startswith((".", "/", "~")) or "://" in model.path
        is_folder = is_folder or (on_hub is not None and model.path not in on_hub)
        return model.path.rstrip("/").rsplit("/", 1)[-1] if is_folder else model.path
    sizes = model.architecture or {}
    depth = next((sizes[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if key in sizes), None)
    width = next((sizes[key] for key in ("hidden_size", "n_embd") if key in sizes), None)
    layers = f"{depth}-layer " if depth is not None else ""
    wide = f" of width {width}" if width is not None else ""
    return f"{layers}{sizes.get('model_type', 'model')}{wide}"


def run_sentence(run: RunData, *, done: bool) -> str:
    """Return one sentence on the distillation of the run; an empty text if there is no config."""
    if run.config is None:
        return ""
    teacher, student = describe_models(run.config, run.environment)
    pacing = run.config.curriculum.pacing
    rows = f" on {run.plan.num_rows:,} rows" if run.plan else ""
    stages = f"{len(run.plan.stages)} stages" if run.plan else "stages"
    if pacing == RACE:
        taken = run.plan.stages if run.plan and run.race else ()
        pacing = RACE if not taken else "none" if len(taken) == 1 else taken[0].order
    way = _WAYS.get(pacing, f"by the pacing rule {pacing}")
    how = "in one stage, without a curriculum" if pacing == "none" else f"in {stages} {way}"
    verb = "was distilled" if done else "is to be distilled"
    return f"A student ({student}) {verb} from its teacher ({teacher}){rows} with {run.config.distill.loss}, {how}."


def adapter_sentences(run: RunData) -> list[str]:
    """Return one sentence on the share of the student that its adapters change; none without adapters."""
    covered = Coverage.of_counts(run.steps.get("distill", {}).get("counts") or {})
    return [] if covered is None else [f"The {covered}."]


def result_sentences(run: RunData, results: Sequence[SetResult]) -> list[str]:
    """Return one or two sentences on each evaluation set; if there are many, on the first one and on all together."""
    names = model_names(run.config)
    if len(results) <= _MAX_SENTENCE_SETS:
        return [text for result in results if (text := _set_sentence(result, names))]
    return [text for text in (_set_sentence(results[0], names), _tally(results, names)) if text]


def race_sentences(run: RunData) -> list[str]:
    """Return what a race handed out and why, in one sentence; none where no race was run."""
    if not run.race:
        return []
    plan, winner, decisions = run.race["plan"], run.race["winner"], run.race["decisions"]
    last = decisions[-1]
    cost = (run.race["num_steps"] + plan["num_steps"] - last["rung"]["step"]) / plan["num_steps"]
    arms = ", ".join(standing["arm"] for standing in decisions[0]["standings"] if standing["arm"] != PLAIN)
    why = next(standing["why"] for standing in last["standings"] if standing["arm"] == winner)
    handed_out = "plain distillation, as none was ahead by more than chance" if winner == PLAIN else f"{winner}, {why}"
    return [
        f"A race of plain distillation against {arms} handed out {handed_out} (dev rows at step "
        f"{last['rung']['step']:,} of {plan['num_steps']:,}); it took {cost:.2f} times the optimizer steps of one run."
    ]


def pair_sentences(run: RunData) -> list[str]:
    """Return one sentence on each set: the paired difference over seeds of training, with its interval."""
    sides = "{} less {}".format(*(model_names(run.config)[name] for name in (STUDENT, STUDENT_KD)))
    num_pairs, sentences = len(run.pairs.get("seeds") or ()), []
    for name, figures in (run.pairs.get("sets") or {}).items():
        parts = [
            f"{label} {signed(one['mean'])} ({signed(one['low'])} to {signed(one['high'])}, {one['verdict']})"
            for figure, label in PAIR_FIGURES.items()
            if (one := (figures.get(figure) or {}).get("difference"))
        ]
        if parts:
            sentences.append(
                f"Trained again in {num_pairs} pairs on further seeds, at the same number of optimizer steps, {sides} "
                f"on {name} is {', '.join(parts)}; 95 % intervals over the seeds."
            )
    return sentences


def weak_teacher_sentences(results: Sequence[SetResult]) -> list[str]:
    """Return a warning for each set on which the teacher is no better than the distilled student."""
    sentences = []
    for result in results:
        student, teacher = result.model(STUDENT), result.model(TEACHER)
        behind = [
            f"{word} {fixed(_score(teacher, kind))} against {fixed(_score(student, kind))}"
            for kind, word in (("mean", "sampled"), ("greedy", "greedy"))
            if _score(teacher, kind) <= _score(student, kind)
        ]
        if behind:
            sentences.append(
                f"Warning: on {result.name} the teacher is no better than the distilled student (ROUGE-L "
                f"{' and '.join(behind)}). A stronger teacher, or supervised fine-tuning, may teach more."
            )
    return sentences


def _tally(results: Sequence[SetResult], names: dict[str, str]) -> str:
    """A sentence with the number of sets on which the student is ahead of the control, level with it, and behind it."""
    verdicts: dict[str, Counter[str]] = {}
    for comparison in (c for result in results for c in compare_with_control(result)):
        key = f"{comparison.decoding} {comparison.metric}"
        verdicts.setdefault(key, Counter())[comparison.verdict] += 1
    if not verdicts:
        return ""
    counted = [
        f"{key}, {', '.join(f'{verdict} on {count[verdict]}' for verdict in ('ahead', 'level', 'behind'))}"
        for key, count in verdicts.items()
    ]
    sides = f"{in_a_sentence(names[STUDENT])} against {names[STUDENT_KD]}"
    return f"Over all {len(results)} sets, {sides}: {'; '.join(counted)}."


def _set_sentence(result: SetResult, names: dict[str, str]) -> str:
    student = result.model(STUDENT)
    if student is None:
        return ""
    sampled = _change("sampled", student.rouge_l.mean, result, "mean", student.gap_closed)
    greedy = _change("greedy", student.rouge_l.greedy, result, "greedy", student.gap_closed_greedy)
    parts = [part for part in (sampled, greedy) if part]
    text = f"On {result.name}, {in_a_sentence(names[STUDENT])} {' and '.join(parts)}." if parts else ""
    comparisons = compare_with_control(result)
    return f"{text} {_against_control(comparisons, names)}".strip() if comparisons else text


def _change(decoding: str, value: float, result: SetResult, kind: str, gap_closed: float) -> str:
    if not math.isfinite(value):
        return ""
    before, teacher = _score(result.model(STUDENT_BEFORE), kind), _score(result.model(TEACHER), kind)
    text = f"reaches {decoding} ROUGE-L {fixed(value)}"
    if math.isfinite(before):
        verb = "raises" if value > before else "lowers"
        text = f"{verb} {decoding} ROUGE-L from {fixed(before)} to {fixed(value)}"
    notes = [f"teacher {fixed(teacher)}"] if math.isfinite(teacher) else []
    notes += [f"{percent(gap_closed)} of the gap closed"] if math.isfinite(gap_closed) else []
    return f"{text} ({'; '.join(notes)})" if notes else text


def _score(result: ModelResult | None, kind: str) -> float:
    return math.nan if result is None else float(getattr(result.rouge_l, kind))


def _against_control(comparisons: Sequence[Comparison], names: dict[str, str]) -> str:
    parts = [f"{_verdict(c)} in {c.decoding} {c.metric}" for c in comparisons]
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    student = in_a_sentence(names[STUDENT])
    return f"Against {names[STUDENT_KD]} at the same number of optimizer steps, {student} is {listed}."


def _verdict(comparison: Comparison) -> str:
    size = fixed(abs(comparison.difference))
    if comparison.verdict == "level":
        if not math.isfinite(comparison.std):
            return "level"
        return f"level ({signed(comparison.difference)}, within the spread of the seeds)"
    spread = f"{_PLUS_MINUS}{fixed(comparison.std)}" if math.isfinite(comparison.std) else ""
    return f"{comparison.verdict} by {size}{spread}"


def _pair_tiles(run: RunData, name: str) -> list[Tile]:
    figures = (run.pairs.get("sets") or {}).get(name) or {}
    names, num_pairs = model_names(run.config), len(run.pairs.get("seeds") or ())
    found = []
    for figure, label in PAIR_FIGURES.items():
        one = (figures.get(figure) or {}).get("difference")
        if one and figure in ("rouge_l", "sampled_rouge_l"):
            note = f"{signed(one['low'], 1)} to {signed(one['high'], 1)}, {num_pairs} pairs of seeds"
            value = signed(one["mean"], 1)
            found.append(Tile(f"{label}, {names[STUDENT]} less {names[STUDENT_KD]}", value, note))
    return found


def tiles(run: RunData, results: Sequence[SetResult]) -> list[Tile]:
    """Return the figures at the top of the page, which are those of the first evaluation set."""
    names = model_names(run.config)
    found = _result_tiles(results[0], names) if results else []
    paired = _pair_tiles(run, results[0].name) if results else []
    if paired:  # they say more than the one pair of the run itself, which has no interval
        found = [tile for tile in found if not tile.label.startswith("ROUGE-L, " + names[STUDENT] + " less")] + paired
    total = total_seconds(run.steps)
    if total > 0:
        steps = f"{run.plan.stage_ends[-1]:,} optimizer steps" if run.plan and run.plan.stages else "all steps"
        found.append(Tile("time", duration(total), steps))
    return found


def _result_tiles(result: SetResult, names: dict[str, str]) -> list[Tile]:
    student = result.model(STUDENT)
    if student is None:
        return []
    before, teacher = _score(result.model(STUDENT_BEFORE), "mean"), _score(result.model(TEACHER), "mean")
    ends = [f"{fixed(before, 1)} before"] if math.isfinite(before) else []
    ends += [f"teacher {fixed(teacher, 1)}"] if math.isfinite(teacher) else []
    found = []
    if math.isfinite(student.rouge_l.mean):
        found.append(Tile(f"ROUGE-L, {result.name}, sampled", fixed(student.rouge_l.mean, 1), ", ".join(ends)))
    if math.isfinite(student.gap_closed):
        note = f"greedy {percent(student.gap_closed_greedy)}"
        found.append(Tile("of the teacher's gap closed", percent(student.gap_closed), note))
    rouge = {c.decoding: c for c in compare_with_control(result) if c.metric == "ROUGE-L"}
    if "sampled" in rouge:
        note = f"greedy {signed(rouge['greedy'].difference, 1)}" if "greedy" in rouge else "sampled"
        value = signed(rouge["sampled"].difference, 1)
        found.append(Tile(f"ROUGE-L, {names[STUDENT]} less {names[STUDENT_KD]}", value, note))
    return found
