"""Whole scoring as in the paper: each prompt answered, each reference read, and the rows ranked by both.

    python benchmarks/scoring_speed.py [--rows 48] [--new-tokens 256] [--rounds 2]

    ours   the actor of the scoring job, in this process: tasks of rows of like length, one decoding loop that rows
           leave when they have ended, and logits of response tokens alone
    plain  batches in the order of the file, padded to their longest row: one `generate`, and a second forward pass with
           logits at every position for the losses

Both give ROUGE-L and the mean cross-entropy of each row, and fuse them by reciprocal ranks. Answers are greedy here
(the paper's temperature is 0.01), without a 6-gram twice, because two samplers would not draw alike. The student has
random weights, of whose vocabulary so many tokens end an answer that answers are about as long as Dolly's.

Each round is a process of each side, with the same weights in float32. Answers, ranks and cross-entropies must be the
same. Ray is not in it: what it adds is measured by `orchestration.py` and `whole_run.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import (
    Agreement,
    Bar,
    Measurement,
    SideRun,
    add_json_option,
    conclude,
    matmul_peak,
    peak_bytes,
    ratio_of,
    report_side,
    run_sides,
    summarize,
)
from plain_scoring import NO_REPEAT, fused_order, generated, losses_of
from step_sides import random_model, smollm2_shape
from text_rows import MAX_PROMPT_TOKENS, MAX_TOKENS, TEMPLATE, stop_tokens, word_tokenizer, write_rows
from transformers import PreTrainedTokenizerBase

from pocl_ray.answers import rouge
from pocl_ray.config import DataConfig, GenerationConfig, SourceConfig
from pocl_ray.data.prepare import prepare_all
from pocl_ray.data.row_store import RowStore
from pocl_ray.difficulty.actors import ScoringTask, StudentActor
from pocl_ray.difficulty.ranking import rank_rows
from pocl_ray.difficulty.tasks import plan_tasks, unit_table
from pocl_ray.experiments.flops import size_of
from pocl_ray.models.places import ModelRef
from pocl_ray.models.saving import save_model
from pocl_ray.records import ID
from pocl_ray.run_directory.storage import RunDirectory

BAR, SAME_LOSS = 3.0, 1e-3
SIDES = ("ours", "plain")
SET = "train"


@dataclasses.dataclass
class Scored:
    """What a side found of each row."""

    answers: list[list[int]]
    rouge_l: np.ndarray
    ce_loss: np.ndarray
    order: np.ndarray  # row ids, the easiest first


Score = Callable[[], Scored]


class Inputs:
    """Rows, tokenizer and student in a folder."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        """Write them; the same options give the same ones."""
        self.options, self.run_dir = options, RunDirectory.open(str(folder), "run")
        self.tokenizer: PreTrainedTokenizerBase = word_tokenizer(options.vocabulary)
        self.tokenizer.save_pretrained(self.run_dir.local("tokenizer"))
        write_rows(folder / "rows.jsonl", options.rows, options.vocabulary)
        source = SourceConfig(path=str(folder / "rows.jsonl"))
        data = DataConfig(
            train=source,
            dev=source,
            prompt_template=TEMPLATE,
            max_prompt_tokens=MAX_PROMPT_TOKENS,
            max_tokens=MAX_TOKENS,
        )
        self.path = prepare_all(data, self.tokenizer, 0, self.run_dir).train.path
        self.rows = RowStore.open(self.run_dir.local(self.path))
        student = random_model(smollm2_shape(options.student_layers, options.vocabulary, options.hidden), seed=0)
        student.generation_config.eos_token_id = stop_tokens(options.vocabulary)
        self.student = ModelRef(str(save_model(student, self.tokenizer, folder / "student")), dtype="float32")

    def task(self, new_tokens: int) -> ScoringTask:
        """Return the settings of the scoring job's actors."""
        return ScoringTask(
            run_dir=self.run_dir,
            rows={SET: self.path},
            student_set=SET,
            tokenizer="tokenizer",
            student=self.student,
            teacher=None,
            generation=GenerationConfig(
                sampling_temperature=0.0, no_repeat_ngram_size=NO_REPEAT, max_new_tokens=new_tokens
            ),
            max_tokens=MAX_TOKENS,
            seed=0,
            compare=False,
            cache=None,
            cache_dtype="auto",
            use_gpu=False,
        )


