"""The shape of a model, from its config alone: no weights are read or downloaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl_ray.config import StudentConfig, TeacherConfig
from pocl_ray.config.sources import ModelConfig
from pocl_ray.errors import HubUnreachableError
from pocl_ray.experiments.flops import size_of
from pocl_ray.models.loading import load_tokenizer, num_parameters
from pocl_ray.models.places import place_on_this_node
from pocl_ray.models.prepare import cut_layers, skeleton
from pocl_ray.models.shapes import ModelSize


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that memory, time and lengths depend on.

    Attributes:
        num_weights: All parameters.
        width: Width of its hidden states.
        num_layers: Number of its layers.
        num_positions: Longest row that it was made for; None if its config names none.
        size: Sizes that its FLOPs depend on.
    """

    num_weights: int
    width: int
    num_layers: int
    num_positions: int | None
    size: ModelSize


def shape_of(model: PreTrainedModel) -> ModelShape:
    """Return the shape of a model, which may have no memory for its weights."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return ModelShape(
        num_parameters(model), int(config.hidden_size), int(config.num_hidden_layers), positions, size_of(model)
    )


def look_at(
    teacher: TeacherConfig, student: StudentConfig, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[ModelShape | None, ModelShape | None]:
    """Return the shapes of both models; None for one whose config is neither here nor can be fetched.

    Args:
        teacher: Section of the teacher.
        student: Section of the student.
        tokenizer: Tokenizer of the run, which gives the vocabulary of new models.

    Raises:
        ModelError: A model is missing or its config does not work, or the student has more layers than the teacher.
    """
    large = _skeleton_if_reachable(teacher, tokenizer)
    if student.num_layers is None:
        small = _skeleton_if_reachable(student, tokenizer)
        return None if large is None else shape_of(large), None if small is None else shape_of(small)
    if large is None:
        return None, None
    whole = shape_of(large)
    with torch.device("meta"):
        return whole, shape_of(cut_layers(large, student.num_layers))


def _skeleton_if_reachable(config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedModel | None:
    try:
        return skeleton(config, tokenizer)
    except HubUnreachableError:
        return None


def tokenizer_if_reachable(config: ModelConfig) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a ready-made model that was found; None if it brings none.

    Raises:
        ModelError: Its tokenizer cannot be loaded.
    """
    assert config.path is not None
    return load_tokenizer(place_on_this_node(config.path), config.revision, config.trust_remote_code)


def describe(shape: ModelShape | None) -> str:
    """Return the shape in a few words."""
    if shape is None:
        return "not looked at: its config is not here and the Hub cannot be reached"
    return f"{amount(shape.num_weights)} parameters, {shape.num_layers} layers of width {shape.width:,}"


def amount(number: float) -> str:
    """Return a large number with three digits and M or B, such as `135M`."""
    for name, unit in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.0f}"
