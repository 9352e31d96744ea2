"""The shapes of the JSON files of a run, by which a damaged one is refused in one line, before anything counts on it.

A shape names the keys that readers rely on. Other keys may stand there too, and a figure that was not measured may be
NaN, null or absent; a text where a number belongs is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from pocl_ray.errors import StorageError
from pocl_ray.records import Ramp, RowsSummary, Stage

VERSION = 1
"""The version of the run format, which stands in manifest.json."""

Number = float | None


class _Shape(BaseModel):
    model_config = ConfigDict(extra="allow")


class Step(_Shape):
    """A step of manifest.json."""

    status: str
    fingerprint: str = ""
    outputs: list[str] = []
    seconds: float = 0.0
    counts: dict[str, Number] = {}


class ManifestFile(_Shape):
    """The content of manifest.json."""

    version: Literal[1]
    steps: dict[str, Step]


class Sampled(_Shape):
    """A metric of sampled answers."""

    mean: Number = None
    std: Number = None
    by_seed: dict[str, Number] = {}


class ModelFigures(_Shape):
    """The figures of a model on a set: of answers, or of plain text."""

    rouge_l: Sampled | None = None
    exact_match: Sampled | None = None
    greedy: dict[str, Number] = {}
    unstopped_share: Number = None
    perplexity: Number = None
    ce_loss: Number = None


class TaskMetric(_Shape):
    """A metric of a task of lm-eval."""

    value: Number = None
    stderr: Number = None
    higher_is_better: bool | None = None
    num_rows: Number = None


class TaskFigures(_Shape):
    """The figures of a model on a task of lm-eval."""

    metrics: dict[str, TaskMetric]
    group: str | None = None
    num_rows: Number = None
    num_fewshot: Number = None


class EvaluationFile(_Shape):
    """The content of evaluation.json."""

    sets: dict[str, dict[str, ModelFigures]] = {}
    tasks: dict[str, dict[str, Annotated[dict[str, TaskFigures], Field(min_length=1)]]] = {}


class Interval(_Shape):
    """A paired difference over seeds of training."""

    mean: float
    low: float
    high: float
    verdict: str


class PairFigure(_Shape):
    """A figure of curriculum and control over seeds of training."""

    difference: Interval | None = None


class PairsFile(_Shape):
    """The content of pairs.json."""

    seeds: list[int]
    sets: dict[str, dict[str, PairFigure]]


class Environment(_Shape):
    """The content of environment.json."""

    versions: dict[str, str | None] | None = None
    nodes: list[dict[str, Any]] | None = None
    on_hub: list[str] | None = None


def _checked(record: Any) -> Any:
    """A dataclass as a shape: with its fields, and no others."""
    frozen = record.__dataclass_params__.frozen
    return checked_dataclass(config=ConfigDict(extra="forbid"), frozen=frozen)(record)


Rows = _checked(RowsSummary)


class Sets(BaseModel):
    """The sets of rows: training, dev, and others by name."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Rows] = Field(init=False)  # type: ignore[valid-type]

    train: Rows  # type: ignore[valid-type]
    dev: Rows  # type: ignore[valid-type]


class RowsFile(_Shape):
    """The content of rows/summary.json."""

    sets: Sets
    leaks: dict[str, int]
    for_teacher: Sets | None = None


@dataclass(frozen=True)
class _Planned(Stage):
    """A stage in the form of `Stage.to_json`, which adds two figures and holds ramps of losses by their keys."""

    loss_ramps: dict[str, Ramp] = field(default_factory=dict)  # type: ignore[assignment]
    num_rows: int = 0  # type: ignore[misc]
    num_steps: int = 0  # type: ignore[misc]


PlannedStage = _checked(_Planned)
"""A stage of plan.json and race.json."""


class PlanFile(_Shape):
    """The content of plan.json."""

    num_rows: int
    bucket_ends: list[int]
    global_batch_rows: int
    stages: list[PlannedStage]  # type: ignore[valid-type]


class RacePlan(_Shape):
    """The rungs of a race."""

    num_steps: Annotated[int, Field(ge=1)]
    most_steps: int


class RaceFile(_Shape):
    """The content of race.json."""

    winner: str
    num_steps: int
    plan: RacePlan
    decisions: Annotated[list[dict[str, Any]], Field(min_length=1)]
    stages: list[PlannedStage]  # type: ignore[valid-type]


SHAPES: dict[str, Any] = {
    "manifest.json": ManifestFile,
    "environment.json": Environment,
    "evaluation.json": EvaluationFile,
    "pairs.json": PairsFile,
    "plan.json": PlanFile,
    "race.json": RaceFile,
    "rows/summary.json": RowsFile,
    "responses/summary.json": RowsSummary,
    "responses/for_teacher/summary.json": RowsSummary,
}
"""The shapes of files by their place in the run directory."""


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(_checked(shape) if is_dataclass(shape) else shape)


def damaged(place: str, error: object, remedy: str = "delete it to have it made again") -> StorageError:
    """Return the error for a file of a run that cannot be read.

    Args:
        place: Path or URL of the file.
        error: Error or reason.
        remedy: Remedy, as the end of the message.
    """
    return StorageError(f"{place}: cannot be read, it is damaged ({' '.join(str(error).split())}); {remedy}")


def parse_json(data: bytes, rel: str, place: str, shape: Any = None) -> Any:
    """Return the value in a JSON file of a run.

    Args:
        data: Content of the file.
        rel: Place of the file in the run directory, which may have a shape.
        place: Path or URL of the file, for the message.
        shape: Shape of the value: a pydantic model, a dataclass whose fields it holds and no others, or a type such as
            `dict`; None: that of `rel`, and a JSON object where it has none.

    Raises:
        StorageError: The file is damaged, or another version wrote it.
    """
    wanted = shape or SHAPES.get(rel, dict)
    try:
        _adapter(wanted).validate_json(data, strict=True)
        return json.loads(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        if wanted is ManifestFile and where == "version":
            raise StorageError(
                f"{place}: written by another version of pocl-ray; read it with that one, which environment.json "
                "names, or give a new run another name"
            ) from None
        reason = f"{where}: {first['msg']}" if where else first["msg"]
    except ValueError as error:
        reason = str(error)
    if wanted is ManifestFile:
        raise damaged(place, reason, "put a copy in its place, or delete it: every step then runs again")
    raise damaged(place, reason)
