"""A model for tests of the benchmarks."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(vocabulary: int, seed: int) -> LlamaForCausalLM:
    """A model of one layer with random weights, for rows of random words."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=0,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval()
