"""The command `pocl-ray doctor`: what this machine has and lacks for a run, each with a remedy.

Every check returns one finding. Those of a config read it and reuse the checks that a run makes first.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Literal

import psutil
import pyarrow as pa
import pyarrow.fs as pafs
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.markup import escape

from pocl_ray.config import Config
from pocl_ray.errors import UserError
from pocl_ray.run_directory.disk import GIB
from pocl_ray.run_directory.paths import is_remote
from pocl_ray.run_directory.storage import check_bucket, reason, resolve, write_whole

State = Literal["ok", "note", "stop"]

DISTRIBUTION = "pocl-ray"
CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
FEWEST_FILES, FEW_FILES = 1024, 65_536
LEAST_FREE_GIB, LITTLE_FREE_GIB = 1.0, 10.0
SHM_SHARE = 0.3  # of memory, which Ray gives its object store
HUB_S = 5.0
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: Name of what was looked at.
        state: `ok`; `note`, for what may matter; or `stop`, for what would stop a run.
        what: Description of it.
        remedy: Advice; empty if all is well.
    """

    name: str
    state: State
    what: str
    remedy: str = ""


def examine(config: Config | None) -> Iterator[Finding]:
    """Yield the findings of all checks.

    Args:
        config: Config of a run; without it, checks that need one are left out.
    """
    storage = "." if config is None else config.storage_path
    checks: list[Callable[[], Finding]] = [
        python,
        packages,
        pins,
        lambda: gpus(None if config is None else config.scaling.use_gpu),
        memory,
        lambda: disk(storage),
        shared_memory,
        file_limit,
        lambda: ray_place(os.environ.get("RAY_ADDRESS")),
        token,
    ]
    if config is not None:
        checks += [lambda: storage_writable(storage), lambda: inputs(config), lambda: compiler(config)]
        if config.hub is not None:
            checks.append(partial(target, config.hub.repo))
    checks += [hub, proxies]
    for check in checks:
        yield check()


def doctor(config: Config | None) -> bool:
    """Print all findings, and return whether a run can start."""
    console, can_run = Console(highlight=False, soft_wrap=True), True
    colours = {"ok": "green", "note": "yellow", "stop": "bold red"}
    for one in examine(config):
        can_run = can_run and one.state != "stop"
        remedy = f"; {one.remedy}" if one.remedy else ""
        console.print(f"[{colours[one.state]}]{one.state:<4}[/]  {one.name:<13} {escape(one.what + remedy)}")
    console.print("a run can start" if can_run else "a run would stop at the lines marked stop")
    return can_run


def python() -> Finding:
    """Look at the version of Python."""
    here, promised = platform.python_version(), metadata(DISTRIBUTION)["Requires-Python"]
    if here in SpecifierSet(promised):
        return Finding("Python", "ok", f"{here}, {sys.executable}")
    return Finding("Python", "stop", here, f"make an environment with Python {promised}")


def packages() -> Finding:
    """Compare installed packages with the versions that the project needs."""
    try:
        needed = [Requirement(text) for text in requires(DISTRIBUTION) or ()]
    except PackageNotFoundError:
        return Finding("packages", "note", "pocl-ray is not installed, only imported", "run `make install`")
    wrong = []
    for need in needed:
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        there = installed(need.name)
        if there is None or not need.specifier.contains(there, prereleases=True):
            wrong.append(f"{need.name} {there or 'is missing'} (needed: {need.specifier})")
    if wrong:
        return Finding("packages", "stop", ", ".join(wrong), "run `make install`, or pip install pocl-ray again")
    return Finding(
        "packages", "ok", f"ray {version('ray')}, torch {version('torch')}, deepspeed {version('deepspeed')}"
    )


