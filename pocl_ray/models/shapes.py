"""The sizes of a model that its FLOPs depend on, from the numbers in its config: no torch, no weights, no network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pocl_ray.config.sources import ModelConfig, StudentConfig, TeacherConfig
from pocl_ray.errors import ModelError
from pocl_ray.models.shipped import shipped_directory
from pocl_ray.run_directory.paths import local_path

# Families of one shape: grouped heads, three matrices in the feed-forward part, no table of positions.
_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3", "granite", "phi3")
# What a family takes for a key that its config leaves out, where that follows from the others.
_HEADS_ARE_ALIKE = ("llama", "granite", "phi3")
_HEADS_SHARE_THE_WIDTH = ("llama", "mistral", "qwen2", "smollm3", "granite", "phi3")


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a model that its FLOPs depend on.

    Attributes:
        body_weights: Weights of the matrices between embedding and head.
        head_weights: Vocabulary times width.
        attention_width: Layers times width.
    """

    body_weights: int
    head_weights: int
    attention_width: int

    def forward(self, num_tokens: float, num_response_tokens: float, row_tokens: float) -> float:
        """Return the FLOPs of a forward pass.

        Args:
            num_tokens: Prompt and response tokens.
            num_response_tokens: Tokens that logits are made for.
            row_tokens: Mean length of a row, over which attention runs.
        """
        body = 2.0 * self.body_weights * num_tokens + 4.0 * self.attention_width * num_tokens * row_tokens
        return body + self.head(num_response_tokens)

    def head(self, num_response_tokens: float) -> float:
        """Return the FLOPs of the head alone."""
        return 2.0 * self.head_weights * num_response_tokens


def sizes_of(teacher: TeacherConfig, student: StudentConfig, vocab_size: int | None) -> dict[str, ModelSize | None]:
    """Return the sizes of `teacher` and `student`; None for one that is not known without loading it.

    Args:
        teacher: Section of the teacher.
        student: Section of the student.
        vocab_size: Vocabulary of models that are made new, if it is known.

    Raises:
        ModelError: A config.json on this machine is no config of a model.
    """
    large = _content("teacher", teacher, vocab_size)
    # A new student is made for the tokenizer, mostly the teacher's; an embedding has a few rows more than that at most.
    small = _content("student", student, vocab_size or (large or {}).get("vocab_size"))
    if student.num_layers is not None and large is not None:
        small = {**large, "num_hidden_layers": student.num_layers, "n_layer": student.num_layers}
    return {
        role: None if one is None else size_of_config(one) for role, one in (("teacher", large), ("student", small))
    }


def size_on_this_machine(role: str, model: ModelConfig) -> ModelSize | None:
    """Return the sizes of a model that lies on this machine; None if it does not, or if they are not known.

    Raises:
        ModelError: The config.json is no config of a model.
    """
    content = config_on_this_machine(role, model)
    return None if content is None else size_of_config(content)


def _content(role: str, model: ModelConfig, vocab_size: int | None) -> Mapping[str, Any] | None:
    if model.architecture is not None:
        return model.architecture if vocab_size is None else {**model.architecture, "vocab_size": vocab_size}
    return config_on_this_machine(role, model)


def config_on_this_machine(role: str, model: ModelConfig) -> Mapping[str, Any] | None:
    """Return the content of a model's config.json; None if it does not lie on this machine.

    Raises:
        ModelError: The file holds no mapping.
    """
    if model.path is None:
        return None
    file = (shipped_directory(model.path) or local_path(model.path)) / "config.json"
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds {type(content).__name__}")
    except (OSError, ValueError) as error:
        raise ModelError(f"{role}.path: {file}: is no config of a model ({error})") from None
    return content


def size_of_config(content: Mapping[str, Any]) -> ModelSize | None:
    """Return the sizes of a model with this config; None for a family whose sizes are not known from it."""
    family = content.get("model_type")
    try:
        if family == "gpt2":
            return _gpt2(content)
        if family == "opt":
            return _opt(content)
        if family in _LLAMA_LIKE:
            return _llama_like(str(family), content)
    except (KeyError, TypeError, ValueError):
        return None  # it leaves out a number that the family has a default for
    return None


def _gpt2(content: Mapping[str, Any]) -> ModelSize:
    width, layers = int(content["n_embd"]), int(content["n_layer"])
    inner = int(content.get("n_inner") or 4 * width)
    body = layers * (4 * width**2 + 2 * width * inner) + int(content["n_positions"]) * width
    return ModelSize(body, int(content["vocab_size"]) * width, layers * width)


def _opt(content: Mapping[str, Any]) -> ModelSize:
    width, layers = int(content["hidden_size"]), int(content["num_hidden_layers"])
    outer = int(content.get("word_embed_proj_dim") or width)
    body = layers * (4 * width**2 + 2 * width * int(content["ffn_dim"]))
    body += (int(content["max_position_embeddings"]) + 2) * width
    body += 2 * outer * width if outer != width else 0
    return ModelSize(body, int(content["vocab_size"]) * outer, layers * width)


def _llama_like(family: str, content: Mapping[str, Any]) -> ModelSize:
    width, layers, heads = (int(content[key]) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    groups, head = content.get("num_key_value_heads"), content.get("head_dim")
    if groups is None and family in _HEADS_ARE_ALIKE:
        groups = heads
    if head is None and family in _HEADS_SHARE_THE_WIDTH:
        head = width // heads
    attention = 2 * width * int(head) * (heads + int(groups))  # type: ignore[arg-type]
    body = layers * (attention + 3 * width * int(content["intermediate_size"]))
    return ModelSize(body, int(content["vocab_size"]) * width, layers * width)
