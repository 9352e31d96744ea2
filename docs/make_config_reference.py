"""Writes docs/config.md from the config's own classes: python docs/make_config_reference.py.

The text of a key is the `description` of its field. SENTENCES holds the texts of fields without one. `--print` prints
the page and writes nothing.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pocl_ray.config import Config
from pocl_ray.config.base import Section
from pocl_ray.config.neutral import NEUTRAL
from pocl_ray.config.training import TrainOverrides

TARGET = Path(__file__).resolve().parent / "config.md"

PREAMBLE = """\
# Every key of the config

Written by `docs/make_config_reference.py` from the classes in `pocl_ray/config`; change those, not this page.

A config is one YAML file. `key.sub=value` after it on the command line overrides a key. The value is in YAML syntax:

    pocl-ray run configs/quickstart.yaml train.learning_rate=1e-3 'evaluation.seeds=[10, 20]' distill.loss=reverse_kl

- A further YAML file replaces keys of the config: `pocl-ray run my.yaml configs/methods/seqkd.yaml`
  (docs/methods.md). Files and keys apply in the order given.
- A key that is not on this page is an error, and the message names the nearest one that is.
- A key of a section that is left out has the default of that section's table:
  `evaluation.generation: {max_new_tokens: 64}` leaves the other keys of `generation` as they are. Free mappings and
  schedules are replaced as a whole.
- Relative paths are relative to the directory that the command is run in.
- A run belongs to its config: the same `name` with another config is refused with a list of what differs, unless
  `--resume-with-changes` is given, which runs the affected steps again. Keys marked with * change the speed of a run
  or the machines that it uses, and not what it computes. They may differ.