def installed(name: str) -> str | None:
    """Return the version of an installed package; None if it is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def pins() -> Finding:
    """Compare installed packages with constraints.txt, if the project is a checkout."""
    if not CONSTRAINTS.is_file():
        return Finding("constraints", "ok", "none: installed from a wheel, whose versions are those of `packages`")
    lines = (line.partition("#")[0].strip() for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines())
    other = []
    for pin in (Requirement(line) for line in lines if line):
        there = None if pin.marker is not None and not pin.marker.evaluate() else installed(pin.name)
        if there is not None and not pin.specifier.contains(there.partition("+")[0], prereleases=True):
            other.append(f"{pin.name} {there} (pinned: {pin.specifier})")
    if other:
        return Finding("constraints", "note", ", ".join(other), "not the tested versions; run `make install`")
    return Finding("constraints", "ok", "all installed packages have their pinned versions")


def gpus(wanted: bool | None) -> Finding:
    """Look for GPUs that torch can use, and for NCCL.

    Args:
        wanted: `scaling.use_gpu`.
    """
    import torch

    if torch.cuda.is_available():
        names = ", ".join(
            f"{torch.cuda.get_device_name(i)} ({torch.cuda.get_device_properties(i).total_memory / GIB:.0f} GiB)"
            for i in range(torch.cuda.device_count())
        )
        if torch.distributed.is_nccl_available():
            return Finding("GPUs", "ok", f"{names}; NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")  # type: ignore[no-untyped-call]
        return Finding("GPUs", "stop", f"{names}, and torch without NCCL", "install torch's CUDA build from PyPI")
    has_device = Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None
    if has_device:
        built = f"torch {torch.__version__}" + ("" if torch.version.cuda else ", built for CPUs,")
        remedy = "install torch's CUDA build, and a driver as new as it needs"
        return Finding("GPUs", "stop" if wanted else "note", f"a GPU is here, and {built} cannot use it", remedy)
    here = os.environ.get("RAY_ADDRESS") is None
    if wanted and here:
        return Finding("GPUs", "stop", "none, and scaling.use_gpu is true", "set it to null, or run on a cluster")
    return Finding("GPUs", "ok", "none: a run here uses CPUs")


def memory() -> Finding:
    """Look at cores and memory."""
    free, total = psutil.virtual_memory().available / GIB, psutil.virtual_memory().total / GIB
    what = f"{os.cpu_count()} cores, {free:.1f} of {total:.1f} GiB of memory are free"
    if free < 2:
        return Finding("memory", "note", what, "Ray kills processes as memory runs out: end other programs first")
    return Finding("memory", "ok", what)


def disk(storage: str) -> Finding:
    """Look at the free space where runs are stored."""
    if is_remote(storage):
        return Finding("disk", "ok", f"{storage} is not on this machine")
    path = Path(storage.removeprefix("file://")).expanduser().absolute()
    place = next(one for one in (path, *path.parents) if one.exists())
    free = shutil.disk_usage(place).free / GIB
    state: State = "stop" if free < LEAST_FREE_GIB else "note" if free < LITTLE_FREE_GIB else "ok"
    remedy = "" if state == "ok" else "make room, or set storage_path to a larger disk"
    return Finding("disk", state, f"{free:.1f} GiB free at {place}", remedy)


def shared_memory() -> Finding:
    """Look at /dev/shm, where Ray keeps its objects."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return Finding("/dev/shm", "ok", "this system has none, and Ray uses files")
    free, wanted = shutil.disk_usage(place).free / GIB, SHM_SHARE * psutil.virtual_memory().total / GIB
    if free < wanted:
        remedy = "start the container with --shm-size, or Ray keeps its objects in slower files"
        return Finding("/dev/shm", "note", f"{free:.1f} GiB free, and Ray would take up to {wanted:.1f}", remedy)
    return Finding("/dev/shm", "ok", f"{free:.1f} GiB free")


