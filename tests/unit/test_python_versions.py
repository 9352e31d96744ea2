"""The Python versions that the project promises: said alike everywhere, and each of them can have every pin.

That all pins hold together is read from the packages that are installed here, for every version. That each has a wheel
for it is asked of the registry, which takes a minute a version and is left to `make test-versions`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("3.11", "3.12", "3.13", "3.14")
# These publish no wheel; they are pure Python, so that a wheel built here serves every version.
WITHOUT_WHEEL = ("antlr4-python3-runtime", "deepspeed", "rouge-score", "sqlitedict", "word2number")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def environment(version: str) -> dict[str, str]:
    return {"python_version": version, "python_full_version": f"{version}.0", "sys_platform": "linux"}


def pins_of(version: str) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in text_of("constraints.txt").splitlines())
    pins = [Requirement(line) for line in lines if line]
    return [pin for pin in pins if pin.marker is None or pin.marker.evaluate(environment(version))]


def wanted() -> list[str]:
    extras = PROJECT["project"]["optional-dependencies"]
    return [*PROJECT["project"]["dependencies"], *extras["dev"], *extras["s3"], *extras["docs"]]


def test_pyproject_promises_these_versions_and_no_others() -> None:
    promised = SpecifierSet(PROJECT["project"]["requires-python"])
    tried = [f"3.{minor}" for minor in range(8, 20)]
    assert tuple(version for version in tried if promised.contains(f"{version}.0")) == VERSIONS


def test_the_linter_and_the_type_checker_aim_at_the_oldest() -> None:
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + VERSIONS[0].replace(".", "")
    assert PROJECT["tool"]["mypy"]["python_version"] == VERSIONS[0]


def test_the_makefile_accepts_these_versions() -> None:
    found = re.search(r"^VERSIONS := (.*)$", text_of("Makefile"), re.MULTILINE)
    assert found
    assert tuple(found[1].split()) == VERSIONS


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_the_documents_name_the_oldest_and_the_newest(name: str) -> None:
    assert f"Python {VERSIONS[0]} to {VERSIONS[-1]}" in text_of(name)


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "docs/methods.md", "docs/integrations.md", "Makefile"]
)
def test_no_document_speaks_of_an_older_python(name: str) -> None:
    assert not re.findall(r"[Pp]ython ?3\.(?:[0-9]|10)\b", text_of(name))


@pytest.mark.parametrize("version", VERSIONS)
def test_every_package_is_pinned_once_for_each_version(version: str) -> None:
    names = [canonicalize_name(pin.name) for pin in pins_of(version)]
    assert not sorted({name for name in names if names.count(name) > 1})
    for text in wanted():
        need = Requirement(text)
        if need.marker is None or need.marker.evaluate(environment(version)):
            assert canonicalize_name(need.name) in names, f"{need.name} has no pin for Python {version}"


@pytest.mark.parametrize("version", VERSIONS)
def test_every_pin_is_one_that_pyproject_allows(version: str) -> None:
    pinned = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins_of(version)}
    for text in wanted():
        need = Requirement(text)
        if need.marker is None or need.marker.evaluate(environment(version)):
            assert need.specifier.contains(pinned[canonicalize_name(need.name)]), text


@pytest.mark.parametrize("version", VERSIONS)
def test_every_pin_is_one_that_the_other_packages_allow(version: str) -> None:
    """Of each package that is installed as pinned: what it needs on that Python, its extras in use included."""
    pinned = {canonicalize_name(pin.name): Version(next(iter(pin.specifier)).version) for pin in pins_of(version)}
    todo, seen = [("pyproject.toml", text, frozenset({""})) for text in wanted()], set()
    while todo:
        source, text, extras = todo.pop()
        need = Requirement(text)
        name, more = canonicalize_name(need.name), frozenset({"", *need.extras})
        places = [{**environment(version), "extra": extra} for extra in extras]
        if need.marker is not None and not any(need.marker.evaluate(place) for place in places):
            continue
        assert name in pinned, f"{source} needs {text}, which has no pin for Python {version}"
        assert need.specifier.contains(pinned[name], prereleases=True), f"{source} needs {text}, not {pinned[name]}"
        if (name, more) not in seen:
            seen.add((name, more))
            todo += [(name, each, more) for each in needs_of(name, pinned[name])]
    assert len(seen) > 0.5 * len(pinned), "what is installed here is not what is pinned"


def needs_of(name: str, version: Version) -> list[str]:
    """What this version of a package needs, if it is installed; the resolution for each Python looks at the others."""
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return []
    is_same = Version(Version(found.version).public) == version  # without `+cpu`
    return (found.requires or []) if is_same else []


def test_no_marker_speaks_of_a_python_that_is_not_promised() -> None:
    markers = re.findall(
        r"python_version *(==|[<>]=?) *['\"]([0-9.]+)['\"]", text_of("constraints.txt") + text_of("pyproject.toml")
    )
    assert {version for _, version in markers} <= set(VERSIONS[1:]), markers


@cache
def registry_error() -> str:
    """Why the registry cannot be asked; empty where it can."""
    command = [sys.executable, "-m", "pip", "--retries", "0", "--timeout", "10", "index", "versions", "six"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return "it does not answer"
    return "" if asked.returncode == 0 else (asked.stderr.strip().splitlines() or ["pip says nothing"])[-1]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheels of what is published as source only."""
    if error := registry_error():
        pytest.skip(f"the package registry cannot be reached: {error}")
    folder = tmp_path_factory.mktemp("wheels")
    pins = [str(pin) for pin in pins_of(VERSIONS[0]) if canonicalize_name(pin.name) in WITHOUT_WHEEL]
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), *pins]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(os.environ.get("POCL_VERSIONS") != "all", reason="a minute each; `make test-versions` does it")
@pytest.mark.parametrize("version", VERSIONS)
def test_each_version_can_have_every_pin(version: str, wheels: Path, tmp_path: Path) -> None:
    """pip resolves the whole environment for a Python that need not be on this machine, and installs nothing."""
    constraints = tmp_path / "constraints.txt"  # without markers, which pip would ask of the Python that runs it
    lines = [f"{pin.name}{pin.specifier}\n" for pin in pins_of(version)]
    constraints.write_text("".join(lines), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--ignore-installed",
        "-q",
        "--only-binary",
        ":all:",
    ]
    command += ["--use-feature=fast-deps", "--python-version", version, "--target", str(tmp_path / "target")]
    command += ["--find-links", str(wheels), "-c", str(constraints), f"{ROOT}[dev,s3,docs]"]
    resolved = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=590)
    assert resolved.returncode == 0, resolved.stderr[-3000:]


