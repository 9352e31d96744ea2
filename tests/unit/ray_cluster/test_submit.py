"""The request to a cluster, and the messages for a user whose job cannot be submitted; without a cluster."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pocl_ray.errors import ConfigError, ResourceError, StorageError
from pocl_ray.ray_cluster import submit as module
from pocl_ray.ray_cluster.submit import Submission, entrypoint, parse_env, runtime_environment, submit

QUICKSTART = Path(__file__).resolve().parents[3] / "configs" / "quickstart.yaml"


@pytest.fixture
def working_dir(tmp_path: Path) -> Path:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "run.yaml").write_text(QUICKSTART.read_text(encoding="utf-8"), encoding="utf-8")
    return tmp_path


@pytest.fixture
def submission(working_dir: Path) -> Submission:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"  # nobody answers there
    return Submission(working_dir / "configs" / "run.yaml", [f"storage_path={working_dir}/runs"], address, working_dir)


def test_the_config_is_named_as_the_job_will_find_it(submission: Submission) -> None:
    command = entrypoint(submission)
    assert command.startswith("python -m pocl_ray run configs/run.yaml storage_path=/")


def test_overrides_pass_the_shell_of_the_job_unchanged(working_dir: Path) -> None:
    given = Submission(working_dir / "configs" / "run.yaml", ["data.prompt_template={a} $b"], "", working_dir)
    assert entrypoint(given).endswith("'data.prompt_template={a} $b'")


def test_files_laid_over_the_config_are_named_as_the_job_will_find_them(working_dir: Path) -> None:
    layer = working_dir / "configs" / "mine.yaml"
    layer.write_text("train: {learning_rate: 1e-3}\n", encoding="utf-8")
    given = Submission(working_dir / "configs" / "run.yaml", ["name=a", str(layer)], "", working_dir)
    assert entrypoint(given).endswith("configs/run.yaml name=a configs/mine.yaml")
    with pytest.raises(ConfigError, match="lies outside of the working directory"):
        entrypoint(Submission(working_dir / "configs" / "run.yaml", [str(QUICKSTART)], "", working_dir))


def test_a_config_outside_of_the_working_directory_is_refused(working_dir: Path) -> None:
    with pytest.raises(ConfigError, match="lies outside of the working directory"):
        entrypoint(Submission(QUICKSTART, [], "", working_dir))


def test_a_config_of_the_package_is_named_as_it_is(working_dir: Path) -> None:
    given = Submission(Path("quickstart"), ["methods/reverse_kl"], "", working_dir)
    assert entrypoint(given) == "python -m pocl_ray run quickstart methods/reverse_kl"


def test_the_working_directory_travels_without_what_a_job_does_not_need(submission: Submission, tmp_path: Path) -> None:
    more = tmp_path / "runtime_env.yaml"
    more.write_text("excludes: [/data]\nenv_vars: {A: '1', B: '2'}\n", encoding="utf-8")
    given = Submission(submission.config, [], "", submission.working_dir, {"B": "3"}, more)
    environment = runtime_environment(given)
    assert {"/.venv", "/runs", "/models", "/data"} <= set(environment["excludes"])
    assert "models" not in environment["excludes"], "pocl_ray/models is code"
    assert environment["env_vars"] == {"A": "1", "B": "3"}


def test_a_relative_storage_path_is_refused_before_anything_is_sent(submission: Submission) -> None:
    relative = Submission(submission.config, ["storage_path=runs"], submission.address, submission.working_dir)
    with pytest.raises(StorageError, match="storage_path: runs is relative"):
        submit(relative)


def test_an_unreachable_address_is_named_in_one_line(submission: Submission) -> None:
    with pytest.raises(ResourceError, match=f"{submission.address}: the job could not be submitted") as caught:
        submit(submission)
    assert "\n" not in str(caught.value)


def test_a_variable_by_name_alone_takes_its_value_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_HERE", "x=y")
    assert parse_env(["FROM_HERE", "B=1=2", "EMPTY="]) == {"FROM_HERE": "x=y", "B": "1=2", "EMPTY": ""}
    with pytest.raises(ConfigError, match="NOT_SET_ANYWHERE: is not set here"):
        parse_env(["NOT_SET_ANYWHERE"])


class Client:
    """A cluster whose connection breaks once in the middle of the output."""

    def __init__(self, status: str, exit_code: int | None) -> None:
        self.status, self.exit_code, self.num_connections = status, exit_code, 0

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        self.num_connections += 1
        await asyncio.sleep(0)
        yield "one\n"
        if self.num_connections == 1:
            return
        yield "two\n"

    def get_job_status(self, job: str) -> Any:
        return SimpleNamespace(is_terminal=lambda: self.num_connections > 1)

    def get_job_info(self, job: str) -> Any:
        return SimpleNamespace(status=self.status, driver_exit_code=self.exit_code, message="why", submission_id=job)


@pytest.mark.parametrize(
    ("status", "exit_code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", None, 1), ("STOPPED", -15, 1)],
)
def test_output_is_followed_across_a_broken_connection_and_the_exit_code_is_the_jobs(
    status: str,
    exit_code: int | None,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "RECONNECT_S", 0.0)
    assert module._follow(Client(status, exit_code), "job") == expected
    assert capsys.readouterr().out == "one\ntwo\n"
