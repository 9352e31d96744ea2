"""Every family answers exactly, alone or in a batch, with or without a cache, or is refused in one line.

The same for the head: what is read from disk makes the model's own logits, or the model is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_families import EOS, FAMILIES, HYBRID, KEYS_AND_VALUES, REFUSED, UNCACHED, UNPADDED, VOCAB, tiny_model
from transformers import Gemma3Config, Gemma3TextConfig, PreTrainedModel

from pocl_ray.answers.batch import Means
from pocl_ray.answers.decode import GenerationSettings, decode
from pocl_ray.answers.families import means_of
from pocl_ray.errors import ModelError
from pocl_ray.models.head_loading import load_head
from pocl_ray.models.heads import HeadSample, LogitTransform, check_split
from pocl_ray.models.places import ModelRef
from pocl_ray.models.saving import save_model, try_saving

PROMPTS = [np.array([5, 9, 3]), np.array([7, 4, 11, 30, 22, 8, 6, 17, 40, 12]), np.array([33, 6, 5])]
LIMITS = [9, 4, 2]


@torch.no_grad()
def alone(model: PreTrainedModel, prompt: np.ndarray, limit: int, stop_ids: list[int]) -> list[int]:
    """Greedy, without padding or cache: the definition."""
    tokens = prompt.tolist()
    while len(tokens) < len(prompt) + limit:
        tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        if tokens[-1] in stop_ids:
            break
    return tokens[len(prompt) :]


def test_there_are_enough_families() -> None:
    assert len(set(FAMILIES)) == len(FAMILIES) >= 40


def test_the_documentation_lists_the_families() -> None:
    page = (Path(__file__).parents[3] / "docs" / "methods.md").read_text(encoding="utf-8")
    section = page.partition("### Families that were tried")[2].partition("\n## ")[0]
    assert f"These {len({*FAMILIES} - {*REFUSED})} families" in section
    assert {*FAMILIES} <= {*re.findall(r"`([^`]+)`", section)}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_after_training_can_be_tried_before(
    family: str, new_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try_saving(model, new_tokenizer(), family)  # fused experts are split as they are saved
    save_model(model, new_tokenizer(), tmp_path / "model")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_answers_exactly_or_is_refused_in_one_line(family: str) -> None:
    model = tiny_model(family)
    if family in REFUSED:
        with pytest.raises(ModelError) as refused:
            means_of(model)
        assert type(model).__name__ in str(refused.value) and "\n" not in str(refused.value)
        return
    means = means_of(model)
    assert means.pads or family in (*UNPADDED, *UNCACHED)
    assert means.caches == (family not in UNCACHED)
    assert means == Means() or family not in (*KEYS_AND_VALUES, *HYBRID)
    # Any of several tokens ends an answer, also one that no tokenizer calls its end.
    stop_ids = [EOS, alone(model, PROMPTS[0], 3, [])[-1]]
    settings = GenerationSettings(sampling_temperature=0)
    (found,) = decode(model, PROMPTS, LIMITS, [None], stop_ids, settings)
    rows = zip(PROMPTS, LIMITS, strict=True)
    assert [row.tolist() for row in found] == [alone(model, *row, stop_ids) for row in rows]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_read_from_disk_is_the_models_own_or_the_model_is_refused(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    try:
        check_split(model)
    except ModelError as error:
        assert family in REFUSED and "\n" not in str(error)
        return
    model.save_pretrained(tmp_path)
    head = load_head(ModelRef(str(tmp_path)))
    HeadSample.of(model, torch.arange(3, 9)[None], torch.arange(2, 6)).check(head, family)


def test_a_multimodal_checkpoint_used_as_a_text_model_keeps_its_nested_logit_cap(tmp_path: Path) -> None:
    text = Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=5.0,
    )
    assert LogitTransform.of(Gemma3Config(text_config=text.to_dict())).softcap == 5.0
