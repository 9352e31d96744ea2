"""Reading a config: safe YAML, further files merged over it, dotted overrides, and errors that say what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from pocl_ray.config.root import Config
from pocl_ray.config.schedules import ScheduleConfig
from pocl_ray.config.shipped import shipped_config, shipped_names
from pocl_ray.errors import ConfigError

LAYER_ENDINGS = (".yaml", ".yml")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the config of a file, with overrides and further files applied in the order given.

    Args:
        path: A YAML file, or the name of a config that comes with the package, such as `quickstart`.
        overrides: Dotted keys with values in YAML syntax, such as `train.learning_rate=1e-3`, and YAML files that hold
            some of the keys, such as `configs/methods/reverse_kl.yaml`, or their names.

    Returns:
        The validated config.

    Raises:
        ConfigError: The file is missing or is not YAML, a key is unknown (the message names the nearest known one), or
            a value is out of range.
    """
    tree = _read_yaml(Path(path))
    for override in overrides:
        if is_layer(override):
            tree = _merged(tree, _read_yaml(Path(override)), Config)
        else:
            _apply(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error)}") from None


def with_overrides(config: Config, overrides: Mapping[str, Any]) -> Config:
    """Return the config with other values under some keys, dotted or nested; as with a layer, schedules and free
    mappings are replaced as a whole.

    Raises:
        ConfigError: A key is unknown, a value is out of range, or the values do not fit together.
    """
    above: dict[str, Any] = {}
    for key, value in overrides.items():
        *parents, leaf = str(key).split(".")
        node = above
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{key}: {parent} has a value already, {node!r}, and no keys")
        both = isinstance(value, dict) and isinstance(node.get(leaf), dict)
        node[leaf] = {**node[leaf], **value} if both else value
    try:
        return Config.model_validate(_merged(config.model_dump(mode="json"), above, Config))
    except ValidationError as error:
        raise ConfigError(describe(error)) from None


def is_layer(override: str) -> bool:
    """Return whether an override is a file to merge over the config, and not `key=value`."""
    return "=" not in override and (override.endswith(LAYER_ENDINGS) or shipped_config(override) is not None)


def dump_config(config: Config) -> str:
    """Return the resolved config as YAML, from which the run can be repeated."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def in_yaml(value: Any) -> str:
    """Return a value as YAML on one line, from which a config reads the same value."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**9)
    return text.removesuffix("\n").removesuffix("\n...")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `1e-4` is a number, as in YAML 1.2, and a repeated key is an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.value in seen:
                raise yaml.YAMLError(f"key {key_node.value!r} stands twice{key_node.start_mark}")
            seen.add(key_node.value if isinstance(key_node, yaml.ScalarNode) else id(key_node))
        return node


class _Dumper(yaml.SafeDumper):
    """Writes YAML and quotes the words that `_Loader` would read as numbers."""


def _add_float_resolver() -> None:
    pattern = re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")
    for kind in (_Loader, _Dumper):
        kind.add_implicit_resolver("tag:yaml.org,2002:float", pattern, list("-+0123456789"))


_add_float_resolver()


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _read_yaml(path: Path) -> dict[str, Any]:
    shipped = None if path.is_file() else shipped_config(path.as_posix())
    try:
        text = (shipped or path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file{_similar_file_hint(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text ({error})") from None
    try:
        tree = _parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        raise ConfigError(f"{path}: is empty; `pocl-ray init` writes a config")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys to values, not {type(tree).__name__}")
    return tree


def _similar_file_hint(path: Path) -> str:
    """A hint for a missing file: the file in the same directory, or the shipped config, with the most similar name."""
    names = [one.name for one in sorted(path.parent.glob("*")) if one.suffix in LAYER_ENDINGS]
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {path.parent / near[0]}?"
    if path.suffix in LAYER_ENDINGS:
        return ""
    shipped = difflib.get_close_matches(path.as_posix(), shipped_names(), n=1, cutoff=0.5)
    hint = f"did you mean {shipped[0]}? " if shipped else ""
    return f"; {hint}The package brings {', '.join(shipped_names())}"


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key or key.strip() != key:
        near = difflib.get_close_matches(override, shipped_names(), n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"override {override!r}: write it as key.sub=value, or name a file that ends in .yaml{hint}")
    try:
        value = _parse_yaml(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML (quote it?)") from None
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent} is {child!r} and has no keys; override it as a whole")
        node = child
    node[leaf] = value


def _merged(below: dict[str, Any], above: dict[str, Any], section: type[BaseModel]) -> dict[str, Any]:
    """Both mappings merged; `above` wins. Sections are merged key by key, all other values are replaced as a whole.

    A free mapping such as `loss_args` belongs to one choice, and the two forms of a schedule cannot be mixed.
    """
    merged = dict(below)
    for key, value in above.items():
        field = section.model_fields.get(key)
        inner = None if field is None else _own_section(field.annotation)
        if inner is not None and isinstance(value, dict) and isinstance(below.get(key), dict):
            value = _merged(below[key], value, inner)
        merged[key] = value
    return merged


def _own_section(annotation: Any) -> type[BaseModel] | None:
    """The section that a key holds directly, not as a value of a free mapping."""
    for kind in (annotation, *(() if get_origin(annotation) is dict else get_args(annotation))):
        if get_origin(kind) is None and isinstance(kind, type) and issubclass(kind, BaseModel):
            return None if issubclass(kind, ScheduleConfig) else kind
    return None


def describe(error: ValidationError) -> str:
    """Return a validation error in one line: keys, values, and the nearest declared key."""
    return "; ".join(_describe_one(dict(item)) for item in error.errors(include_url=False))


# Messages of pydantic that speak of Python's types.
_PLAINLY = {
    **dict.fromkeys(("tuple_type", "list_type"), "a list is expected, such as [a, b]"),
    **dict.fromkeys(("model_type", "model_attributes_type"), "keys are expected, such as {key: value}"),
}


def _describe_one(item: dict[str, Any]) -> str:
    loc = [part for part in item["loc"] if isinstance(part, (str, int))]
    place = ".".join(str(part) for part in loc)
    if item["type"] == "extra_forbidden":
        known = _keys_at(Config, loc[:-1])
        near = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*map(str, loc[:-1]), near[0]])}?" if near else f"known: {', '.join(known)}"
        return f"unknown key {place}; {hint}"
    if item["type"] == "missing":
        return f"missing key {place}"
    message = _PLAINLY.get(item["type"], str(item["msg"]).removeprefix("Value error, "))
    given = item.get("input")
    shown = f" (given: {given!r})" if isinstance(given, (str, int, float, bool, type(None))) and place else ""
    return f"{place}: {message}{shown}" if place else message


def _keys_at(model: type[BaseModel], loc: Sequence[str | int]) -> list[str]:
    """Return the declared keys of the section that `loc` leads to."""
    for part in loc:
        field = model.model_fields.get(str(part))
        if field is None:  # a key of a free mapping, such as the name of a test set
            continue
        found = _section_in(field.annotation)
        if found is None:
            return []
        model = found
    return sorted(field.alias or name for name, field in model.model_fields.items())


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        found = _section_in(inner)
        if found is not None:
            return found
    return None
