"""Difficulty as one would score it with transformers alone: a batch answered, a batch read, both signals fused.

Nothing of the package is imported here, so that a process which does this pays for no more than it uses.

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

NO_REPEAT = 6  # length of the n-grams that no answer holds twice, as published
IGNORED = -100

Tokens = Sequence[int]


@torch.no_grad()
def generated(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Tokens], new_tokens: int
) -> list[list[int]]:
    """Return the greedy answers of a batch padded on the left, each cut before the token that ends it."""
    generation: Any = student.generation_config
    stops = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    config = GenerationConfig(
        do_sample=False,
        no_repeat_ngram_size=NO_REPEAT,
        max_new_tokens=new_tokens,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
    )
    width = max(map(len, prompts))
    ids_BT = torch.tensor([[tokenizer.pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask_BT = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    model: Any = student
    made_BT = model.generate(ids_BT, attention_mask=mask_BT, generation_config=config)
    answers, ends = [], set(stops)
    for tokens in made_BT[:, width:].tolist():
        end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
        answers.append(tokens[:end])
    return answers


def padded(prompts: Sequence[Tokens], responses: Sequence[Tokens], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids_BT, mask_BT and labels_BT of rows padded on the right to `length`; labels outside responses are -100.

    A label stands at the position that predicts it, one before its token.
    """
    ids_BT = torch.zeros(len(prompts), length, dtype=torch.long)
    mask_BT, labels_BT = torch.zeros_like(ids_BT), torch.full_like(ids_BT, IGNORED)
    for place, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        ids_BT[place, :end] = torch.tensor([*prompt, *response])
        mask_BT[place, :end] = 1
        labels_BT[place, len(prompt) - 1 : end - 1] = ids_BT[place, len(prompt) : end]
    return ids_BT, mask_BT, labels_BT


@torch.no_grad()
def losses_of(student: PreTrainedModel, prompts: Sequence[Tokens], responses: Sequence[Tokens]) -> list[float]:
    """Return the mean cross-entropy of each reference of a batch, from logits at every position."""
    longest = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True))
    ids_BT, mask_BT, labels_BT = padded(prompts, responses, longest)
    logits_BTV = student(ids_BT, attention_mask=mask_BT).logits
    flat = F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED, reduction="none")
    losses: list[float] = (flat.view_as(labels_BT).sum(1) / (labels_BT != IGNORED).sum(1)).tolist()
    return losses


def fused_order(rouge_l: np.ndarray, ce_loss: np.ndarray) -> np.ndarray:
    """Return row numbers, the easiest first, by the sum of 1 / (60 + rank) over both signals; all sorts are stable."""
    order, score = np.arange(len(rouge_l)), np.zeros(len(rouge_l))
    for key in (-rouge_l, ce_loss):
        order = order[np.argsort(key[order], kind="stable")]
        score[order] += 1 / (60 + np.arange(1, len(order) + 1))
    return order[np.argsort(-score[order], kind="stable")]
