"""Each step of the flow with each thing that can be lost in it: the run ends with the same result.

`make test` runs the short form; `make test-faults` all cases, and prints them as a table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import IS_LONG_FORM, next_step_after, started, wait_for
from matrix import BESIDE, BOTH, CASES, ENDS_IT, LINE, RACE, RACED, RECOVERY_S, SHORT, STEPS, Outcome, strike
from nodes import Nodes, nodes
from tiny import FullRun

from pocl_ray.config.loading import dump_config

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def two() -> Iterator[Nodes]:
    with nodes(2) as made:
        yield made


@pytest.fixture(scope="module")
def raced_run(full_run: FullRun, two: Nodes, tmp_path_factory: pytest.TempPathFactory) -> FullRun:
    """A finished race on the scores of the full run."""
    return finish(RACE, RACED, full_run, two, tmp_path_factory.mktemp(RACE))


@pytest.fixture(scope="module")
def paired_run(full_run: FullRun, two: Nodes, tmp_path_factory: pytest.TempPathFactory) -> FullRun:
    """A finished run on the scores of the full run, whose control was trained beside its curriculum."""
    return finish(BOTH, BESIDE, full_run, two, tmp_path_factory.mktemp(BOTH))


def finish(name: str, changes: dict[str, Any], full_run: FullRun, two: Nodes, folder: Path) -> FullRun:
    """Do a step of the full run again, with changes and undisturbed."""
    config, run = full_run.copy(folder, STEPS[name].without, **changes)
    path, log = folder / "tiny.yaml", folder / "log"
    path.write_text(dump_config(config))
    with started(STEPS[name].command, str(path), "--resume-with-changes", log=log, RAY_ADDRESS=two.address) as driver:
        assert driver.wait() == 0, log.read_text()
    return FullRun(full_run.folder, path, run, changes)


@pytest.mark.parametrize(("name", "fault"), CASES if IS_LONG_FORM else SHORT)
def test_a_fault_in_a_step_changes_nothing_of_its_result(
    name: str,
    fault: str,
    full_run: FullRun,
    two: Nodes,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    outcome = Outcome(name, fault)
    try:
        of_its_own = {RACE: "raced_run", BOTH: "paired_run"}
        finished = request.getfixturevalue(of_its_own[name]) if name in of_its_own else full_run
        strike_and_compare(outcome, finished, two, tmp_path)
    finally:
        record_property(LINE, outcome.line())


def strike_and_compare(outcome: Outcome, finished: FullRun, two: Nodes, tmp_path: Path) -> None:
    """Do one case, and fill in what came of it."""
    name, fault = outcome.step, outcome.fault
    step, log = STEPS[name], tmp_path / "log"
    config, run = finished.copy(tmp_path, step.without, scaling__start_timeout_s=300)
    path = tmp_path / "tiny.yaml"
    path.write_text(dump_config(config))  # keeps the order of the signals, which decides between ties
    with started(step.command, str(path), log=log, RAY_ADDRESS=two.address) as driver:
        wait_for(lambda: step.is_amid(run, two), f"work of {name}", lambda: driver.poll() is not None)
        lost_at = strike(fault, step, two, driver)
        assert driver.wait() == 0 or fault in ENDS_IT, log.read_text()
    if fault in ENDS_IT:
        with started(step.command, str(path), log=log, RAY_ADDRESS=two.address) as driver:
            assert driver.wait() == 0, log.read_text()
    outcome.done_s = time.time() - lost_at
    assert step.went_on(run, lost_at), "nothing was lost"
    assert step.same(run, finished.run)
    if step.is_timed:
        outcome.next_step_s = next_step_after(lost_at, two.logs, run)
        assert outcome.next_step_s < RECOVERY_S or fault != "worker"
    outcome.outcome = "resumed by the same command, identical" if fault in ENDS_IT else "identical"
