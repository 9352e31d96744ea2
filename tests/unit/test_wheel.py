"""The wheel: it holds what a run reads from the package, and works in an environment that has the packages it needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pocl_ray", "configs", "pyproject.toml", "README.md", "LICENSE")
DATA = (".yaml", ".safetensors", ".json", ".j2", ".jinja", ".css", ".js", ".typed")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the project, so that nothing is left in the checkout."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(target), "."]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=250)
    assert built.returncode == 0, built.stderr[-3000:]
    (path,) = target.glob("pocl_ray-*.whl")
    return path


def test_the_wheel_holds_every_file_that_the_package_reads(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    package = ROOT / "pocl_ray"
    data = [path for path in package.rglob("*") if path.suffix in DATA and path.is_file()]
    data += [package / "configs" / path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")]
    wanted = {path.relative_to(ROOT).as_posix() for path in [*data, *package.rglob("*.py")]}
    assert len(data) > 20 and "pocl_ray/configs/quickstart.yaml" in wanted
    assert wanted - held == set(), "name them in [tool.setuptools.package-data]"
    assert not [name for name in held if name.startswith(("tests", "benchmarks", "configs"))]


def command_of(environment: Path, wheel: Path, *options: str) -> Path:
    """Make an environment, install the wheel, and return its `pocl-ray`."""
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", *options, str(wheel)]
    bare = {
        name: value for name, value in os.environ.items() if name != "PYTHONPATH"
    }  # pip takes what lies there as installed
    done = subprocess.run(install, env=bare, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr[-3000:]
    return environment / "bin" / "pocl-ray"


def says(command: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command in an empty folder."""
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([str(command), *arguments], cwd=folder, env=bare, capture_output=True, text=True, timeout=250)


def check(command: Path, folder: Path) -> None:
    """Check that the command finds configs and the shipped teacher by name."""
    planned = says(command, folder, "plan", "quickstart")
    assert planned.returncode == 0, planned.stderr
    assert "582 optimizer steps" in planned.stdout and "256 bytes a response token" in planned.stdout
    wrong = says(command, folder, "plan", "quickstrat")
    assert wrong.returncode == 2
    assert "did you mean quickstart?" in wrong.stderr and "smollm2" in wrong.stderr
    layered = says(command, folder, "plan", "quickstart", "methods/reverse_kl", "configs/methods/plain.yaml")
    assert layered.returncode == 0, layered.stderr
    assert list(folder.iterdir()) == []


def test_an_installed_wheel_finds_configs_by_name(wheel: Path, tmp_path: Path) -> None:
    """The packages that it needs are those of this environment, by a .pth file: to install them takes minutes."""
    command = command_of(tmp_path / "environment", wheel, "--no-deps")
    (site,) = (tmp_path / "environment" / "lib").glob("python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    check(command, tmp_path / "empty")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(os.environ.get("POCL_VERSIONS") != "all", reason="minutes; `make test-versions` does it")
def test_a_wheel_with_all_it_needs_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    command = command_of(tmp_path / "environment", wheel, "-c", str(ROOT / "constraints.txt"))
    (tmp_path / "empty").mkdir()
    check(command, tmp_path / "empty")
