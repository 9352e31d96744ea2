"""Pairs of tokens of two tokenizers, against loops over rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from data_tokenizers import tiny_tokenizer

from pocl_ray.config import DataConfig, SourceConfig
from pocl_ray.data.row_store import Pairs, RowStore, describe_pairing, pairing_figures
from pocl_ray.data.rows import TeacherTokens, prepare_rows


def test_the_kth_token_of_a_response_belongs_to_the_kth_and_the_longer_ones_rest_to_none() -> None:
    ours, theirs = np.array([3, 1, 4, 2], np.int32), np.array([2, 5, 4, 1], np.int32)
    pairs = Pairs.of(ours, theirs)
    assert pairs.student_N.tolist() == [True, True, False] + [True] + [True] * 4 + [True, False]
    assert pairs.teacher_M.tolist() == [True, True] + [True, False, False, False, False] + [True] * 4 + [True]


def test_pairs_of_any_lengths_equal_a_loop() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(1, 30, 50).astype(np.int32), rng.integers(1, 30, 50).astype(np.int32)
    pairs = Pairs.of(ours, theirs)
    expected = [(row, place) for row in range(50) for place in range(min(ours[row], theirs[row]))]
    for marks, lengths in ((pairs.student_N, ours), (pairs.teacher_M, theirs)):
        places = [(row, place) for row in range(50) for place in range(lengths[row])]
        assert [place for place, mark in zip(places, marks, strict=True) if mark] == expected


def test_what_is_unpaired_and_what_is_cut_is_counted_and_told(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        '{"instruction": "Say hello to the cat.", "output": "hello"}\n'
        '{"instruction": "Say", "output": "hello hello hello hello hello hello hello hello"}\n'
    )
    source = SourceConfig(path=str(tmp_path / "rows.jsonl"))
    config = DataConfig(train=source, holdout_rows=1, prompt_template="plain", max_prompt_tokens=8, max_tokens=20)
    words, letters = tiny_tokenizer(), tiny_tokenizer(vocab_size=258)
    ours, theirs = tmp_path / "ours.arrow", tmp_path / "theirs.arrow"
    prepare_rows("train", source, config, words, ours, teacher=TeacherTokens(letters, theirs))
    figures = pairing_figures(RowStore.open(ours), RowStore.open(theirs), 8, 20)
    assert figures["num_full_prompts"] == 1 and figures["num_full_rows"] == 1 and figures["num_unpaired_tokens"] == 0
    line = describe_pairing(figures)
    assert line.startswith(
        "0.0% of the student's response tokens have no counterpart in the teacher's; 1 of its prompts"
    )
    assert "1 of its rows fill data.max_tokens" in line
    swapped = pairing_figures(RowStore.open(theirs), RowStore.open(ours), 8, 20)
    lost = sum(RowStore.open(theirs).response_lengths) - sum(RowStore.open(ours).response_lengths)
    assert swapped["num_unpaired_tokens"] == lost > 0 == swapped["num_full_rows"]
