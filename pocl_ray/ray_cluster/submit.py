"""Submission of a run as a job to a Ray cluster, over the cluster's HTTP address.

`ray job submit` sends a working directory and follows the job too. Here a wrong config is refused before anything is
sent, paths of configs hold in the job, caches and models stay behind, the output is followed across a broken
connection, and the exit code is the run's.

The working directory is sent with the job. Everything else must be installed on the cluster: pocl-ray's dependencies
come from the image or the set-up of the nodes (`cluster/README.md`), and not from the job.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from requests.exceptions import RequestException

from pocl_ray.config import load_config
from pocl_ray.config.loading import is_layer
from pocl_ray.config.shipped import shipped_config
from pocl_ray.console import console
from pocl_ray.errors import ConfigError, ResourceError
from pocl_ray.ray_cluster.internals import quieten_packing
from pocl_ray.run_directory.storage import check_lasts

# Files of a checkout that a job does not need, in addition to those of .gitignore. A leading slash means the top level
# only, since `pocl_ray/models` is code.
EXCLUDES = (
    "/.git",
    "/.venv",
    "/venv",
    "/runs",
    "/models",
    "/dist",
    "/build",
    "*.egg-info",
    "__pycache__",
    ".pytest_cache",
    ".mypy_cache",
    ".ruff_cache",
)
RECONNECT_S = 3.0
MAX_RECONNECTS = 100


@dataclass(frozen=True)
class Submission:
    """A run that is submitted.

    Attributes:
        config: YAML file in the working directory.
        overrides: Overrides `key=value`, or YAML files of keys.
        address: Address of the cluster's dashboard, such as `http://head:8265`.
        working_dir: Directory that is sent with the job.
        env: Environment variables of the job and of all its workers.
        runtime_env: YAML file of Ray's runtime environment; the other attributes override it.
    """

    config: Path
    overrides: Sequence[str]
    address: str
    working_dir: Path = Path()
    env: Mapping[str, str] = field(default_factory=dict)
    runtime_env: Path | None = None


def submit(submission: Submission, wait: bool = True) -> int:
    """Submit a run, print how to follow it and how to stop it, and show its output.

    Args:
        submission: Run to submit.
        wait: Whether to wait until the job ends.

    Returns:
        The exit code of the job; 0 without waiting.

    Raises:
        UserError: The config is wrong or outside the working directory, or the cluster cannot be reached or refuses
            access.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    environment = runtime_environment(submission)
    command = entrypoint(submission)
    check_lasts(load_config(submission.config, list(submission.overrides)).storage_path)
    os.environ.setdefault("RAY_RUNTIME_ENV_LOG_TO_DRIVER_ENABLED", "0")
    quieten_packing()
    try:
        client = JobSubmissionClient(submission.address)
        job = client.submit_job(entrypoint=command, runtime_env=environment)
    except AuthenticationError as error:
        raise ResourceError(
            f"{submission.address}: the cluster asks for a token and refuses ours ({_first_line(error)}); set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or put its token into ~/.ray/auth_token"
        ) from None
    except (ConnectionError, RequestException, RuntimeError, ValueError) as error:
        raise ResourceError(
            f"{submission.address}: the job could not be submitted ({_first_line(error)}); give the address of the "
            "head node's dashboard, such as http://HEAD:8265"
        ) from None
    address = shlex.quote(submission.address)
    console.print(
        f"job      {job}\nlook     ray job logs --follow --address {address} {job}\n"
        f"stop     ray job stop --address {address} {job}",
        highlight=False,
        soft_wrap=True,
    )
    return _follow(client, job) if wait else 0


def entrypoint(submission: Submission) -> str:
    """Return the command that the job runs, with paths of configs relative to the working directory.

    Raises:
        ConfigError: A config is outside the working directory, so the job would not have it.
    """
    working_dir = submission.working_dir.resolve()
    overrides = [_inside(Path(o), working_dir) if is_layer(o) else o for o in submission.overrides]
    return shlex.join(["python", "-m", "pocl_ray", "run", _inside(submission.config, working_dir), *overrides])


def _inside(config: Path, working_dir: Path) -> str:
    """The path of a config relative to the working directory."""
    if not config.is_file() and shipped_config(config.as_posix()) is not None:
        return config.as_posix()  # it comes with the package, which is on the nodes
    if not config.resolve().is_relative_to(working_dir):
        raise ConfigError(
            f"{config}: lies outside of the working directory {working_dir}, which alone travels with the "
            "job; give a --working-dir that holds it"
        )
    return str(config.resolve().relative_to(working_dir))


def runtime_environment(submission: Submission) -> dict[str, Any]:
    """Return Ray's runtime environment of the job.

    Raises:
        ConfigError: The directory is missing, or the file of the runtime environment is not a mapping.
    """
    if not submission.working_dir.is_dir():
        raise ConfigError(f"--working-dir {submission.working_dir}: no such directory")
    given = _read_runtime_env(submission.runtime_env) if submission.runtime_env is not None else {}
    return {
        **given,
        "working_dir": str(submission.working_dir.resolve()),
        "excludes": [*EXCLUDES, *given.get("excludes", [])],
        "env_vars": {**given.get("env_vars", {}), **submission.env},
    }


def parse_env(pairs: Sequence[str]) -> dict[str, str]:
    """Return `KEY=VALUE` pairs as a mapping; a KEY alone takes its value from this process's environment.

    Raises:
        ConfigError: A KEY alone is not set in this environment.
    """
    env = {}
    for pair in pairs:
        key, is_given, value = pair.partition("=")
        if not is_given and key not in os.environ:
            raise ConfigError(f"--env {pair}: is not set here; give KEY=VALUE")
        env[key] = value if is_given else os.environ[key]
    return env


def _read_runtime_env(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--runtime-env {path}: cannot be read ({_first_line(error)})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--runtime-env {path}: a mapping is expected, such as cluster/runtime_env.yaml")
    return content


def _follow(client: Any, job: str) -> int:
    """Print the job's output until it ends, and return its exit code."""
    num_shown = 0
    for _ in range(MAX_RECONNECTS):
        try:
            num_shown = asyncio.run(_show(client, job, num_shown))
            if client.get_job_status(job).is_terminal():
                return _exit_code(client.get_job_info(job))
        except KeyboardInterrupt:
            console.print("[dim]no longer following; the job goes on[/]")
            return 0
        except (ConnectionError, RequestException, RuntimeError, OSError) as error:
            console.print(f"[yellow]note:[/] lost the connection ({_first_line(error)}); trying again")
        time.sleep(RECONNECT_S)
    raise ResourceError(f"job {job}: the cluster no longer answers; the job may go on there")


async def _show(client: Any, job: str, num_shown: int) -> int:
    """Print what the job has written since the first `num_shown` characters, and return how many there are now."""
    position = 0
    async for chunk in client.tail_job_logs(job):
        fresh = chunk[max(0, num_shown - position) :]
        position += len(chunk)
        sys.stdout.write(fresh)
        sys.stdout.flush()
    return max(position, num_shown)


def _exit_code(info: Any) -> int:
    """The exit code that the command would return locally; a job that was stopped or lost counts as failed."""
    if info.status == "SUCCEEDED":
        return 0
    if info.driver_exit_code is None or info.driver_exit_code <= 0:
        console.print(f"job {info.submission_id}: {info.status.lower()} {info.message or ''}", highlight=False)
        return 1
    return int(info.driver_exit_code)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
