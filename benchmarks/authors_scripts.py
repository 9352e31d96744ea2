"""The published way from rows to a distilled student, re-stated: a scoring script, and one script for each stage.

    python benchmarks/authors_scripts.py FOLDER score
    python benchmarks/authors_scripts.py FOLDER stage 0

FOLDER holds `settings.json`, which `whole_run.py` writes. Each script is a process that loads models and rows again.
The scoring answers and reads batches in the order of the file. A stage pads each row to `max_tokens`, makes logits at
every position, runs the teacher live in each step, and has an optimizer and a cosine of its own. Nothing of the package
is imported. What the published scripts do wrong is not repeated: losses are means over the response tokens of a batch,
and ranks belong to the rows that were scored.

Legend: B rows, T tokens, N response tokens in one flat axis, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from plain_scoring import IGNORED, fused_order, generated, losses_of, padded
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

SETTINGS, ORDER, LOSSES = "settings.json", "order.json", "losses.jsonl"


class TextRow(NamedTuple):
    """The tokens of a row, and its accepted answers."""

    prompt: list[int]
    response: list[int]
    references: list[str]


def read_rows(settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[TextRow]:
    """Return the rows of the file, tokenized."""
    rows = []
    for line in Path(settings["rows"]).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        references = [row["output"]] if isinstance(row["output"], str) else row["output"]
        prompt = tokenizer(settings["template"].format(**row))["input_ids"]
        response = tokenizer(references[0])["input_ids"]
        rows.append(TextRow(prompt, [*response, tokenizer.eos_token_id], references))
    return rows


def load(directory: str) -> PreTrainedModel:
    """Return a model in float32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, dtype=torch.float32)
    return model


def score(folder: Path, settings: dict[str, Any]) -> None:
    """Rank the rows by the untuned student's answers and losses, and write their order."""
    from rouge_score.rouge_scorer import RougeScorer

    tokenizer, student = AutoTokenizer.from_pretrained(settings["student"]), load(settings["student"]).eval()
    rows, scorer = read_rows(settings, tokenizer), RougeScorer(["rougeL"], use_stemmer=True)
    rouge_l: list[float] = []
    ce_loss: list[float] = []
    for first in range(0, len(rows), settings["scoring_batch"]):
        batch = rows[first : first + settings["scoring_batch"]]
        prompts = [row.prompt for row in batch]
        answers = generated(student, tokenizer, prompts, settings["new_tokens"])
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        for row, text in zip(batch, texts, strict=True):
            rouge_l.append(scorer.score_multi(row.references, text)["rougeL"].fmeasure)
        ce_loss += losses_of(student, prompts, [row.response for row in batch])
    order = fused_order(np.array(rouge_l), np.array(ce_loss))
    (folder / ORDER).write_text(json.dumps(order.tolist()))


def loss_of(student: PreTrainedModel, teacher: PreTrainedModel, rows: list[TextRow], setting: dict[str, Any]) -> Tensor:
    """Return the loss of a batch: (1 - r) cross-entropy + r T^2 KL(teacher || student), means over response tokens."""
    ids_BT, mask_BT, labels_BT = padded([row.prompt for row in rows], [row.response for row in rows], setting["length"])
    with torch.no_grad():
        teacher_BTV = teacher(ids_BT, attention_mask=mask_BT).logits
    student_BTV = student(ids_BT, attention_mask=mask_BT).logits
    ce = F.cross_entropy(student_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED)
    logp_BTV = F.log_softmax(teacher_BTV / setting["temperature"], -1)
    logq_BTV = F.log_softmax(student_BTV / setting["temperature"], -1)
    kl_BT = (logp_BTV.exp() * (logp_BTV - logq_BTV)).sum(-1)
    is_response_BT = labels_BT != IGNORED
    kl = (kl_BT * is_response_BT).sum() / is_response_BT.sum() * setting["temperature"] ** 2
    return (1 - setting["kd_ratio"]) * ce + setting["kd_ratio"] * kl


def train_stage(folder: Path, settings: dict[str, Any], stage: int) -> None:
    """Train through one stage, from the student of the stage before, and write the student and the losses."""
    own = settings["student"] if stage == 0 else str(folder / f"stage{stage - 1}")
    tokenizer = AutoTokenizer.from_pretrained(settings["student"])
    student, teacher = load(own).train(), load(settings["teacher"]).eval().requires_grad_(False)
    rows = read_rows(settings, tokenizer)
    batch, last, share = settings["batch"], settings["stages"] - 1, stage / (settings["stages"] - 1)
    order = np.array(json.loads((folder / ORDER).read_text()))
    picked = order if stage == last else order[: len(rows) // settings["stages"] * (stage + 1)]
    setting = {
        "length": settings["max_tokens"],
        "temperature": round(1 + share, 2),
        "kd_ratio": round(0.7 + 0.3 * share, 2),
    }
    num_batches = len(picked) // batch
    num_steps = settings["epochs"] * num_batches
    optimizer = torch.optim.AdamW(student.parameters(), lr=settings["learning_rate"], weight_decay=0.01)
    with (folder / LOSSES).open("a") as file:
        for step in range(num_steps):
            epoch, place = divmod(step, num_batches)
            drawn = np.random.Generator(np.random.PCG64(np.random.SeedSequence([settings["seed"], stage, epoch])))
            shuffled = picked[drawn.permutation(len(picked))]
            ids = shuffled[place * batch : (place + 1) * batch]
            loss = loss_of(student, teacher, [rows[row] for row in ids], setting)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = settings["learning_rate"] * (1 + math.cos(math.pi * step / num_steps)) / 2
            optimizer.step()
            optimizer.zero_grad()
            file.write(json.dumps(loss.item()) + "\n")
    student.save_pretrained(folder / f"stage{stage}")


def main() -> None:
    """Run one script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("script", choices=["score", "stage"])
    parser.add_argument("stage", type=int, nargs="?")
    options = parser.parse_args()
    settings = json.loads((options.folder / SETTINGS).read_text())
    if options.script == "score":
        score(options.folder, settings)
    else:
        train_stage(options.folder, settings, options.stage)


if __name__ == "__main__":
    main()