def our_side(inputs: Inputs) -> Score:
    """The actor of the scoring job on the tasks that the job plans, then the ranking of the package."""
    actor, rows = StudentActor(inputs.task(2)), inputs.rows
    tasks = plan_tasks(rows.prompt_lengths, rows.response_lengths, 512, 8192)
    list(actor(unit_table(SET, [tasks[-1][0][:2]])))  # loads the student, and warms it up
    actor.task = inputs.task(inputs.options.new_tokens)
    answers: dict[int, list[int]] = {}
    answer = rouge.generate

    def kept(*given: Any) -> Any:
        written = answer(*given)
        answers.update(zip(given[-1], written[0], strict=True))
        return written

    def score() -> Scored:
        rouge.generate = kept
        tables = [table for task in tasks for table in actor(unit_table(SET, task))]
        ids = np.concatenate([table[ID].to_numpy() for table in tables])
        signals = {}
        for name in ("rouge_l", "ce_loss"):
            signals[name] = np.empty(len(ids))
            signals[name][ids] = np.concatenate([table[name].to_numpy() for table in tables])
        _, rank = rank_rows(signals)
        return Scored([answers[row] for row in range(len(ids))], **signals, order=np.argsort(rank))

    return score


def plain_side(inputs: Inputs) -> Score:
    """Batches as they are read, by transformers alone."""
    from pocl_ray.models.loading import load_model

    options, rows = inputs.options, inputs.rows
    student = load_model(inputs.student)

    def score() -> Scored:
        answers: list[list[int]] = []
        ce_loss: list[float] = []
        for first in range(0, len(rows), options.batch):
            prompts, responses = rows.tokens(np.arange(first, min(first + options.batch, len(rows))))
            answers += generated(student, inputs.tokenizer, prompts, options.new_tokens)
            ce_loss += losses_of(student, prompts, responses)
        texts = inputs.tokenizer.batch_decode(answers, skip_special_tokens=True)
        rouge_l = np.array(rouge.rouge_l_batch(texts, rows.references(np.arange(len(rows)))))
        return Scored(answers, rouge_l, np.array(ce_loss), fused_order(rouge_l, np.array(ce_loss)))

    generated(student, inputs.tokenizer, rows.tokens(np.arange(2))[0], 2)  # warms it up
    return score


def run_side(options: argparse.Namespace) -> None:
    """Score the rows once in this process and report it."""
    with tempfile.TemporaryDirectory() as folder:
        inputs = Inputs(Path(folder), options)
        score = {"ours": our_side, "plain": plain_side}[options.side](inputs)
        started = time.perf_counter()
        scored = score()
        seconds = time.perf_counter() - started
        prompts, responses = inputs.rows.tokens(np.arange(len(inputs.rows)))
        size = size_of(random_model(smollm2_shape(options.student_layers, options.vocabulary, options.hidden), 0))
    needed = 0.0
    for prompt, response, answer in zip(prompts, responses, scored.answers, strict=True):
        for num_new in (len(response), len(answer)):
            needed += size.forward(len(prompt) + num_new, num_new, len(prompt) + num_new)
    num_tokens = sum(2 * len(prompt) for prompt in prompts) + sum(map(len, [*responses, *scored.answers]))
    found = f"{digest(scored.answers)} {digest([scored.rouge_l.tolist(), scored.order.tolist()])}"
    report_side(SideRun([seconds], num_tokens, peak_bytes(), scored.ce_loss.tolist(), found, flops_needed=needed))


def digest(value: Any) -> str:
    """Return a short name of a value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def measurement_of(options: argparse.Namespace, runs: dict[str, list[SideRun]], peak: float) -> Measurement:
    """Return the row of the table."""
    ours, plain = (runs[side] for side in SIDES)
    ratio, all_runs = ratio_of(ours, plain), [*ours, *plain]
    found = [run.answers.split() for run in all_runs]
    apart = max(
        abs(own / other - 1)
        for mine, theirs in zip(ours, plain, strict=True)
        for own, other in zip(mine.losses, theirs.losses, strict=True)
    )
    setting = (
        f"{options.student_layers} layers of SmolLM2-135M's shape, {options.rows} rows as long as Dolly's, answers of "
        f"at most {options.new_tokens} tokens, {options.batch} rows at once on the other side, fp32, "
        f"{torch.get_num_threads()} thread(s), {options.rounds} rounds"
    )
    return Measurement(
        "scoring: answers, losses and ranks",
        "batches as read, one generate, a second forward pass",
        setting,
        (Bar("times as fast", ratio.median, BAR),),
        (summarize("ours", ours, peak), summarize("plain", plain, peak)),
        ratio,
        (
            Agreement("answers", float(len({answers for answers, _ in found}) > 1), 0.0),
            Agreement("ROUGE-L and ranks", float(len({ranks for _, ranks in found}) > 1), 0.0),
            Agreement("cross-entropies", apart, SAME_LOSS),
        ),
    )


def main() -> int:
    """Run the rounds and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student-layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16, help="rows of a batch of the other side")
    parser.add_argument("--rounds", type=int, default=2)
    add_json_option(parser)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run_side(options)
        return 0
    runs = run_sides(__file__, SIDES, options.rounds, sys.argv[1:])
    return conclude([measurement_of(options, runs, matmul_peak("float32"))], options.json)


if __name__ == "__main__":
    sys.exit(main())
