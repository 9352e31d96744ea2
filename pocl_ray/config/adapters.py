"""Config of low-rank adapters."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from pocl_ray.config.base import Section

ModuleName = Annotated[str, StringConstraints(min_length=1)]


class LoraConfig(Section):
    """Low-rank adapters (LoRA, arXiv 2106.09685): they are trained, the student's own weights stay as they are."""

    rank: int = Field(default=16, ge=1, description="of each adapter's two matrices")
    alpha: float = Field(default=32.0, gt=0, description="an adapter's output is multiplied by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of an adapter's input, during training")
    target_modules: tuple[ModuleName, ...] | None = Field(
        default=None,
        min_length=1,
        description="linear layers that get an adapter, by their name or its end: [q_proj, v_proj]; "
        "null: all but the LM head",
    )
    merge: bool = Field(
        default=True,
        description="write a plain model, adapters merged, beside the adapters; false: the adapters alone",
    )
