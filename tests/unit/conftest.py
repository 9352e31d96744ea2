"""Tiny models of each family, with random weights, and a tiny tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pocl_ray.models.building import build_model

NUM_TOKENS = 60
EOS = 0

_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_OPT = {
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
    "opt": {"model_type": "opt", "word_embed_proj_dim": 32, **_OPT},
    "opt_350m": {"model_type": "opt", "word_embed_proj_dim": 16, "do_layer_norm_before": False, **_OPT},
    "llama_tied": {"model_type": "llama", "tie_word_embeddings": True, **_LLAMA},
    "llama_untied": {"model_type": "llama", "tie_word_embeddings": False, **_LLAMA},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, **_LLAMA},
}
PADDED_VOCAB = {"qwen2": NUM_TOKENS + 4}


def make_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    architecture = {**FAMILIES[family], **overrides}
    model = build_model(architecture, PADDED_VOCAB.get(family, NUM_TOKENS), EOS, None, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # spread the fresh weights, so that biases and norms are not all zeros and ones
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def make_tokenizer(num_tokens: int = NUM_TOKENS, eos: str | None = "<eos>", word: str = "w") -> PreTrainedTokenizerFast:
    vocabulary = {"<eos>": EOS, **{f"{word}{i}": i for i in range(1, num_tokens)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def new_model() -> Callable[..., PreTrainedModel]:
    return make_model


@pytest.fixture
def new_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return make_tokenizer


@pytest.fixture
def padded_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two rows padded on the right with eos (= pad), the first with a real eos at its end; response positions."""
    input_ids_BT = torch.tensor([[5, 6, 7, 8, 9, EOS, EOS, EOS], [11, 12, 13, 14, 15, 16, 17, 18]])
    attention_mask_BT = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0], [1] * 8])
    index_N = torch.tensor([2, 3, 4, 5, 8 + 4, 8 + 5, 8 + 7])
    return input_ids_BT, attention_mask_BT, index_N
