"""The search space: the keys of the config that are searched, and their values. Pure functions."""

from __future__ import annotations

import ast
import itertools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from pydantic import ValidationError

from pocl_ray.config import Config, DomainConfig
from pocl_ray.config.loading import describe
from pocl_ray.config.training import TrainOverrides
from pocl_ray.curriculum.pacing import find_pacing
from pocl_ray.difficulty.choice import choose_signals
from pocl_ray.distill.losses import resolve_loss
from pocl_ray.errors import ConfigError

# Any other key would change rows, models or signals, which all trials share.
SEARCHABLE_SECTIONS = ("curriculum",)
SEARCHABLE_KEYS = (
    "distill.loss",
    "distill.loss_args",
    "distill.scale_by_t_squared",
    *(f"distill.{key}" for key in ("token_weight", "token_weight_strength", "token_keep")),
    "difficulty.signals",
    "difficulty.rrf_k",
    "difficulty.tie_break",
    *(f"train.{key}" for key in TrainOverrides.model_fields),
    *(f"train.{key}" for key in ("average", "average_decay", "average_last")),
)
BUDGET_KEY = "curriculum.num_steps"

Settings = dict[str, Any]


def apply_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """Return the config with these values under dotted keys, and without the `tune` section.

    Raises:
        ValidationError: The values are not valid in the config.
    """
    tree = config.model_dump(mode="json")
    tree["tune"] = None
    for key, value in settings.items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            child = node.get(parent)
            if not isinstance(child, dict):
                child = node[parent] = {}
            node = child
        node[leaf] = value
    return Config.model_validate(tree)


def check_space(config: Config) -> None:
    """Check every key and every single value of the space.

    A value that is invalid only in combination with others is not an error; such samples are drawn again.

    Raises:
        ConfigError: A key is unknown or cannot be searched, or a value is invalid whatever the other values are.
    """
    assert config.tune is not None
    for key, domain in config.tune.space.items():
        for value in edge_values(domain):
            try:
                apply_settings(config, {key: value})
            except ValidationError as error:
                if any(len(item["loc"]) > 1 or item["type"] == "extra_forbidden" for item in error.errors()):
                    raise ConfigError(f"tune.space.{key}: value {value!r}: {describe(error)}") from None
        _check_searchable(key)
        _check_names(config, key, domain)


def _check_names(config: Config, key: str, domain: DomainConfig) -> None:
    """Check that the names of losses, signals and pacing rules are known.

    Raises:
        UserError: A name is unknown.
    """
    checks: dict[str, Callable[[Any], object]] = {
        "distill.loss": lambda name: resolve_loss(name, {}, None),
        "difficulty.signals": lambda names: choose_signals(apply_settings(config, {key: names}).difficulty),
        "curriculum.pacing": find_pacing,
    }
    if key in checks:
        for value in listed_values(domain) or []:
            checks[key](value)


def _check_searchable(key: str) -> None:
    if key == BUDGET_KEY:
        raise ConfigError(f"tune.space.{key}: the length of all trials is set by tune.budget, and is not searched")
    known = key in SEARCHABLE_KEYS or key.startswith("distill.loss_args.") or key.split(".")[0] in SEARCHABLE_SECTIONS
    if not known:
        raise ConfigError(
            f"tune.space.{key}: rows, models and scores are made once for all trials, so this cannot be searched; "
            f"what can: curriculum.*, {', '.join(SEARCHABLE_KEYS)}"
        )


def edge_values(domain: DomainConfig) -> list[Any]:
    """Return all listed values, or the ends of a range."""
    listed = listed_values(domain)
    if listed is not None:
        return listed
    ends = domain.uniform or domain.loguniform or domain.quniform or domain.randint
    assert ends is not None
    return list(ends[:2])


def listed_values(domain: DomainConfig) -> list[Any] | None:
    """Return the listed values; None for a range."""
    values = domain.choice if domain.grid is None else domain.grid
    return None if values is None else [list(v) if isinstance(v, tuple) else v for v in values]


def draw(domain: DomainConfig, rng: np.random.Generator) -> Any:
    """Return a random value."""
    listed = listed_values(domain)
    if listed is not None:
        return listed[int(rng.integers(len(listed)))]
    if domain.randint is not None:
        return int(rng.integers(domain.randint[0], domain.randint[1] + 1))
    if domain.quniform is not None:
        low, high, step = domain.quniform
        return tidy(low + step * int(rng.integers(num_steps_of(low, high, step) + 1)))
    if domain.loguniform is not None:
        low, high = map(math.log, domain.loguniform)
        return tidy(math.exp(rng.uniform(low, high)))
    assert domain.uniform is not None
    return tidy(rng.uniform(*domain.uniform))