def file_limit() -> Finding:
    """Look at the number of files that a process may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = sys.maxsize if hard == resource.RLIM_INFINITY else hard
    if most < FEWEST_FILES:
        return Finding("open files", "stop", f"at most {most}", f"raise the limit: ulimit -n {FEW_FILES}")
    if min(soft, most) < FEW_FILES and most < FEW_FILES:
        return Finding("open files", "note", f"at most {most}", f"many actors need more: ulimit -n {FEW_FILES}")
    return Finding("open files", "ok", f"{soft}, at most {'any number' if most == sys.maxsize else most}")


def ray_place(address: str | None) -> Finding:
    """Look at the cluster that `RAY_ADDRESS` names, or at the place for the files of one on this machine."""
    from pocl_ray.ray_cluster.session import check_address, check_places

    try:
        if address:
            check_address(address)
            return Finding("Ray", "ok", f"a process listens at RAY_ADDRESS {address}")
        check_places()
    except UserError as error:
        return Finding("Ray", "stop", str(error))
    return Finding("Ray", "ok", "RAY_ADDRESS is not set: a run starts its own cluster on this machine")


def token() -> Finding:
    """Look for the token of a cluster."""
    mode = os.environ.get("RAY_AUTH_MODE", "")
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named) if named else Path.home() / ".ray" / "auth_token"
    if os.environ.get("RAY_AUTH_TOKEN"):
        return Finding("Ray token", "ok", "RAY_AUTH_TOKEN is set")
    if named and not file.is_file():
        return Finding("Ray token", "stop", f"RAY_AUTH_TOKEN_PATH {named}: no such file", "correct or unset it")
    if file.is_file():
        return Finding("Ray token", "ok", f"in {file}")
    if mode == "token" and os.environ.get("RAY_ADDRESS"):
        remedy = "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the one that the cluster was started with"
        return Finding("Ray token", "stop", "RAY_AUTH_MODE is token, and there is none", remedy)
    return Finding("Ray token", "ok", "none, and none is needed here: Ray makes one")


def storage_writable(storage: str) -> Finding:
    """Write a file where runs are stored, and delete it."""
    name = f".pocl-ray-doctor-{os.getpid()}"
    try:
        if is_remote(storage):
            check_bucket(storage)
            filesystem, path = resolve(storage)
            target = f"{path.rstrip('/')}/{name}"
            write_whole(filesystem, target, b"doctor")
            filesystem.delete_file(target)
        else:
            path_here = Path(storage.removeprefix("file://")).expanduser().absolute()
            place = next(one for one in (path_here, *path_here.parents) if one.exists())
            with tempfile.TemporaryDirectory(prefix=name, dir=place) as folder:
                write_whole(pafs.LocalFileSystem(), f"{folder}/file", b"doctor")
    except (UserError, OSError, pa.ArrowException) as error:
        remedy = "" if isinstance(error, UserError) else "set storage_path to a place that can be written"
        return Finding("storage", "stop", f"{storage}: cannot be written ({reason(error)})", remedy)
    return Finding("storage", "ok", f"{storage} can be written")


def inputs(config: Config) -> Finding:
    """Make the checks of files, models, names and templates that a run makes first."""
    from pocl_ray.preflight import check_inputs

    try:
        check_inputs(config)
    except UserError as error:
        return Finding("inputs", "stop", str(error))
    return Finding("inputs", "ok", "rows and models are there, and names and templates are known")


def target(repo: str) -> Finding:
    """Look at the name of the repository that the run pushes to, and for a token."""
    from pocl_ray.hub.push import check_repo, check_token

    try:
        check_repo(repo, "hub.repo")
        check_token("hub")
    except UserError as error:
        return Finding("repository", "stop", str(error))
    return Finding("repository", "ok", f"{repo}; whether the token may write there is seen at the push")


def compiler(config: Config) -> Finding:
    """Look for the compiler that DeepSpeed needs for an optimizer in host memory."""
    if config.train.offload_optimizer == "none":
        return Finding("compiler", "ok", "not needed: train.offload_optimizer is none")
    missing = [name for name in ("g++", "ninja") if shutil.which(name) is None]
    if missing:
        remedy = "install it, or set train.offload_optimizer to none"
        return Finding("compiler", "stop", f"train.offload_optimizer cpu needs {' and '.join(missing)}", remedy)
    return Finding("compiler", "ok", "g++ and ninja are here")


def hub() -> Finding:
    """Ask the Hugging Face Hub for a sign of life."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return Finding("Hub", "note", "HF_HUB_OFFLINE is set", "only models and rows that are here can be used")
    try:
        answer = get_session().get(f"{constants.ENDPOINT}/api/models?limit=1", timeout=HUB_S)
    except Exception as error:  # the session's own library of HTTP is not promised
        remedy = "use directories and files; or look at network and proxy, or set HF_ENDPOINT to a mirror"
        return Finding("Hub", "note", f"{constants.ENDPOINT} cannot be reached ({type(error).__name__})", remedy)
    if answer.status_code >= 400:
        return Finding("Hub", "note", f"{constants.ENDPOINT} answers {answer.status_code}", "look at HF_TOKEN")
    return Finding("Hub", "ok", f"{constants.ENDPOINT} answers")


def proxies() -> Finding:
    """Look at the variables of proxies, which also catch Ray's own connections unless they are excepted."""
    is_set = [name for name in PROXIES if _variable(name)]
    if not is_set:
        return Finding("proxy", "ok", "no proxy variables are set")
    excepted = {part.strip() for part in _variable("NO_PROXY").split(",")}
    missing = [] if "*" in excepted else _missing(excepted, ("localhost", "127.0.0.1"))
    if missing:
        remedy = f"add {','.join(missing)} to NO_PROXY, or Ray's processes may not reach one another"
        return Finding("proxy", "note", f"{', '.join(is_set)} set", remedy)
    return Finding("proxy", "ok", f"{', '.join(is_set)} set, and this machine is in NO_PROXY")


def _variable(name: str) -> str:
    return os.environ.get(name) or os.environ.get(name.lower(), "")


def _missing(there: Iterable[str], wanted: Iterable[str]) -> list[str]:
    return [one for one in wanted if one not in there]
