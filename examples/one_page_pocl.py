"""POCL on one page: progressive overload-based curriculum learning for distillation, in plain PyTorch.

    python examples/one_page_pocl.py

A student is warmed up, its rows are ranked from easy to hard, and it is distilled through stages that admit harder
and harder rows. Rows and teacher are those that the package ships. It takes less than a minute on a CPU; a test holds
that its losses are those of the package, which does the same with checkpoints, caches and many machines.

Legend: B rows, T tokens, N response tokens in one flat axis, V vocabulary, H hidden.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import pocl_ray
from pocl_ray.data.samples import sample_rows

TEACHER = Path(pocl_ray.__file__).parent / "models" / "samples" / "quickstart-teacher"
SEED = 42
BATCH_ROWS, MICRO_BATCH_ROWS = 32, 16  # of an optimizer step, and of a forward pass
NUM_STAGES, EPOCHS_PER_STAGE = 4, 2
WARM_UP_STEPS, PEAK_LR = 100, 6e-3


class Stage(NamedTuple):
    """The rows of a stage, and the settings of their training: `kd_ratio` 0 is supervised fine-tuning."""

    index: int
    rows: np.ndarray  # row numbers
    num_steps: int
    temperature: float
    kd_ratio: float


def read(split: str, tokenizer, num_rows: int | None = None) -> list[dict]:
    """Rows of a split: the prompt and the accepted answers, and the tokens of the prompt and the first answer."""
    rows = []
    for row in sample_rows("instructions", split)[:num_rows]:
        prompt = f"{row['instruction']}\n{row['input']}\n=>\n"
        references = [row["output"]] if isinstance(row["output"], str) else row["output"]
        prompt_ids, response_ids = tokenizer(prompt)["input_ids"], tokenizer(references[0])["input_ids"]
        ids = [*prompt_ids, *response_ids, tokenizer.eos_token_id]  # the student must learn where to stop, too
        rows.append({"prompt": prompt, "references": references, "ids": ids, "num_prompt": len(prompt_ids)})
    return rows


def response_logits(model, rows: list[dict]):
    """Logits at the N positions whose next token is a response token, and these next tokens.

    Rows are padded on the right. The position before a token predicts it: a response is predicted one place early.
    """
    lengths_B1 = torch.tensor([[len(row["ids"])] for row in rows])
    ids_BT = torch.zeros(len(rows), int(lengths_B1.max()), dtype=torch.long)  # the zeros that stay are masked
    for place, row in enumerate(rows):
        ids_BT[place, : len(row["ids"])] = torch.tensor(row["ids"])
    position_T, num_prompt_B1 = torch.arange(ids_BT.shape[1]), torch.tensor([[row["num_prompt"]] for row in rows])
    mask_BT = (position_T < lengths_B1).long()
    predicts_BT = (position_T >= num_prompt_B1 - 1) & (position_T < lengths_B1 - 1)
    hidden_BTH = model.model(ids_BT, attention_mask=mask_BT).last_hidden_state
    return model.lm_head(hidden_BTH[predicts_BT]), ids_BT[predicts_BT.roll(1, dims=1)]


def forward_kl(student_NV, teacher_NV, temperature: float):
    """KL(p || q) at each token, p the teacher and q the student, both softened: p = softmax(logits / T).

    Softened gradients shrink with 1/T^2, so the divergence is multiplied by T^2 (Hinton et al., arXiv 1503.02531).
    """
    logp_NV, logq_NV = (F.log_softmax(logits_NV / temperature, -1) for logits_NV in (teacher_NV, student_NV))
    return temperature**2 * (logp_NV.exp() * (logp_NV - logq_NV)).sum(-1)


def backward(student, teacher, rows: list[dict], stage: Stage) -> float:
    """Accumulate the gradient of one optimizer step, and return its loss.

    loss = 1/M sum_i [(1 - r) CE_i + r KL_i] over all M response tokens of the *global* batch, r being `kd_ratio`.
    Each micro-batch adds its sum, divided by the same M. The mean of the micro-batches' means would be another loss:
    it would weigh a token in a micro-batch of short answers more than one among long answers.
    """
    num_tokens, total = sum(len(row["ids"]) - row["num_prompt"] for row in rows), 0.0
    rows = sorted(rows, key=lambda row: -len(row["ids"]))  # rows of like length in one micro-batch: less padding
    for first in range(0, len(rows), MICRO_BATCH_ROWS):
        batch = rows[first : first + MICRO_BATCH_ROWS]
        logits_NV, targets_N = response_logits(student, batch)
        loss = (1 - stage.kd_ratio) * F.cross_entropy(logits_NV, targets_N, reduction="sum")
        if stage.kd_ratio > 0:
            teacher_NV, _ = response_logits(teacher, batch)  # its weights ask for no gradient
            loss = loss + stage.kd_ratio * forward_kl(logits_NV, teacher_NV, stage.temperature).sum()
        (loss / num_tokens).backward()
        total += loss.item()
    return total / num_tokens


def learning_rate(step: int, num_steps: int) -> float:
    """A linear rise over a twenty-fifth of the steps, then a cosine down to 0."""
    rise = -(-num_steps // 25)  # rounded up
    fall = (1 + np.cos(np.pi * (step - rise) / (num_steps - rise))) / 2
    return PEAK_LR * ((step + 1) / rise if step < rise else fall)


def train(student, teacher, rows: list[dict], stage: Stage) -> list[float]:
    """Train through one stage, with fresh moments and a fresh LR schedule, as published; return each step's loss."""
    optimizer, losses = torch.optim.AdamW(student.parameters(), betas=(0.9, 0.98), eps=1e-5), []
    for step in range(stage.num_steps):
        epoch, place = divmod(step, len(stage.rows) // BATCH_ROWS)
        # The order of an epoch is a function of (seed, stage, epoch) alone; rows that fill no batch are left out of it.
        order = np.random.Generator(np.random.PCG64(np.random.SeedSequence([SEED, stage.index, epoch])))
        batch = stage.rows[order.permutation(len(stage.rows))][place * BATCH_ROWS : (place + 1) * BATCH_ROWS]
        losses.append(backward(student, teacher, [rows[row] for row in batch], stage))
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step, stage.num_steps)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@torch.inference_mode()
def rouge(model, tokenizer, rows: list[dict]) -> np.ndarray:
    """ROUGE-L (F1, 0 to 1) of the model's greedy answer to each row, the best over its references."""
    scorer, scores = RougeScorer(["rougeL"], use_stemmer=True), []
    for first in range(0, len(rows), 256):
        part = rows[first : first + 256]
        prompts = tokenizer([row["prompt"] for row in part], padding=True, padding_side="left", return_tensors="pt")
        made = model.generate(**prompts, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        answers = tokenizer.batch_decode(made[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, answer in zip(part, answers, strict=True):
            scores.append(scorer.score_multi(row["references"], answer)["rougeL"].fmeasure)
    return np.array(scores)


@torch.inference_mode()
def cross_entropy(model, rows: list[dict]) -> np.ndarray:
    """The model's mean cross-entropy per token on each row's reference, in nats."""
    return np.array([F.cross_entropy(*response_logits(model, [row])).item() for row in rows])


def rank(rouge_l: np.ndarray, ce_loss: np.ndarray) -> np.ndarray:
    """Row numbers from easy to hard, by reciprocal rank fusion (POCL, section 3.2).

    Each signal ranks the rows, 1 the easiest: high ROUGE-L, low cross-entropy. A row's score is
    sum over signals of 1 / (60 + rank), and the highest score is the easiest row. Ranks and not values are added, so
    the signals need no common scale. Sorts are stable: ties keep the order of the sort before.
    """
    order, score = np.arange(len(rouge_l)), np.zeros(len(rouge_l))
    for signal in (-rouge_l, ce_loss):
        order = order[np.argsort(signal[order], kind="stable")]
        score[order] += 1 / (60 + 1 + np.arange(len(order)))
    return order[np.argsort(-score[order], kind="stable")]


def baby_steps(ranked: np.ndarray) -> list[Stage]:
    """The stages (POCL, section 3.3): stage k of K trains on the easiest k/K of the rows, so load is only added.

    With s = (k - 1) / (K - 1), the temperature rises from 1 to 2 (T = 1 + s: soft targets show more of what the
    teacher holds possible), and kd_ratio from 0.7 to 1 (r = 0.7 + 0.3 s: the references help most at the start).
    """
    stages, size = [], len(ranked) // NUM_STAGES
    for index in range(NUM_STAGES):
        share = index / (NUM_STAGES - 1)
        rows = ranked[: size * (index + 1)] if share < 1 else ranked  # the last stage takes the remainder as well
        num_steps = EPOCHS_PER_STAGE * (len(rows) // BATCH_ROWS)
        stages.append(Stage(index, rows, num_steps, round(1 + share, 2), round(0.7 + 0.3 * share, 2)))
    return stages


def new_student(tokenizer):
    """A student of 0.14 million parameters with random weights."""
    torch.manual_seed(SEED)
    sizes = {"hidden_size": 64, "intermediate_size": 168, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    return LlamaForCausalLM(LlamaConfig(**sizes, **tokens, tie_word_embeddings=True))


def main() -> None:
    """Warm up, rank, distil, and compare on rows that were never trained on."""
    started, tokenizer = time.monotonic(), AutoTokenizer.from_pretrained(TEACHER)
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).requires_grad_(False)
    rows, test, student = read("train", tokenizer), read("test", tokenizer), new_student(tokenizer)
    train(student, None, rows, Stage(0, np.arange(len(rows)), WARM_UP_STEPS, temperature=1.0, kd_ratio=0.0))
    scores = {"before": rouge(student, tokenizer, test), "teacher": rouge(teacher, tokenizer, test)}
    ranked = rank(rouge(student, tokenizer, rows), cross_entropy(student, rows))
    for stage in baby_steps(ranked):
        loss = np.mean(train(student, teacher, rows, stage)[-20:])
        print(f"stage {stage.index}: {len(stage.rows)} rows, {stage.num_steps} steps, loss {loss:.3f}", flush=True)
    scores["student"] = rouge(student, tokenizer, test)
    print("\n".join(f"{name:8s} ROUGE-L {100 * values.mean():.1f}" for name, values in scores.items()))
    print(f"{len(test)} test rows, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
