"""Trains the teacher that the package ships for the quickstart, and measures it.

The data are the package's own generator of instruction rows (`pocl_ray/data/samples/`). The teacher sees rows of other
draws than the quickstart's; a row whose question stands in the quickstart's dev or test set is left out, however the
task is phrased. The tokenizer is the one that a quickstart would train on its own training rows, so that a student may
be made from nothing and read the same tokens.

The weights are stored in bfloat16, and the figures are those of the stored weights.

    python benchmarks/quickstart_teacher.py            # train, write the directory, measure
    python benchmarks/quickstart_teacher.py --measure  # measure what is there

Legend: B batch, T tokens, N response tokens in one flat axis.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl_ray.answers.rouge import exact_match, rouge_l
from pocl_ray.config import load_config
from pocl_ray.data.batching import collate
from pocl_ray.data.prepare import training_texts
from pocl_ray.data.samples import fresh_rows, sample_rows
from pocl_ray.data.tokenization import train_tokenizer
from pocl_ray.models.building import build_model
from pocl_ray.models.loading import load_model, load_tokenizer, num_parameters
from pocl_ray.models.places import ModelRef, file_sha256
from pocl_ray.models.saving import save_model
from pocl_ray.models.shipped import FOLDER

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
DIRECTORY = FOLDER / "quickstart-teacher"
FIGURES = "figures.json"

ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 336,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
VOCABULARY = 768
ROWS_SEED, ROWS_PER_FAMILY = "quickstart-teacher", 700
MODEL_SEED, ORDER_SEED = 42, 7
BATCH_ROWS, LEARNING_RATE, BETAS, WARMUP, DECAY = 64, 4e-3, (0.9, 0.98), 0.04, 0.5
MAX_NEW_TOKENS, SAMPLING_SEEDS = 24, (10, 20, 30, 40, 50)

Pair = tuple[np.ndarray, np.ndarray]


def prompt_of(row: dict) -> str:
    """The prompt as the quickstart's template writes it."""
    return f"{row['instruction']}\n{row['input']}\n=>\n"


def references_of(row: dict) -> list[str]:
    """The accepted answers of a row."""
    return [row["output"]] if isinstance(row["output"], str) else row["output"]


def tokenized(rows: list[dict], tokenizer: PreTrainedTokenizerBase) -> list[Pair]:
    """Token ids of prompt and response, the end token included; the template ends in a line break, so they part."""
    prompts = tokenizer([prompt_of(row) for row in rows])["input_ids"]
    responses = tokenizer([references_of(row)[0] for row in rows])["input_ids"]
    return [
        (np.array(prompt), np.array([*response, tokenizer.eos_token_id]))
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def rate(step: int, num_steps: int) -> float:
    """Learning rate: a short rise, constant, then a linear fall over the last part of the run."""
    rising, falling = WARMUP * num_steps, DECAY * num_steps
    return LEARNING_RATE * min(1.0, (step + 1) / rising, (num_steps - step) / falling)


def train(rows: list[Pair], tokenizer: PreTrainedTokenizerBase, num_steps: int) -> PreTrainedModel:
    """Supervised training from nothing: cross-entropy per response token, float32, one process."""
    model = build_model(ARCHITECTURE, VOCABULARY, tokenizer.eos_token_id, None, MODEL_SEED)
    optimizer = torch.optim.AdamW(model.parameters(), betas=BETAS, weight_decay=0.01, fused=True)
    rng, order, started = np.random.default_rng(ORDER_SEED), np.empty(0, np.int64), time.monotonic()
    for step in range(num_steps):
        if len(order) < BATCH_ROWS:
            order = rng.permutation(len(rows))
        ids, order = order[:BATCH_ROWS], order[BATCH_ROWS:]
        batch = collate([rows[i][0] for i in ids], [rows[i][1] for i in ids], tokenizer.pad_token_id)
        hidden_BTH = model.model(batch.input_ids_BT, attention_mask=batch.attention_mask_BT).last_hidden_state
        logits_NV = model.lm_head(hidden_BTH.flatten(0, 1)[batch.response_index_N])
        loss = F.cross_entropy(logits_NV, batch.targets_N)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, num_steps)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 200 == 0:
            print(f"step {step + 1}: loss {float(loss.detach()):.4f}, {time.monotonic() - started:.0f} s", flush=True)
    return model


@torch.inference_mode()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict], seed: int | None
) -> list[str]:
    """Answers to the rows' prompts: greedy, or sampled at temperature 1 where a seed is given."""
    batch = tokenizer([prompt_of(row) for row in rows], return_tensors="pt", padding=True, padding_side="left")
    if seed is not None:
        torch.manual_seed(seed)
    made = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=MAX_NEW_TOKENS,
        **({"do_sample": False} if seed is None else {"do_sample": True, "temperature": 1.0, "top_k": 0}),
    )
    return tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.inference_mode()
def token_figures(model: PreTrainedModel, pairs: list[Pair], pad_id: int) -> tuple[float, float]:
    """Cross-entropy on the references, and entropy of the model itself, in nats a response token."""
    batch = collate([prompt for prompt, _ in pairs], [response for _, response in pairs], pad_id)
    logits_BTV = model(batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
    log_NV = logits_BTV.flatten(0, 1)[batch.response_index_N].log_softmax(-1)
    return float(F.nll_loss(log_NV, batch.targets_N)), float(-(log_NV.exp() * log_NV).sum(-1).mean())


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, split: str, seeds: tuple[int, ...] = SAMPLING_SEEDS
) -> dict[str, float]:
    """ROUGE-L and exact match of greedy and of sampled answers, cross-entropy and entropy, on a split of the rows."""
    rows = sample_rows("instructions", split)
    found: dict[str, list[float]] = {}
    for kind, draws in (("greedy", (None,)), ("sampled", seeds)):
        for seed in draws:
            for row, answer in zip(rows, answers(model, tokenizer, rows, seed), strict=True):
                found.setdefault(f"{kind}_rouge_l", []).append(rouge_l(answer, references_of(row)))
                found.setdefault(f"{kind}_exact_match", []).append(exact_match(answer, references_of(row)))
    ce, entropy = token_figures(model, tokenized(rows, tokenizer), tokenizer.pad_token_id)
    figures = {name: round(float(np.mean(values)), 2) for name, values in found.items()}
    return {**figures, "cross_entropy": round(ce, 4), "entropy": round(entropy, 4)}


def main() -> None:
    """Train where asked to, then measure on dev and test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure the directory as it is; train nothing")
    parser.add_argument("--steps", type=int, default=1200, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--directory", type=Path, default=DIRECTORY, help="where the teacher is written or read")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.measure:
        scratch = arguments.directory / "tokenizer"
        train_tokenizer(training_texts(load_config(QUICKSTART).data), VOCABULARY, scratch)
        tokenizer = load_tokenizer(str(scratch))
        rows = fresh_rows("instructions", ROWS_SEED, ROWS_PER_FAMILY)
        print(f"{len(rows)} rows", flush=True)
        model = train(tokenized(rows, tokenizer), tokenizer, arguments.steps)
        save_model(model.to(torch.bfloat16), tokenizer, arguments.directory)
    tokenizer = load_tokenizer(str(arguments.directory))
    model = load_model(ModelRef(str(arguments.directory)), dtype=torch.float32)
    weights = arguments.directory / "model.safetensors"
    figures: dict[str, dict] = {split: measure(model, tokenizer, split) for split in ("dev", "test")}
    figures["model"] = {"num_parameters": num_parameters(model), "sha256": file_sha256(weights)}
    (arguments.directory / FIGURES).write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
