"""Tiny models of many families, made from their configs: two layers, width 32, random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCAB, EOS = 64, 2
TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS}
# The keys of a size that families have, by their several names; a family gets those that its config knows.
SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "n_embed", "word_embed_proj_dim", "attention_hidden_size"), 32
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 128),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("state_size", "mamba_d_state", "sliding_window"), 8),
    **dict.fromkeys(("n_groups", "mamba_n_groups"), 1),
    **dict.fromkeys(("time_step_rank", "mamba_n_heads", "rotary_dim"), 4),
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "mamba_d_head": 16,
    "n_ctx": 64,
}
LINEAR_AND_FULL = {
    "layer_types": ["linear_attention", "full_attention"],
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
SLIDING_AND_FULL = {"layer_types": ["sliding_attention", "full_attention"]}
# What these families need beyond; None leaves a size at the family's default.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v3": {"num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "falcon": {"head_dim": None, "num_kv_heads": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3_text": SLIDING_AND_FULL,
    "gemma3n_text": {
        **SLIDING_AND_FULL,
        "num_kv_shared_layers": 0,
        "intermediate_size": [64, 64],
        "activation_sparsity_pattern": [0.0, 0.0],
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
    },
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    "hunyuan_v1_dense": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "minicpm3": {"num_key_value_heads": 4},
    "ministral": {"head_dim": 8, **SLIDING_AND_FULL},
    "nemotron": {"num_key_value_heads": 2},
    "qwen3_5_text": LINEAR_AND_FULL,
    "qwen3_next": LINEAR_AND_FULL,
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8},
    "xlstm": {"v_head_dim": None},
}
KEYS_AND_VALUES = (
    *("apertus", "arcee", "bitnet", "bloom", "codegen", "cohere", "cohere2", "deepseek_v3", "diffllama", "ernie4_5"),
    *("exaone4", "falcon", "flex_olmo", "gemma", "gemma2", "gemma3_text", "gemma3n_text", "glm", "glm4", "glm4_moe"),
    *("glm4_moe_lite", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe"),
    *("helium", "hunyuan_v1_dense", "llama", "minicpm3", "ministral", "mistral", "mixtral"),
    *("mpt", "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi", "phi3", "phimoe"),
    *("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2", "xglm"),
)
HYBRID = (
    *("bamba", "falcon_h1", "granitemoehybrid", "jamba", "lfm2", "lfm2_moe", "mamba2", "olmo_hybrid"),
    *("qwen3_5_text", "qwen3_next"),
)
UNPADDED = ("falcon_mamba", "mamba")
UNCACHED = ("minimax", "openai-gpt", "recurrent_gemma", "rwkv", "xlstm")
REFUSED = ("bert", "llama4_text", "modernbert-decoder", "roberta")
FAMILIES = sorted((*KEYS_AND_VALUES, *HYBRID, *UNPADDED, *UNCACHED, *REFUSED))


def tiny_model(family: str, **changes: Any) -> PreTrainedModel:
    """Return a model in eval mode whose weights are large enough for answers to depend on what was read."""
    special = SPECIAL.get(family, {})
    config_class = CONFIG_MAPPING[family]
    default = config_class()
    sizes = {
        name: size
        for name, size in SIZES.items()
        if name not in special
        and getattr(default, name, None) is not None
        and not isinstance(getattr(default, name), list)
    }
    own = {name: value for name, value in special.items() if value is not None}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**{**TOKENS, **sizes, **own, **changes})).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)
    return model