"""

# Keys whose fields have no description.
SENTENCES: dict[str, str] = {
    "Config.seed": "seed of all random draws: order of rows, new weights, dropout, a held-out dev set",
    "ModelConfig.attention": "the attention implementation; auto leaves the choice to transformers",
    "SftConfig.num_epochs": "passes over the training rows",
    "GenerationConfig.top_p": "sample from the likeliest tokens that together have this probability; 1 keeps all",
    "CurriculumConfig.num_buckets": "equal slices of the ranking; `baby_step` makes as many stages",
    "ScheduleConfig.shape": "how the value goes from `start` to `end` over the stages",
    "ScheduleConfig.start": "value of the first stage",
    "ScheduleConfig.end": "value of the last stage",
    "TrainConfig.learning_rate": "peak of the schedule",
    "TrainConfig.lr_schedule": "how the learning rate falls after the warm-up; `wsd`: only over the last `decay_ratio`",
    "TrainConfig.weight_decay": "AdamW's, on every parameter",
    "TrainConfig.betas": "AdamW's",
    "TrainConfig.eps": "AdamW's",
    "TrainConfig.precision": "precision of the forward and backward pass; master weights and moments are float32",
    "TrainConfig.zero_stage": "DeepSpeed ZeRO stage: the state that is partitioned over the workers; 0 needs "
    "precision fp32",
    "TrainConfig.offload_optimizer": "place of the optimizer's state, if it is not on the device",
    "TrainConfig.log_every_steps": "steps between two records of metrics.jsonl",
    "ControlConfig.kd_temperature": "constant over the run",
    "ControlConfig.kd_ratio": "constant over the run",
    "ScalingConfig.cpus_per_worker": "logical CPUs, and threads, of a training worker",
    "ScalingConfig.cpus_per_actor": "logical CPUs, and threads, of a scoring or evaluation actor",
    "ScalingConfig.placement": "how workers are spread over nodes (Ray's placement strategies)",
}

NAMES: dict[type, str] = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null"}
BOUNDS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}"}


def main() -> None:
    """Write the page, or print it."""
    page = render()
    if "--print" in sys.argv[1:]:
        print(page, end="")
    else:
        TARGET.write_text(page, encoding="utf-8")


def render() -> str:
    """Return docs/config.md.

    Raises:
        ValueError: A key has no sentence, or one here and another on its field.
    """
    places: dict[type[Section], list[str]] = {}
    for key, section in _sections(Config, ""):
        places.setdefault(section, []).append(key)
    used: set[str] = set()
    parts = [PREAMBLE, _table("Top level", Config, [""], used)]
    parts += [_table(_title(keys), section, keys, used) for section, keys in places.items()]
    unused = SENTENCES.keys() - used
    if unused:
        raise ValueError(f"SENTENCES has keys that have a description, or are gone: {sorted(unused)}")
    return "\n".join(parts)


def _sections(section: type[Section], prefix: str) -> Iterator[tuple[str, type[Section]]]:
    for name, field in section.model_fields.items():
        inner = _section_in(field.annotation)
        if inner is not None:
            key = f"{prefix}{name}" + (".<name>" if _is_mapping(field.annotation) else "")
            yield key, inner
            yield from _sections(inner, f"{key}.")


def _section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)


def _is_mapping(annotation: Any) -> bool:
    return get_origin(annotation) is dict


def _title(keys: list[str]) -> str:
    return ", ".join(f"`{key}`" for key in keys)


def _table(title: str, section: type[Section], keys: list[str], used: set[str]) -> str:
    lines = [f"## {title}", "", _summary(section), ""]
    if section is TrainOverrides:
        names = ", ".join(f"`{name}`" for name in section.model_fields)
        return "\n".join([*lines, f"Keys, with the types of `train` and null by default: {names}.", ""])
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        mark = "\\*" if any(_is_neutral(f"{key}.{name}".lstrip(".")) for key in keys) else ""
        cells = [f"`{field.alias or name}`{mark}", _type(field), _default(field), _meaning(section, name, field, used)]
        lines.append("| " + " | ".join(cell.replace("\n", " ") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def _is_neutral(key: str) -> bool:
    return any(key == neutral or key.startswith(f"{neutral}.") for neutral in NEUTRAL)


def _summary(section: type[Section]) -> str:
    paragraphs = (section.__doc__ or "").strip().split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _type(field: FieldInfo) -> str:
    bounds = [
        text.format(f"{value:g}")
        for constraint in field.metadata
        for name, text in BOUNDS.items()
        if (value := getattr(constraint, name, None)) is not None
    ]
    return ", ".join([_type_name(field.annotation), *bounds])


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return " \\| ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(argument) for argument in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {_type_name(arguments[0])}s"
        return f"{len(arguments)} {_type_name(arguments[0])}s"
    if origin is dict:
        return f"mapping of names to {_type_name(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    return NAMES.get(annotation, "any value")


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "`{}`"
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, Section):
        return f"`{_flow(_set_fields(field.default))}`"
    return f"`{_flow(field.default)}`"


def _set_fields(section: Section) -> dict[str, Any]:
    """The keys of a default section that differ from the defaults of its own table."""
    return {name: getattr(section, name) for name in type(section).model_fields if name in section.model_fields_set}


def _flow(value: Any) -> str:
    """Return a value as one would write it in YAML, on one line."""
    if isinstance(value, Section):
        return _flow(_set_fields(value))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return value if isinstance(value, str) else json.dumps(value)


def _meaning(section: type[Section], name: str, field: FieldInfo, used: set[str]) -> str:
    # Inherited keys have one sentence, at the class that declares them.
    owner = next(base for base in reversed(section.__mro__) if name in getattr(base, "__annotations__", {}))
    place = f"{owner.__name__}.{name}"
    if field.description:
        return field.description
    if place in SENTENCES:
        used.add(place)
        return SENTENCES[place]
    inner = _section_in(field.annotation)
    if inner is None:
        raise ValueError(f"{place} has neither a description nor a sentence in SENTENCES")
    return "see below"


if __name__ == "__main__":
    main()
