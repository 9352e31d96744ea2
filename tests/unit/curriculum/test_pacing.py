"""Pacing rules: which slice of which order each stage trains on, and what a plug-in may get wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from pocl_ray import plugins
from pocl_ray.config import Config
from pocl_ray.curriculum.pacing import GROUP, PACINGS, Pacing, admitted_rows, anti, baby_step, competence, one_pass
from pocl_ray.curriculum.schedule import bucket_ends, check_curriculum, plan_stages
from pocl_ray.errors import ConfigError, UserError
from pocl_ray.records import Stage

ENDS = bucket_ends(103, 4)  # (25, 50, 75, 103)


def stages_of(num_rows: int = 103, **curriculum: Any) -> tuple[Stage, ...]:
    return plan_stages(config(**curriculum), num_rows)


def config(**curriculum: Any) -> Config:
    return Config.model_validate(
        {
            "name": "run",
            "data": {"train": {"path": "a.jsonl"}, "dev": {"path": "b.jsonl"}},
            "teacher": {"path": "teacher"},
            "student": {"path": "student"},
            "curriculum": {"interval_epochs": 2, **curriculum},
            "train": {"global_batch_rows": 8},
        }
    )


def test_baby_step_keeps_what_it_admitted_and_one_pass_leaves_it() -> None:
    assert baby_step(ENDS) == [(0, 25), (0, 50), (0, 75), (0, 103)]
    assert one_pass(ENDS) == [(0, 25), (25, 50), (50, 75), (75, 103)]


def test_anti_begins_with_the_hardest_rows_and_takes_as_many_steps_as_baby_step() -> None:
    assert anti(ENDS) == [(78, 103), (53, 103), (28, 103), (0, 103)]
    stages = stages_of(pacing="anti")
    assert [stage.buckets for stage in stages] == [(3,), (2, 3), (1, 2, 3), (0, 1, 2, 3)]
    assert [stage.num_steps for stage in stages] == [stage.num_steps for stage in stages_of()]


@pytest.mark.parametrize("root", [0.5, 1.0, 2.0, 3.0])
def test_competence_admits_the_share_of_the_formula(root: float) -> None:
    slices = competence((1000,), root=root, start=0.2, num_stages=6)
    shares = [min(1.0, (t / 5 * (1 - 0.2**root) + 0.2**root) ** (1 / root)) for t in range(6)]
    assert [end for _, end in slices] == [math.ceil(round(1000 * share, 6)) for share in shares]
    assert slices[0] == (0, 200)
    assert slices[-1] == (0, 1000)
    assert all(first == 0 for first, _ in slices)


def test_a_larger_root_admits_more_rows_early() -> None:
    linear, root = competence((1000,), root=1, num_stages=5), competence((1000,), root=3, num_stages=5)
    assert [end for _, end in linear] == [100, 325, 550, 775, 1000]
    assert all(more > fewer for (_, more), (_, fewer) in zip(root[1:-1], linear[1:-1], strict=True))


def test_competence_does_not_care_for_buckets() -> None:
    stages = stages_of(pacing="competence", pacing_args={"num_stages": 3, "start": 0.5, "root": 1})
    assert [stage.num_rows for stage in stages] == [52, 78, 103]
    assert [stage.buckets for stage in stages] == [(0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 3)]
    assert competence((103,), num_stages=1) == [(0, 103)]


def test_random_is_baby_step_on_another_order_with_the_same_ramps() -> None:
    same = [stage.to_json() for stage in stages_of()]
    drawn = [stage.to_json() for stage in stages_of(pacing="random")]
    assert [stage.pop("order") for stage in same] == ["rank"] * 4
    assert [stage.pop("order") for stage in drawn] == ["random"] * 4
    assert drawn == same


def test_none_is_plain_distillation_at_the_steps_of_baby_step() -> None:
    (stage,) = stages_of(pacing="none")
    assert stage.num_steps == sum(s.num_steps for s in stages_of()) == 2 * (3 + 6 + 9 + 12)
    assert (stage.first_rank, stage.end_rank) == (0, 103)


@pytest.mark.parametrize("advance", ["interval", "plateau"])
@pytest.mark.parametrize("name", PACINGS)
def test_every_rule_gives_stages_that_can_be_trained(name: str, advance: str) -> None:
    if name in ("frontier", "race") and advance == "plateau":
        pytest.skip("its steps are fixed beforehand; a test of the config holds that this is refused")
    stages = stages_of(pacing=name, advance=advance)
    assert all(0 <= s.first_rank < s.end_rank <= 103 and s.num_steps > 0 for s in stages)
    assert [s.index for s in stages] == list(range(len(stages)))
    assert {s.min_epochs for s in stages} == {1 if advance == "plateau" else None}
    assert max(s.end_rank for s in stages) == 103


@pytest.mark.parametrize(
    ("pacing", "args", "message"),
    [
        ("competence", {"root": 0}, r"^curriculum\.pacing_args\.root must be above 0, not 0$"),
        ("competence", {"start": 1.5}, r"^curriculum\.pacing_args\.start must be above 0 and at most 1, not 1\.5$"),
        ("competence", {"num_stages": 2.5}, "num_stages must be a whole number from 1 to 10000, not 2.5"),
        ("competence", {"c0": 0.1}, "unexpected keyword argument 'c0'; pacing 'competence' takes: root, start, num"),
        ("baby_step", {"root": 2}, "unexpected keyword argument 'root'; pacing 'baby_step' takes: none"),
        ("babystep", {}, r"^curriculum\.pacing: unknown rule 'babystep'; did you mean baby_step\?$"),
        ("zzz", {}, "known: baby_step, one_pass, competence, anti, random, frontier, none"),
    ],
)
def test_a_wrong_rule_or_parameter_is_named(pacing: str, args: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_curriculum(config(pacing=pacing, pacing_args=args).curriculum)


# Plug-ins


def halves(ends: Sequence[int], share: float = 0.5) -> list[tuple[int, int]]:
    return [(0, int(ends[-1] * share)), (0, ends[-1])]


DRAWN = Pacing(halves, order="random")


def broken(ends: Sequence[int]) -> list[tuple[int, int]]:
    raise RuntimeError("no\nluck")


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def declare(value: str) -> None:
        entry_point = EntryPoint(name="mine", value=value, group=GROUP)
        monkeypatch.setattr(plugins, "entry_points", lambda group: [entry_point] if group == GROUP else [])

    return declare


def test_a_plug_in_is_a_function_of_the_buckets_ends(install: Callable[[str], None]) -> None:
    install("test_pacing:halves")
    assert [stage.num_rows for stage in stages_of(pacing="mine")] == [51, 103]
    assert [stage.num_rows for stage in stages_of(pacing="mine", pacing_args={"share": 0.25})] == [25, 103]


def test_a_plug_in_may_ask_for_a_random_order(install: Callable[[str], None]) -> None:
    install("test_pacing:DRAWN")
    assert [stage.order for stage in stages_of(pacing="mine")] == ["random", "random"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("test_pacing:broken", r"^pacing plug-in 'mine' fails when called: RuntimeError: no luck$"),
        ("test_pacing:ENDS", "is tuple; it must be a function or a Pacing"),
        ("test_pacing:absent", r"^pacing plug-in 'mine' \(test_pacing:absent\) cannot be imported: AttributeError"),
    ],
)
def test_a_plug_in_that_does_not_work_is_refused_by_name(
    install: Callable[[str], None], value: str, message: str
) -> None:
    install(value)
    with pytest.raises(UserError, match=message):
        check_curriculum(config(pacing="mine").curriculum)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, r"^pacing plug-in 'mine' returns None; a rule returns a list of \(first, end\), one a stage$"),
        ([1, 2], r"returns \[1, 2\]; a rule returns"),
        ([(0.0, 5.0)], "a rule returns a list"),
        ([], "returns no stage for 103 rows"),
        ([(0, 104)], r"returns the slice \(0, 104\) for 103 rows; it must be 0 <= first < end <= 103"),
        ([(5, 5)], r"the slice \(5, 5\)"),
        ([(-1, 5)], r"the slice \(-1, 5\)"),
    ],
)
def test_nonsense_from_a_plug_in_is_shown(returned: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        admitted_rows("mine", Pacing(lambda ends: returned), {}, ENDS)
