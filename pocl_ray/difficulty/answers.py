"""ROUGE-L of a student's answers to prompts: one signal, measured before training and again between stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl_ray.answers.generate import GenerationSettings, generate
from pocl_ray.answers.rouge import rouge_l_batch
from pocl_ray.config import GenerationConfig
from pocl_ray.data.row_store import RowStore


def score_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: RowStore,
    ids: Sequence[int] | np.ndarray[Any, np.dtype[np.int64]],
    generation: GenerationConfig,
    max_tokens: int,
    seed: int,
) -> list[tuple[float, bool]]:
    """Answer the prompts of a task and hold the answers against the references.

    Args:
        model: The student, on the device that is to be used.
        tokenizer: The run's.
        rows: All rows.
        ids: Those of the task; which rows are in one is part of what is sampled.
        generation: How answers are generated.
        max_tokens: `data.max_tokens`: prompt and answer together.
        seed: Of the sampling.

    Returns:
        Of each row the best ROUGE-L over its references, 0 to 100, and whether the answer came to an end.
    """
    prompts, _ = rows.tokens(ids)
    settings = GenerationSettings.of(generation, max_tokens, prompts)
    answers = generate(model, tokenizer, prompts, settings, seed)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    stopped = [len(answer) < limit for answer, limit in zip(answers, settings.limits(len(ids)), strict=True)]
    return list(zip(rouge_l_batch(texts, rows.references(ids)), stopped, strict=True))
