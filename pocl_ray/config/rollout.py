"""Config of rollouts: responses that the student writes itself while it is trained."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from pocl_ray.config.base import Number, Section


class RolloutConfig(Section):
    """On-policy training: on which steps the student writes the responses, and how they are trained on."""

    # `lambda` is the name in the paper and in the file, but a reserved word in Python.
    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    mode: Literal["off", "on", "mixed", "adaptive"] = Field(
        default="off",
        description="on: the student writes every response; mixed: those of a step with probability lambda (GKD); "
        "adaptive: by DistiLLM's schedule, with a replay buffer",
    )
    mix_probability: float = Field(
        default=0.5, ge=0, le=1, alias="lambda", description="of a step on rollouts, in mode mixed"
    )
    beside_data: bool = Field(
        default=False,
        description="train on the rows' own responses in the same optimizer step (DistiLLM-2); in mode on",
    )
    loss: str | None = Field(default=None, description="divergence on rollouts; null: distill.loss, with its loss_args")
    loss_args: dict[str, Number] = Field(default_factory=dict, description="parameters of rollout.loss")
    kd_ratio: float | None = Field(
        default=1.0,
        ge=0,
        le=1,
        description="on rollouts, which are no reference to imitate; null: the curriculum's, with cross-entropy on the "
        "student's own words",
    )
    sampling_temperature: float = Field(default=1.0, ge=0, description="0: greedy")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="samples from the likeliest tokens with this much probability together"
    )
    max_new_tokens: int | None = Field(default=None, ge=1, description="default: data.max_tokens less the prompt")
    batch_rows: int = Field(default=64, ge=1, description="rows that a worker generates at once")
    backend: Literal["transformers", "vllm"] = Field(
        default="transformers", description="vllm: on GPUs, where vLLM is installed"
    )
    vllm_gpu_share: float = Field(
        default=0.3, gt=0, lt=1, description="of a GPU's memory, that vllm takes while it writes"
    )
    buffer_rows: int = Field(default=1000, ge=1, description="rollouts that the replay buffer holds, in mode adaptive")
    threshold_start: float = Field(default=0.0, ge=0, le=1, description="phi at the start, in mode adaptive")
    threshold_rise: float = Field(default=0.1, gt=0, le=1, description="by which phi rises, to 1 at most")
    loss_rise: float = Field(
        default=0.1,
        ge=0,
        description="phi rises when the dev cross-entropy is so much above the one that it last rose at",
    )

    @field_validator("mode", mode="before")
    @classmethod
    def _words_that_yaml_reads_as_booleans(cls, mode: Any) -> Any:
        return {True: "on", False: "off"}[mode] if isinstance(mode, bool) else mode

    @model_validator(mode="after")
    def _fits_together(self) -> RolloutConfig:
        if self.beside_data and self.mode != "on":
            raise ValueError("beside_data needs rollouts in every step: set mode to on, or beside_data to false")
        if self.loss is None and self.loss_args:
            raise ValueError("loss_args are parameters of rollout.loss, which is not given; set it, or remove them")
        if self.backend == "vllm" and self.mode == "off":
            raise ValueError("backend vllm has nothing to write in mode off; set mode, or remove backend")
        return self

    @property
    def is_on(self) -> bool:
        """Whether any step is trained on rollouts."""
        return self.mode != "off"

    @property
    def uses_teacher(self) -> bool:
        """Whether the teacher is asked of rollouts, whatever the curriculum's `kd_ratio`."""
        return self.is_on and self.kd_ratio is not None and self.kd_ratio > 0
