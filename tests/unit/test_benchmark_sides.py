"""The other sides of the benchmarks do the same work as the package: tokens, losses, answers and ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_llama import tiny_llama

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from plain_scoring import IGNORED, fused_order, generated, losses_of, padded
from step_sides import random_rows
from text_rows import stop_tokens, word_of, word_tokenizer, write_rows

from pocl_ray.config import GenerationConfig
from pocl_ray.difficulty.ranking import rank_rows

VOCABULARY = 320


def drawn(num_rows: int) -> list[tuple[list[int], list[int]]]:
    """Prompts and responses of random rows."""
    rows = random_rows(num_rows, VOCABULARY, 0)
    return [(row.ids_T[: row.num_prompt_tokens].tolist(), row.ids_T[row.num_prompt_tokens :].tolist()) for row in rows]


def test_words_are_tokens_and_share_syllables(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 3, VOCABULARY)
    tokenizer = word_tokenizer(VOCABULARY)

    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]

    read = [(tokenizer(row["instruction"])["input_ids"], tokenizer(row["output"])["input_ids"]) for row in lines]
    assert read == drawn(3)
    assert tokenizer.decode([70, 0, 134], skip_special_tokens=True) == f"{word_of(70)} {word_of(134)}"
    assert word_of(70).split("-")[0] == word_of(134).split("-")[0]


def test_rows_are_fused_as_the_package_ranks_them() -> None:
    rng = np.random.default_rng(0)
    rouge_l, ce_loss = rng.integers(0, 5, 101) / 4.0, rng.integers(0, 20, 101) / 8.0  # with ties

    _, rank = rank_rows({"rouge_l": rouge_l, "ce_loss": ce_loss})

    assert fused_order(rouge_l, ce_loss).tolist() == np.argsort(rank).tolist()


def test_losses_of_a_padded_batch_are_those_of_each_row_alone() -> None:
    student, rows = tiny_llama(VOCABULARY, 0), drawn(3)

    found = losses_of(student, *zip(*rows, strict=True))

    for (prompt, response), loss in zip(rows, found, strict=True):
        with torch.no_grad():
            logits_TV = student(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits_TV, torch.tensor(response)).item())


def test_labels_stand_where_their_token_is_predicted() -> None:
    ids_BT, mask_BT, labels_BT = padded([[5, 6], [7]], [[8, 9], [3]], 5)

    assert ids_BT.tolist() == [[5, 6, 8, 9, 0], [7, 3, 0, 0, 0]]
    assert mask_BT.tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    assert labels_BT.tolist() == [[IGNORED, 8, 9, IGNORED, IGNORED], [3, *[IGNORED] * 4]]


def test_answers_are_those_of_the_decoding_loop() -> None:
    from pocl_ray.answers.decode import GenerationSettings, generate

    student, tokenizer = tiny_llama(VOCABULARY, 3), word_tokenizer(VOCABULARY)
    student.generation_config.eos_token_id = [0, *stop_tokens(VOCABULARY)]
    prompts = [prompt for prompt, _ in drawn(4)]
    settings = GenerationConfig(sampling_temperature=0.0, no_repeat_ngram_size=6, max_new_tokens=24)
    arrays = [np.array(prompt) for prompt in prompts]

    (ours,) = generate(student, tokenizer, arrays, GenerationSettings.of(settings, 512, arrays), [None])

    assert generated(student, tokenizer, prompts, 24) == ours
