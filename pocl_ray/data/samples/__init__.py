"""Instruction rows that ship with the project: the quickstart's data, and what `make smollm2` uses without real rows.

They are not stored but invented, by thirty small functions (`order`, `reading`, `rewriting`, `numbers`). Each is a
family of tasks with a grade of difficulty. The same call gives the same rows on every machine.

The splits are honest. The distinct questions of a family are drawn first and then dealt out, so no question of dev or
test stands in train, not even in other words; a family that has few distinct questions gives fewer rows. Their words
are all in train, though: what dev and test ask for is the task on a new combination, not a new word.
"""

from __future__ import annotations

import random
from functools import cache

from pocl_ray.data.samples.registry import FAMILIES, Family, Row
from pocl_ray.errors import DataError

SPLITS = {"test": 11, "dev": 5, "train": 125}
"""Rows of each family in each split, in the order in which they are dealt out."""

_NAME = "instructions"
_DRAWS_PER_ROW = 20  # after so many draws for each row wanted, the family has no more distinct questions to give


def sample_rows(name: str, split: str) -> list[dict]:
    """Return the shipped rows of one split, families mixed.

    Args:
        name: the data set; there is one, `instructions`.
        split: `train`, `dev` or `test`.

    Returns:
        Rows with `instruction`, `input`, `output` (a string, or a list of accepted answers with the one to train on
        first) and `topic`, the task family.

    Raises:
        DataError: there is no such data set or split.
    """
    if name != _NAME:
        raise DataError(f"no sample rows are called '{name}'; there is '{_NAME}'")
    if split not in SPLITS:
        raise DataError(f"the sample rows have no split '{split}'; there are {', '.join(SPLITS)}")
    return [_as_record(topic, row) for topic, row in _split_rows(split)]


def fresh_rows(name: str, seed: str, rows_per_family: int) -> list[dict]:
    """Return rows that other draws give, none of which asks a question of dev or test, families mixed.

    They are for models that should know more than the quickstart's training rows, such as the shipped teacher, and
    for judging on rows that nothing was tuned on. Questions of train may be among them.

    Args:
        name: The data set; there is one, `instructions`.
        seed: Seed of the draws; another one gives other rows.
        rows_per_family: Rows of each family at most; a family that has few distinct questions gives fewer.

    Returns:
        Rows like those of `sample_rows`, each question once.

    Raises:
        DataError: There is no such data set.
    """
    sample_rows(name, "train")  # refuses an unknown name
    rows = [(one.name, row) for one in FAMILIES.values() for row in _draw_fresh(one, seed, rows_per_family)]
    random.Random(f"{_NAME} {seed}").shuffle(rows)
    return [_as_record(topic, row) for topic, row in rows]


def _draw_fresh(family: Family, seed: str, wanted: int) -> list[Row]:
    dealt = _deal(family)
    held_out = {row.question for split in ("dev", "test") for row in dealt[split]}
    rng = random.Random(f"{_NAME} {seed} {family.name}")
    distinct: dict[tuple, Row] = {}
    for _ in range(_DRAWS_PER_ROW * wanted):
        row = family.invent(rng)
        if row.question not in held_out:
            distinct.setdefault(row.question, row)
        if len(distinct) == wanted:
            break
    return list(distinct.values())


@cache
def _split_rows(split: str) -> list[tuple[str, Row]]:
    rows = [(family.name, row) for family in FAMILIES.values() for row in _deal(family)[split]]
    random.Random(f"{_NAME} {split}").shuffle(rows)
    return rows


@cache
def _deal(family: Family) -> dict[str, list[Row]]:
    """Draw the distinct questions of a family, then deal them to the splits in proportion to `SPLITS`."""
    rng = random.Random(f"{_NAME} {family.name}")
    wanted = sum(SPLITS.values())
    distinct: dict[tuple, Row] = {}
    for _ in range(_DRAWS_PER_ROW * wanted):
        row = family.invent(rng)
        distinct.setdefault(row.question, row)
        if len(distinct) == wanted:
            break
    rows = list(distinct.values())
    dealt, start = {}, 0
    for split, share in SPLITS.items():
        stop = min(len(rows), start + max(1, share * len(rows) // wanted))
        dealt[split] = rows[start:stop]
        start = stop
    return dealt


def _as_record(topic: str, row: Row) -> dict:
    output = row.answers[0] if len(row.answers) == 1 else list(row.answers)
    return {"instruction": row.instruction, "input": row.input, "output": output, "topic": topic}
