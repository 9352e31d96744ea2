from __future__ import annotations

import pytest

from pocl_ray.tuning.space import Constraint, ConstraintError

TREE = {"a": {"x": 2, "y": 3.0, "name": "anti"}, "seed": 1, "none": None}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("a.x <= a.y", True),
        ("a.x * a.y < 6", False),
        ("a.x + 1 == a.y and not seed > 1", True),
        ("1 < a.x < 3", True),
        ("a.name in ['anti', 'random'] or a.x // 2 == 7", True),
        ("a.x % 2 == -seed + 1", True),
        ("none == None", True),
    ],
)
def test_an_expression_is_evaluated_on_the_config(text: str, holds: bool) -> None:
    assert Constraint(text).holds(TREE) is holds


@pytest.mark.parametrize(
    "text",
    ["__import__('os')", "a.x <=", "[c for c in a]", "a['x'] > 1", "lambda: 1", "(1).real > 0", "2 ** 9 > 1", ""],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ConstraintError):
        Constraint(text)


@pytest.mark.parametrize("text", ["a.z > 1", "b > 1", "none < 1", "a.x / 0 > 1", "a < 1"])
def test_what_cannot_be_evaluated_is_named(text: str) -> None:
    with pytest.raises(ConstraintError, match=r"tune\.constraints"):
        Constraint(text).holds(TREE)
