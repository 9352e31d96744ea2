"""Installs pinned packages with pip and says what it does meanwhile; a failure is one line with what to do.

    python scripts/pip_install.py LOG PIP_ARGUMENT...

`make install` runs it with the interpreter of the environment that is being made, so it needs the standard library
alone. All that pip says goes to LOG.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

PIP = ("-m", "pip", "install", "--disable-pip-version-check", "--no-input", "-c", "constraints.txt")

# The causes in the order in which they are looked for: a pin that is not found since the registry cannot be reached
# also reads "No matching distribution found".
_UNREACHABLE = re.compile(
    r"NewConnectionError|Temporary failure in name resolution|NameResolutionError|ConnectTimeoutError|ReadTimeoutError|"
    r"ProxyError|SSLError|CERTIFICATE_VERIFY_FAILED|Connection refused|Could not fetch URL"
)
_DISK = re.compile(r"No space left on device|Disk quota exceeded")
_DENIED = re.compile(r"Permission denied: '([^']+)'")
_OTHER_PYTHON = re.compile(r"Package '([^']+)' requires a different Python: (\S+) not in '([^']+)'")
_CONFLICT = re.compile(r"ResolutionImpossible|conflicting dependencies")
_PIN = re.compile(r"The user requested \(constraint\) (\S+)")
_NOT_FOUND = re.compile(r"No matching distribution found for (\S+)")
_NOT_BUILT = re.compile(
    r"Failed (?:building wheel for|to build) '?([\w.-]+)|Getting requirements to build wheel did not run"
)
_HASH = re.compile(r"THESE PACKAGES DO NOT MATCH THE HASHES|IncompleteRead|BadZipFile|incomplete-download")


_DOING = re.compile(r"^(Collecting|Downloading|Building|Installing|Using cached|Preparing) ?(.*)$", re.MULTILINE)
SAY_EVERY_S = 15.0


def doing(log: str) -> str:
    """Return what pip does now, in a few words, from all that it said."""
    steps = _DOING.findall(log.replace("\r", "\n").replace("  Downloading", "Downloading"))
    if not steps:
        return "asking the registry"
    verb, what = steps[-1]
    if what.startswith("collected packages"):
        return f"unpacking {what.count(',') + 1} packages"
    name = what.split(" (from")[0].split(" (")[0].rsplit("/", 1)[-1]
    size = re.search(r"\(([\d.]+ [kMG]B)\)", what)
    return f"{verb.lower()} {name}{f' ({size[1]})' if size else ''}"


def run(command: Sequence[str], log: Path) -> int:
    """Run pip to its end, print every `SAY_EVERY_S` seconds what it does, and return its exit code."""
    started = said = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while True:
            try:
                return process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                pass
            if time.monotonic() - said >= SAY_EVERY_S:
                said = time.monotonic()
                now = doing(log.read_text(encoding="utf-8", errors="replace"))
                print(f"  {said - started:.0f} s: {now}", flush=True)


def explain(log: str, python: str) -> str:
    """Return what failed and what to do, in one line.

    Args:
        log: All that pip said.
        python: Version of the interpreter, such as `3.11`.
    """
    if _DISK.search(log):
        return "the disk is full: make room (the packages take about 8 GB), or set TMPDIR to a folder on a larger disk"
    if found := _DENIED.search(log):
        return f"{found[1]} may not be written: run `make clean`, and `make install` as the owner of this folder"
    if found := _OTHER_PYTHON.search(log):
        return f"{found[1]} needs Python {found[3]}, and this is {found[2]}: make install PYTHON=/path/to/another"
    if _UNREACHABLE.search(log):
        return (
            "the package registry cannot be reached: check network and proxy (HTTPS_PROXY, PIP_INDEX_URL, PIP_CERT), "
            "then run `make install` again"
        )
    if _HASH.search(log):
        return "a download arrived damaged: run `pip cache purge`, then `make install` again"
    if _CONFLICT.search(log):
        pins = ", ".join(dict.fromkeys(_PIN.findall(log))) or "its pins"
        return (
            f"constraints.txt pins what Python {python} or the registry in use does not have ({pins}): use another "
            "promised Python (make install PYTHON=...), or PyPI itself as registry (PIP_INDEX_URL)"
        )
    if found := _NOT_FOUND.search(log):
        return (
            f"the registry has no {found[1]} for Python {python} on this machine: use PyPI itself as registry "
            "(PIP_INDEX_URL), or another promised Python (make install PYTHON=...)"
        )
    if found := _NOT_BUILT.search(log):
        name = found[1] or "a package"
        return (
            f"{name} has no wheel for this machine and could not be built: install a C++ compiler (g++) and try again"
        )
    errors = [line.strip() for line in log.splitlines() if line.startswith(("ERROR:", "error:"))]
    return f"{errors[0] if errors else 'pip ended without saying why'}; then run `make install` again"


def main(arguments: Sequence[str]) -> int:
    """Install, and return the exit code: 0, or 2 where pip failed."""
    log, wanted = Path(arguments[0]), arguments[1:]
    code = run([sys.executable, *PIP, *wanted], log)
    if code == 0:
        return 0
    said = log.read_text(encoding="utf-8", errors="replace")
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    print(f"make install failed: {explain(said, python)} (all that pip said: {log})", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
