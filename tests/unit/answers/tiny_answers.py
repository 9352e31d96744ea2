"""Small random models of several families, and prompts for them."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from transformers import Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, OPTConfig, PreTrainedModel, Qwen2Config

VOCAB, EOS = 40, 2
WIDE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ENDS = {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": EOS}
LLAMA = {**WIDE, **ENDS, "intermediate_size": 64, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**LLAMA),
    "qwen2": Qwen2Config(**LLAMA),
    "mistral_sliding": MistralConfig(**LLAMA, sliding_window=8),
    "gemma2_softcapped": Gemma2Config(**LLAMA, head_dim=8, sliding_window=8, final_logit_softcapping=5.0),
    "opt": OPTConfig(**WIDE, **ENDS, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=256),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=256, **ENDS),
}


def tiny_model(family: str = "llama") -> PreTrainedModel:
    """Random weights, enlarged so that answers differ and some of them stop."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return model


def some_prompts(count: int = 24, longest: int = 29) -> list[np.ndarray]:
    """Prompts of 2 to `longest` tokens."""
    rng = np.random.default_rng(0)
    return [rng.integers(3, VOCAB, int(length)) for length in rng.integers(2, longest + 1, count)]