def num_steps_of(low: float, high: float, step: float) -> int:
    """Return the number of whole steps between low and high."""
    return math.floor((high - low) / step + 1e-9)


def tidy(value: float) -> float:
    """Return a value rounded to six significant digits, so that a config shows the exact value that was used."""
    return float(f"{value:.6g}")


def grid_points(space: Mapping[str, DomainConfig]) -> list[Settings]:
    """Return every combination of the values of a space in which all values are listed."""
    axes = [listed_values(domain) or [] for domain in space.values()]
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*axes)]


_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}


class ConstraintError(ConfigError):
    """The error for a constraint that cannot be evaluated; a constraint that is false is no such error."""


class Constraint:
    """A constraint on a sampled config, such as `curriculum.interval_epochs * curriculum.num_buckets <= 12`.

    It is parsed once and evaluated on many configs. It is an expression of dotted keys, numbers, texts, arithmetic,
    comparisons, `and`, `or`, `not` and `in`. Nothing else is evaluated, and no function is ever called.
    """

    def __init__(self, text: str) -> None:
        """Parse the expression.

        Raises:
            ConstraintError: The text is not an expression, or it contains something that is not evaluated.
        """
        self.text = text
        try:
            self.body = ast.parse(text, mode="eval").body
        except (SyntaxError, ValueError):
            raise ConstraintError(f"tune.constraints: {text!r} is no expression such as `key.a <= key.b`") from None
        self._check(self.body)

    def holds(self, tree: Mapping[str, Any]) -> bool:
        """Return whether the constraint is true for a config, which is given as a tree of keys.

        Raises:
            ConstraintError: A key is missing, or its value does not support the operation.
        """
        try:
            return bool(self._value(self.body, tree))
        except (TypeError, ZeroDivisionError) as error:
            raise ConstraintError(f"tune.constraints: {self.text!r} cannot be evaluated: {error}") from None

    def _check(self, node: ast.expr) -> None:
        if isinstance(node, ast.Constant):
            known = node.value is None or isinstance(node.value, (bool, int, float, str))
        elif isinstance(node, (ast.Name, ast.Attribute)):
            known = dotted(node) is not None
        elif isinstance(node, ast.BinOp):
            known = type(node.op) in _BINARY
        elif isinstance(node, ast.UnaryOp):
            known = type(node.op) in _UNARY
        elif isinstance(node, ast.Compare):
            known = all(type(op) in _COMPARE for op in node.ops)
        else:
            known = isinstance(node, (ast.BoolOp, ast.List, ast.Tuple))
        if not known:
            raise ConstraintError(
                f"tune.constraints: {self.text!r} holds {ast.unparse(node)!r}; only keys, numbers, texts, "
                "+ - * / // %, comparisons, and, or, not, in are evaluated"
            )
        if not isinstance(node, (ast.Name, ast.Attribute)):
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr):
                    self._check(child)

    def _value(self, node: ast.AST, tree: Mapping[str, Any]) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, (ast.Name, ast.Attribute)):
            return self._look_up(dotted(node) or "", tree)
        if isinstance(node, (ast.List, ast.Tuple)):
            return [self._value(item, tree) for item in node.elts]
        if isinstance(node, ast.UnaryOp):
            return _UNARY[type(node.op)](self._value(node.operand, tree))
        if isinstance(node, ast.BinOp):
            return _BINARY[type(node.op)](self._value(node.left, tree), self._value(node.right, tree))
        if isinstance(node, ast.BoolOp):
            together = all if isinstance(node.op, ast.And) else any
            return together(self._value(value, tree) for value in node.values)
        assert isinstance(node, ast.Compare), "_check lets nothing else through"
        values = [self._value(item, tree) for item in (node.left, *node.comparators)]
        pairs = zip(node.ops, values[:-1], values[1:], strict=True)
        return all(_COMPARE[type(op)](left, right) for op, left, right in pairs)

    def _look_up(self, key: str, tree: Mapping[str, Any]) -> Any:
        node: Any = tree
        for part in key.split("."):
            if not isinstance(node, Mapping) or part not in node:
                raise ConstraintError(f"tune.constraints: {self.text!r}: the config has no key {key}")
            node = node[part]
        return node


def dotted(node: ast.AST) -> str | None:
    """Return `a.b.c` for the syntax tree of a dotted name, or None for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        left = dotted(node.value)
        return None if left is None else f"{left}.{node.attr}"
    return None
