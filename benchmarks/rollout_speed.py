"""Tokens a second of a rollout: ours against TRL's on-policy GKDTrainer, alternately, on the same prompts and lengths.

    python benchmarks/rollout_speed.py [--student DIR] [--rows 32] [--micro-batch 8] [--new-tokens 64] [--rounds 3]

Both sides write the responses of one optimizer step with the same weights, in float32, sampled at temperature 1 from
the whole vocabulary; no token ends a response early. TRL generates for one micro-batch after the other, as its
training step does, and we for the whole batch of the step. Each round is a process of each side. `TRL cached` is TRL
with `gradient_checkpointing=False`, `TRL default` as it comes: then it generates without a key-value cache. The program
fails where ours is not three times as fast as TRL cached.

TRL is an extra (`pip install 'pocl-ray[trl]'`); `make install` brings it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from datasets import Dataset
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
from step_sides import random_model, smollm2_shape
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from pocl_ray.answers.batch import pad_left
from pocl_ray.answers.decode import GenerationSettings, decode
from pocl_ray.experiments.flops import size_of
from pocl_ray.models.prepare import cut_layers

Write = Callable[[list[np.ndarray]], int]
BAR = 3.0
SIDES = ("ours", "TRL cached", "TRL default")
NEVER = 0  # a token that no prompt holds and no side may stop at: sampled, it is one token more


def load_student(directory: str | None, num_layers: int) -> PreTrainedModel:
    """Layers cut from a local model, or random weights of SmolLM2-135M's shape."""
    if directory is None:
        return random_model(smollm2_shape(num_layers), seed=0).eval()
    teacher = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, dtype=torch.float32)
    return cut_layers(teacher, num_layers).float().eval()


def prompts_like_dolly(num_rows: int, vocabulary: int, seed: int) -> list[np.ndarray]:
    """Random prompts with lengths like those of Dolly: a median of 60 tokens, a long tail."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(60 * np.exp(0.8 * rng.standard_normal(num_rows)), 20, 256).astype(int)
    return [rng.integers(3, vocabulary, length) for length in lengths]


def our_side(student: PreTrainedModel, new_tokens: int) -> Write:
    """Our rollout of a whole batch."""

    def write(prompts: list[np.ndarray]) -> int:
        rng = np.random.default_rng(len(prompts[0]))
        uniforms = [rng.random(new_tokens, dtype=np.float32) for _ in prompts]
        limits = [new_tokens] * len(prompts)
        (written,) = decode(student, prompts, limits, [uniforms], stop_ids=[], settings=GenerationSettings())
        return sum(map(len, written))

    return write


def trl_side(student: PreTrainedModel, new_tokens: int, micro_batch: int, cached: bool, scratch: str) -> Write:
    """TRL's own generation for a training step, one micro-batch after the other."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    from trl.experimental.gkd import gkd_trainer as module

    student.generation_config.eos_token_id = None
    settings: dict[str, Any] = {} if not cached else {"gradient_checkpointing": False}
    args = GKDConfig(
        output_dir=scratch,
        lmbda=1.0,
        temperature=1.0,
        max_new_tokens=new_tokens,
        per_device_train_batch_size=micro_batch,
        report_to=[],
        bf16=False,
        use_cpu=True,
        **settings,
    )
    teacher = random_model(smollm2_shape(1, hidden=192), seed=1)
    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        processing_class=bare_tokenizer(),
        train_dataset=Dataset.from_list([{"messages": []}]),
    )

    def write(prompts: list[np.ndarray]) -> int:
        num_tokens = 0
        for start in range(0, len(prompts), micro_batch):
            part = [prompt.astype(np.int64) for prompt in prompts[start : start + micro_batch]]
            ids_BT, mask_BT = pad_left(part, torch.device("cpu"))
            with module.unwrap_model_for_generation(
                trainer.model,
                trainer.accelerator,
                generation_kwargs=trainer.generation_kwargs,
                gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
            ) as model:
                inputs = {"prompts": ids_BT, "prompt_attention_mask": mask_BT}
                tokens_BT, _, _ = trainer.generate_on_policy_outputs(model, inputs, trainer.generation_config)
            num_tokens += tokens_BT[:, ids_BT.shape[1] :].numel()
        return num_tokens

    return write


def bare_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for GKDTrainer, which needs one although prompts come as tokens."""
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, "<pad>")))
    tokenizer.pad_token, tokenizer.eos_token = "<pad>", "<eos>"
    tokenizer.chat_template = "{{ messages }}"
    return tokenizer


def run_side(options: argparse.Namespace) -> None:
    """Write the responses of one round in this process and report it; the same ones first warm up."""
    student = load_student(options.student, options.student_layers)
    with tempfile.TemporaryDirectory() as scratch:
        write = (
            our_side(student, options.new_tokens)
            if options.side == "ours"
            else trl_side(student, options.new_tokens, options.micro_batch, options.side == "TRL cached", scratch)
        )
        prompts = prompts_like_dolly(options.rows, student.config.vocab_size, seed=1)
        write(prompts)
        started = time.perf_counter()
        num_tokens = write(prompts)
        seconds = time.perf_counter() - started
    report_side(SideRun([seconds], num_tokens, peak_bytes(), flops_needed=writing_flops(student, prompts, num_tokens)))


def writing_flops(student: PreTrainedModel, prompts: list[np.ndarray], num_new: int) -> float:
    """FLOPs that answers of equal length need: each prompt and each new token once, logits of new tokens alone."""
    size, each = size_of(student), num_new // len(prompts)
    return sum(size.forward(len(prompt) + each - 1, each, (len(prompt) + each) / 2) for prompt in prompts)


def main() -> int:
    """Run the rounds and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", help="directory of a model to cut layers from; default: random weights")
    parser.add_argument("--student-layers", type=int, default=6)
    parser.add_argument("--rows", type=int, default=32, help="rows of an optimizer step")
    parser.add_argument("--micro-batch", type=int, default=8, help="TRL's per_device_train_batch_size")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--with-default", action="store_true", help="TRL as it comes as well: minutes a round")
    add_json_option(parser)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run_side(options)
        return 0
    try:
        trl = f"TRL {version('trl')}"
    except PackageNotFoundError:
        print("TRL is not installed: pip install 'pocl-ray[trl]'", file=sys.stderr)
        return 2
    runs = run_sides(__file__, SIDES if options.with_default else SIDES[:2], options.rounds, sys.argv[1:])
    ours, other = runs["ours"], runs["TRL cached"]
    ratio, peak = ratio_of(ours, other), matmul_peak("float32")
    setting = (
        f"6 layers of SmolLM2-135M's shape, {options.rows} rows, {options.new_tokens} new tokens, TRL in micro-batches "
        f"of {options.micro_batch}, fp32, {torch.get_num_threads()} thread(s), {options.rounds} rounds"
    )
    counts = [run.num_tokens for run in (*ours, *other)]
    row = Measurement(
        "on-policy responses of a step, against TRL",
        f"{trl} GKDTrainer, lmbda 1, with its cache",
        setting,
        (Bar("times as fast", ratio.median, BAR),),
        (summarize("ours", ours, peak), summarize("trl", other, peak)),
        ratio,
        (Agreement("counts of tokens", max(counts) / min(counts) - 1, 0.0),),
    )
    return conclude([row], options.json)


if __name__ == "__main__":
    sys.exit(main())
