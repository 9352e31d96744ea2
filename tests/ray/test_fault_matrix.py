"""Each step of the flow with each thing that can be lost in it: the run ends with the same result.

`make test` runs the short form; `make test-faults` all cases, and prints them as a table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults import DISTILLED, IS_LONG_FORM, next_step_after, started, wait_for
from matrix import CASES, LINE, RACE, RACED, RECOVERY_S, SHORT, STEPS, Outcome, strike
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
    folder = tmp_path_factory.mktemp("raced")
    config, run = full_run.copy(folder, DISTILLED, **RACED)
    path, log = folder / "tiny.yaml", folder / "log"
    path.write_text(dump_config(config))
    with started("distill", str(path), "--resume-with-changes", log=log, RAY_ADDRESS=two.address) as driver:
        assert driver.wait() == 0, log.read_text()
    return FullRun(full_run.folder, path, run, RACED)


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
        finished = request.getfixturevalue("raced_run") if name == RACE else full_run
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
        assert driver.wait() == 0 or fault == "driver", log.read_text()
    if fault == "driver":
        with started(step.command, str(path), log=log, RAY_ADDRESS=two.address) as driver:
            assert driver.wait() == 0, log.read_text()
    outcome.done_s = time.time() - lost_at
    assert step.went_on(run, lost_at), "nothing was lost"
    assert step.same(run, finished.run)
    if step.is_timed:
        outcome.next_step_s = next_step_after(lost_at, two.logs, run)
        assert outcome.next_step_s < RECOVERY_S or fault != "worker"
    outcome.outcome = "resumed by the same command, identical" if fault == "driver" else "identical"
