"""The cached hidden states and the head read from disk give each family's own logits, row by row, in each dtype.

A tiny model of the family is saved and loaded. Rows of several lengths are read in one padded batch, as scoring does,
and their hidden states are written to a cache and read back. The head that is loaded without the rest of the model must
turn them into the logits of whole model calls, one for each row. It takes a minute, so it runs on request alone:
`POCL_FAMILIES=all pytest tests/unit/answers/test_family_caches.py`.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_families import FAMILIES, REFUSED, VOCAB, tiny_model

from pocl_ray.errors import ModelError
from pocl_ray.models.head_loading import load_head
from pocl_ray.models.heads import check_split, response_hidden
from pocl_ray.models.loading import load_model
from pocl_ray.models.places import ModelRef
from pocl_ray.teacher_cache.reader import HiddenCache
from pocl_ray.teacher_cache.writer import write_index, write_shard

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("POCL_FAMILIES") != "all", reason="set POCL_FAMILIES=all to try each family"),
]
LENGTHS = (12, 5, 9)
NUM_PROMPT = 3
NEEDS_FLOAT32 = ("falcon_mamba", "mamba", "mamba2")  # transformers' code for CPUs mixes dtypes
NOISE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}  # of the largest logit


@pytest.mark.parametrize("dtype", list(NOISE), ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", sorted({*FAMILIES} - {*REFUSED}))
def test_cache_and_head_give_the_logits_of_the_whole_model(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path / "model")
    ref = ModelRef(str(tmp_path / "model"), dtype=str(dtype).removeprefix("torch."))
    model = load_model(ref)
    if dtype != torch.float32 and family in NEEDS_FLOAT32:
        with pytest.raises(ModelError, match=r"fails on its first tokens in bfloat16 .* load it in float32"):
            check_split(model)
        return
    check_split(model)
    head = load_head(ref)
    rows = [np.random.default_rng(row).integers(3, VOCAB, length) for row, length in enumerate(LENGTHS)]
    write_index(tmp_path / "cache", [write_rows(model, rows, tmp_path / "cache", family)], "teacher", "rows")
    cache = HiddenCache.open(tmp_path / "cache", expect_teacher="teacher", expect_rows="rows")
    for row, ids in enumerate(rows):
        with torch.no_grad():
            whole_TV = model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0].float()
        expected_NV = whole_TV[NUM_PROMPT - 1 : -1]
        found_NV = head.logits(cache.take(np.array([row]))).float()
        assert found_NV.shape == expected_NV.shape
        off = float((found_NV - expected_NV).abs().max()) / max(1.0, float(expected_NV.abs().max()))
        assert off <= NOISE[dtype], f"row {row} is off by {off:.2g} of the largest logit"


def write_rows(model: torch.nn.Module, rows: list[np.ndarray], directory: Path, family: str) -> str:
    """Write the hidden states at the response tokens of rows as one shard, and return its name."""
    size = max(LENGTHS)
    ids_BT, mask_BT = (torch.zeros(len(rows), size, dtype=torch.long) for _ in range(2))
    for row, ids in enumerate(rows):
        ids_BT[row, : len(ids)] = torch.from_numpy(ids)
        mask_BT[row, : len(ids)] = 1
    place_N = torch.cat([torch.arange(NUM_PROMPT - 1, len(ids) - 1) + row * size for row, ids in enumerate(rows)])
    with torch.no_grad():
        hidden_NK = response_hidden(model, ids_BT, mask_BT, place_N)
    parts = hidden_NK.split([len(ids) - NUM_PROMPT for ids in rows])
    return write_shard(directory, np.arange(len(rows)), parts).name
