"""Constraints on a sampled config, such as `curriculum.interval_epochs * curriculum.num_buckets <= 12`.

An expression of dotted keys, numbers, texts, arithmetic, comparisons, `and`, `or`, `not` and `in`; nothing else is
evaluated, and nothing is ever called.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from pocl_ray.errors import ConfigError

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
    """A constraint that cannot be evaluated at all, as opposed to one that does not hold."""


class Constraint:
    """One expression, parsed once and evaluated on many configs."""

    def __init__(self, text: str) -> None:
        """Parse it.

        Raises:
            ConstraintError: It is no expression, or holds something that is not evaluated.
        """
        self.text = text
        try:
            self.body = ast.parse(text, mode="eval").body
        except (SyntaxError, ValueError):
            raise ConstraintError(f"tune.constraints: {text!r} is no expression such as `key.a <= key.b`") from None
        self._check(self.body)

    def holds(self, tree: Mapping[str, Any]) -> bool:
        """Return whether it is true of a config, given as a tree of its keys.

        Raises:
            ConstraintError: A key is not there, or its value cannot be compared or reckoned with.
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
    """Return `a.b.c` for the syntax tree of a dotted name, and None for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        left = dotted(node.value)
        return None if left is None else f"{left}.{node.attr}"
    return None
