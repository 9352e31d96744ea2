"""Config of workers and actors, and of the resources that they request."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator

from pocl_ray.config.base import Section

_LABEL = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_LABEL_SELECTOR = re.compile(rf"!?({_LABEL}|in\({_LABEL}(, ?{_LABEL})*\))")


class ScalingConfig(Section):
    """Numbers of workers and actors, and the resources that each of them requests."""

    num_workers: int | tuple[int, int] = Field(
        default=1,
        description="training workers; [min, max]: elastic, the run goes on with fewer workers when nodes are lost, "
        "and grows back",
    )
    resize_interval_s: float = Field(
        default=60.0, gt=0, description="an elastic run grows at most this often, and only after a checkpoint"
    )
    use_gpu: bool | None = Field(default=None, description="null: a GPU for each worker if the cluster has any")
    cpus_per_worker: float = Field(default=1.0, gt=0)
    student_actors: int = Field(
        default=1, ge=1, le=100_000, description="actors that run the student while scoring, at most"
    )
    teacher_actors: int = Field(
        default=1, ge=1, le=100_000, description="actors that run the teacher while scoring, at most"
    )
    evaluation_actors: int = Field(
        default=2, ge=1, le=100_000, description="actors that generate answers in evaluation, at most"
    )
    cpus_per_actor: float = Field(default=1.0, gt=0)
    gpus_per_actor: float | None = Field(
        default=None,
        gt=0,
        description="GPUs of each actor, if GPUs are used; null: one each, or a share of one if there are too few",
    )
    resources_per_worker: dict[str, float] = Field(default_factory=dict, description="custom resources of a worker")
    resources_per_actor: dict[str, float] = Field(default_factory=dict, description="custom resources of an actor")
    accelerator_type: str | None = Field(default=None, description="such as A100 or H100")
    labels: dict[str, str] = Field(
        default_factory=dict,
        description="labels of the nodes that workers and actors run on, as Ray's label selectors: a, !a, in(a,b) or "
        "!in(a,b)",
    )
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    max_failures: int = Field(
        default=3,
        ge=0,
        description="how many failures of workers a training run survives, and how many failures of actors other work "
        "does",
    )
    collective_timeout_s: float = Field(
        default=300.0,
        gt=0,
        description="limit of a collective operation; one that lasts longer fails, and the workers restart from the "
        "last checkpoint",
    )
    stall_timeout_s: float = Field(
        default=1800.0,
        gt=0,
        description="workers or actors without progress for this long are killed, and their work is done again; set "
        "it above the time that a model takes to load and a batch to compute",
    )
    parallel_control: bool = Field(
        default=False,
        description="train the control at the same time as the curriculum, if the cluster has room for the workers of "
        "both; it takes the memory of both",
    )
    start_timeout_s: float = Field(default=60.0, gt=0, description="how long to wait for resources before giving up")

    @field_validator("labels")
    @classmethod
    def _label_selectors(cls, given: dict[str, str]) -> dict[str, str]:
        for key, value in given.items():
            if not _LABEL_SELECTOR.fullmatch(value):
                raise ValueError(f"{key}: {value!r} is no label selector; write a, !a, in(a,b) or !in(a,b)")
        return given

    @field_validator("num_workers", mode="before")
    @classmethod
    def _one_or_two_counts(cls, given: Any) -> Any:
        counts = given if isinstance(given, (list, tuple)) else [given]
        if not all(isinstance(count, int) and not isinstance(count, bool) for count in counts):
            raise ValueError("an integer, or [least, most]")
        if counts is given and len(counts) != 2:
            raise ValueError(f"an elastic run has two numbers, [least, most], and not {len(counts)}")
        if min(counts) < 1:
            raise ValueError(f"at least 1 worker is needed, not {min(counts)}")
        if counts[0] > counts[-1]:
            raise ValueError(
                f"the least, {counts[0]}, is above the most, {counts[-1]}; write [{counts[-1]}, {counts[0]}]"
            )
        return given

    @property
    def min_workers(self) -> int:
        """The smallest number of training workers that a run goes on with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """The largest number of training workers."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]
