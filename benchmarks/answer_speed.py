"""Seconds to answer prompts in scoring and evaluation: one decoding loop against one `generate` a seed.

    python benchmarks/answer_speed.py [--student DIR] [--prompts 64] [--new-tokens 64] [--rounds 3]

The other side is how the project answered before it had one loop: for each seed one call of transformers' `generate`
in rounds of 16 and then 32 tokens, rows that have stopped leaving between rounds. Both sides get the same weights in
float32, the same prompts, limits, n-gram ban and stop tokens, in turn:

    scoring      one nearly greedy answer to each prompt (temperature 0.01, no 6-gram twice)
    evaluation   five sampled answers and a greedy one to each prompt (temperature 1, no 6-gram twice)

Greedy answers must be the same. The program fails where they are not, or where a ratio is below its bar. On a machine
with other work the processor's time is the figure to go by.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rollout_speed import load_student, prompts_like_dolly
from transformers import GenerationConfig, PreTrainedModel

from pocl_ray.answers.batch import pad_left
from pocl_ray.answers.decode import GenerationSettings, generate

Answers = list[list[list[int]]]
Answer = Callable[[list[np.ndarray]], Answers]
BARS = {"scoring": 1.5, "evaluation": 1.5}
SEEDS = (10, 20, 30, 40, 50, None)
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


def compare(work: str, sides: dict[str, Answer], prompts: list[np.ndarray], rounds: int, greedy: int | None) -> bool:
    """Run the sides in turn, print their seconds and the ratio; return whether it reaches the bar."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    same, counts = True, dict.fromkeys(sides, 0)
    for index in range(rounds + 1):  # the first one warms up
        found: dict[str, Answers] = {}
        for name, side in sides.items():
            start = time.perf_counter(), time.process_time()
            found[name] = side(prompts)
            taken[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
            counts[name] = sum(len(answer) for answers in found[name] for answer in answers)
        if greedy is not None:
            same = same and found["ours"][greedy] == found["former"][greedy]
        shown = ", ".join(f"{name} {clock[-1][0]:.2f} s ({clock[-1][1]:.2f})" for name, clock in taken.items())
        print(f"  {work} {index or 'warm'}: {shown}", flush=True)
    rounds_taken = list(zip(taken["former"][1:], taken["ours"][1:], strict=True))
    wall, cpu = (statistics.median(former[clock] / ours[clock] for former, ours in rounds_taken) for clock in (0, 1))
    told = "" if greedy is None else f"; greedy answers {'the same' if same else 'DIFFER'}"
    print(
        f"{work}: {counts['ours']} tokens, former {counts['former']}; {wall:.2f} times as fast "
        f"({cpu:.2f} by the processor's time), bar {BARS[work]}{told}"
    )
    return same and max(wall, cpu) >= BARS[work]


def main() -> int:
    """Run both works."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", help="directory of a model to cut layers from; default: random weights")
    parser.add_argument("--student-layers", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    student = load_student(args.student, args.student_layers)
    student.generation_config.eos_token_id = list(range(1, 1 + NUM_STOPS))
    prompts = prompts_like_dolly(args.prompts, student.config.vocab_size, seed=0)
    fits = True
    for work, temperature, seeds in (("scoring", 0.01, (10,)), ("evaluation", 1.0, SEEDS)):
        settings = GenerationSettings(temperature, 1.0, NO_REPEAT, args.new_tokens, args.batch_rows)
        sides = {"ours": our_side(student, settings, seeds), "former": former_side(student, settings, seeds)}
        greedy = seeds.index(None) if None in seeds else None
        fits &= compare(work, sides, prompts, args.rounds, greedy)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