# What pip says, by cause, and what of it stands in the one line.
PIP_SAYS = {
    "conflict": (
        "ERROR: Cannot install pocl-ray and pocl-ray[dev,s3]==0.1.0 because these package versions have conflicting "
        "dependencies.\n\nThe conflict is caused by:\n    optuna 5.0.0 depends on sqlalchemy>=1.4.2\n"
        "    The user requested (constraint) sqlalchemy==2.1.9\n\nERROR: ResolutionImpossible: for help visit x",
        ("sqlalchemy==2.1.9", "Python 3.12", "PYTHON="),
    ),
    "unreachable": (
        "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(': Failed to establish')'\n"
        "ERROR: Could not find a version that satisfies the requirement ray==2.60.0 (from versions: none)\n"
        "ERROR: No matching distribution found for ray==2.60.0",
        ("registry cannot be reached", "HTTPS_PROXY"),
    ),
    "no such wheel": ("ERROR: No matching distribution found for torch==2.13.0", ("torch==2.13.0", "PIP_INDEX_URL")),
    "disk": (
        "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
        ("disk is full",),
    ),
    "another Python": (
        "ERROR: Package 'pocl-ray' requires a different Python: 3.10.13 not in '<3.15,>=3.11'",
        ("pocl-ray needs Python <3.15,>=3.11", "3.10.13"),
    ),
    "no compiler": (
        "ERROR: Failed building wheel for deepspeed\nERROR: Failed to build deepspeed",
        ("deepspeed", "g++"),
    ),
    "permission": (
        "ERROR: Could not install packages due to an OSError: [Errno 13] Permission denied: '/opt/x'",
        ("/opt/x", "owner"),
    ),
    "anything else": ("WARNING: hm\nERROR: something new\nERROR: and more", ("ERROR: something new", "make install")),
    "nothing at all": ("", ("without saying why",)),
}


def pip_install() -> Any:
    spec = importlib.util.spec_from_file_location("pip_install", ROOT / "scripts" / "pip_install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("cause", PIP_SAYS)
def test_a_failed_install_says_in_one_line_what_failed_and_what_to_do(cause: str) -> None:
    log, parts = PIP_SAYS[cause]
    line = pip_install().explain(log, "3.12")
    assert "\n" not in line
    for part in parts:
        assert part in line


def test_a_failed_install_ends_with_that_line_alone(tmp_path: Path) -> None:
    log = tmp_path / "install.log"
    command = [
        sys.executable,
        str(ROOT / "scripts" / "pip_install.py"),
        str(log),
        "--no-index",
        "no-such-package-of-ours",
    ]
    failed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert failed.returncode == 2
    assert not failed.stdout
    assert len(failed.stderr.splitlines()) == 1
    assert failed.stderr.startswith("make install failed: the registry has no no-such-package-of-ours")
    assert str(log) in failed.stderr
    assert "No matching distribution" in log.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("log", "says"),
    [
        ("", "asking the registry"),
        ("Collecting ray==2.60.0 (from -c constraints.txt (line 3))\n", "collecting ray==2.60.0"),
        (
            "Collecting torch\n  Downloading https://host/torch-2.13.0-cp311.whl.metadata (28 kB)\n"
            "Downloading https://host/torch-2.13.0-cp311.whl (858.3 MB)\n",
            "downloading torch-2.13.0-cp311.whl (858.3 MB)",
        ),
        ("Collecting a\nInstalling collected packages: a, b, c\n", "unpacking 3 packages"),
    ],
)
def test_an_install_says_what_it_does_meanwhile(log: str, says: str) -> None:
    assert pip_install().doing(log) == says


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not here")
def test_a_run_needs_no_packages_of_the_tests() -> None:
    def recipe(target: str) -> str:
        command = ["make", "--dry-run", "--always-make", "VENV=none", target]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout

    quickstart, tests = recipe("quickstart"), recipe("test")
    assert "-e .\n" in quickstart and "[dev" not in quickstart
    assert "-e .\n" in tests and "-e '.[dev,s3]'" in tests
