"""Seconds to answer prompts in scoring and evaluation: one decoding loop against one `generate` a seed.

    python benchmarks/answer_speed.py [--student DIR] [--prompts 64] [--new-tokens 64] [--rounds 3]
                                      [--works scoring evaluation]

The other side is how the project answered before it had one loop: for each seed one call of transformers' `generate`
in rounds of 16 and then 32 tokens, rows that have stopped leaving between rounds. Both sides get the same weights in
float32, the same prompts, limits, n-gram ban and stop tokens, in turn:

    scoring      one nearly greedy answer to each prompt (temperature 0.01, no 6-gram twice)
    evaluation   five sampled answers and a greedy one to each prompt (temperature 1, no 6-gram twice)

Each round is a process of each side. Greedy answers must be the same. The program fails where they are not, or where a
ratio, of tokens a second, is below its bar. Scoring here is the answers alone, without the losses of the references.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from measuring import (
    Agreement,
    Bar,
    Measurement,
    SideRun,
    Spread,
    add_json_option,
    conclude,
    peak_bytes,
    report_side,
    run_sides,
    summarize,
)
from rollout_speed import load_student, prompts_like_dolly
from transformers import GenerationConfig, PreTrainedModel

from pocl_ray.answers.batch import pad_left
from pocl_ray.answers.decode import GenerationSettings, generate

Answers = list[list[list[int]]]
Answer = Callable[[list[np.ndarray]], Answers]
BARS = {"scoring": 3.0, "evaluation": 2.0}
TITLES = {"scoring": "answers of scoring", "evaluation": "evaluation, five seeds and greedy"}
SEEDS = (10, 20, 30, 40, 50, None)
WORKS: dict[str, tuple[float, tuple[int | None, ...]]] = {"scoring": (0.01, (10,)), "evaluation": (1.0, SEEDS)}
NO_REPEAT = 6
NUM_STOPS = 200  # random weights end a sampled answer at each token with a chance of NUM_STOPS over the vocabulary
FIRST_ROUND, ROUND = 16, 32


def our_side(student: PreTrainedModel, settings: GenerationSettings, seeds: Sequence[int | None]) -> Answer:
    """All seeds in one call."""
    tokenizer: Any = SimpleNamespace(eos_token_id=0)
    return lambda prompts: generate(student, tokenizer, prompts, settings, seeds)


def former_side(student: PreTrainedModel, settings: GenerationSettings, seeds: Sequence[int | None]) -> Answer:
    """One `generate` in rounds for each seed and batch."""

    def answer(prompts: list[np.ndarray]) -> Answers:
        order = np.argsort([len(prompt) for prompt in prompts], kind="stable").tolist()
        answered: Answers = []
        for seed in seeds:
            answers: list[list[int]] = [[] for _ in prompts]
            for start in range(0, len(order), settings.batch_rows):
                rows = order[start : start + settings.batch_rows]
                torch.manual_seed(seed or 0)
                written = in_rounds(student, [prompts[row] for row in rows], settings, seed is not None)
                for row, tokens in zip(rows, written, strict=True):
                    answers[row] = tokens
            answered.append(answers)
        return answered

    return answer


def config_of(student: PreTrainedModel, settings: GenerationSettings, sampled: bool) -> GenerationConfig:
    """The settings of `generate`."""
    stops: Any = student.generation_config.eos_token_id
    return GenerationConfig(
        do_sample=sampled,
        temperature=settings.sampling_temperature if sampled else None,
        top_k=0 if sampled else None,
        no_repeat_ngram_size=settings.no_repeat_ngram_size,
        eos_token_id=[0, *stops],
        pad_token_id=0,
        use_cache=True,
        return_dict_in_generate=True,
    )


def in_rounds(
    student: PreTrainedModel, prompts: list[np.ndarray], settings: GenerationSettings, sampled: bool
) -> list[list[int]]:
    """The answers of a batch: a round of `generate`, then the next one with the rows that are left."""
    model: Any = student
    config, limit = config_of(student, settings, sampled), settings.limits(1)[0]
    own, model.generation_config = model.generation_config, GenerationConfig()
    ids_BT, mask_BT = pad_left([prompt.astype(np.int64) for prompt in prompts], torch.device("cpu"))
    answers: list[list[int]] = [[] for _ in prompts]
    rows, cache, num_new = list(range(len(prompts))), None, 0
    while rows:
        config.max_new_tokens = min(ROUND if num_new else FIRST_ROUND, limit - num_new)
        known = {} if cache is None else {"past_key_values": cache}
        out = model.generate(ids_BT, attention_mask=mask_BT, generation_config=config, **known)
        new_BT = out.sequences[:, ids_BT.shape[1] :]
        num_new += new_BT.shape[1]
        ids_BT, cache = out.sequences, out.past_key_values
        mask_BT = torch.cat([mask_BT, torch.ones_like(new_BT)], dim=1)
        kept = []
        for index, (row, tokens) in enumerate(zip(rows, new_BT.tolist(), strict=True)):
            answers[row] += tokens
            end = next((i for i, token in enumerate(answers[row]) if token in config.eos_token_id), None)
            if end is None and len(answers[row]) < limit:
                kept.append(index)
            else:
                answers[row] = answers[row][:limit] if end is None else answers[row][:end]
        if 0 < len(kept) < len(rows):
            kept_B = torch.tensor(kept)
            ids_BT, mask_BT = ids_BT[kept_B], mask_BT[kept_B]
            cache.batch_select_indices(kept_B)
        rows = [rows[index] for index in kept]
    model.generation_config = own
    return answers


def settings_of(work: str, options: argparse.Namespace) -> tuple[GenerationSettings, tuple[int | None, ...]]:
    """The settings and the seeds of a work; a seed that is None writes greedily."""
    temperature, seeds = WORKS[work]
    return GenerationSettings(temperature, 1.0, NO_REPEAT, options.new_tokens, options.batch_rows), seeds


def run_side(options: argparse.Namespace) -> None:
    """Answer the prompts once in this process and report it; answers of two tokens first warm up."""
    work, _, name = options.side.partition(" ")
    student = load_student(options.student, options.student_layers)
    student.generation_config.eos_token_id = list(range(1, 1 + NUM_STOPS))
    settings, seeds = settings_of(work, options)
    side = our_side if name == "ours" else former_side
    prompts = prompts_like_dolly(options.prompts, student.config.vocab_size, seed=0)
    side(student, dataclasses.replace(settings, max_new_tokens=2), seeds)(prompts)
    started = time.perf_counter()
    answers = side(student, settings, seeds)(prompts)
    seconds = time.perf_counter() - started
    greedy = json.dumps(answers[seeds.index(None)]) if None in seeds else ""
    num_tokens = sum(len(answer) for of_seed in answers for answer in of_seed)
    report_side(SideRun([seconds], num_tokens, peak_bytes(), answers=hashlib.sha256(greedy.encode()).hexdigest()))


def compare(work: str, ours: list[SideRun], former: list[SideRun], options: argparse.Namespace) -> Measurement:
    """Return the row of a work. Ratios are of tokens a second: sampled answers of the sides differ in length."""
    pairs = [
        (own.num_tokens / sum(own.seconds), theirs.num_tokens / sum(theirs.seconds))
        for own, theirs in zip(ours, former, strict=True)
    ]
    ratio = Spread.of([own / theirs for own, theirs in pairs])
    differ = float(len({run.answers for run in (*ours, *former)}) > 1)
    setting = (
        f"6 layers of SmolLM2-135M's shape, {options.prompts} prompts, {options.new_tokens} new tokens, fp32, "
        f"{torch.get_num_threads()} thread(s), {options.rounds} rounds"
    )
    return Measurement(
        TITLES[work],
        "one generate a seed",
        setting,
        (Bar("times as fast", ratio.median, BARS[work]),),
        (summarize("ours", ours), summarize("former", former)),
        ratio,
        (Agreement("greedy answers", differ, 0.0),) if None in WORKS[work][1] else (),
    )


def main() -> int:
    """Run both works."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", help="directory of a model to cut layers from; default: random weights")
    parser.add_argument("--student-layers", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--works", nargs="+", choices=list(WORKS), default=list(WORKS))
    add_json_option(parser)
    all_sides = [f"{work} {side}" for work in WORKS for side in ("ours", "former")]
    parser.add_argument("--side", choices=all_sides, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run_side(options)
        return 0
    sides = [side for side in all_sides if side.partition(" ")[0] in options.works]
    runs = run_sides(__file__, sides, options.rounds, sys.argv[1:])
    rows = [compare(work, runs[f"{work} ours"], runs[f"{work} former"], options) for work in options.works]
    return conclude(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
