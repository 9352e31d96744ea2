"""The documentation site: every page has its place in the navigation, and it builds without a warning."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
GENERATED = {"cli.md", "start/notebook.md"}


def pages(nav: Any) -> Iterator[str]:
    """Every page of the navigation."""
    if isinstance(nav, str):
        yield nav
    for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from pages(part)


def test_every_page_is_in_the_navigation_once() -> None:
    named = sorted(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert named == sorted(there | GENERATED)


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="mkdocs is not installed (extra docs): `make docs` builds it")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "pocl-ray doctor" in (tmp_path / "cli.html").read_text(encoding="utf-8")
    assert "rank_rows" in (tmp_path / "api.html").read_text(encoding="utf-8")
    assert "run_until" in (tmp_path / "start" / "notebook.html").read_text(encoding="utf-8")
    assert (tmp_path / "start" / "quickstart.ipynb").read_bytes() == NOTEBOOK.read_bytes()
    if browser := next(filter(None, map(shutil.which, BROWSERS)), None):
        check_keyboard_and_names(browser, tmp_path / "methods.html")


def check_keyboard_and_names(browser: str, page: Path) -> None:
    """Check what assets/site.js mends in the theme: tables scroll by keyboard, and the search dialog has a name."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    shown = subprocess.run([browser, *options, page.as_uri()], capture_output=True, text=True, timeout=100).stdout
    regions = re.findall(r'<div class="md-typeset__scrollwrap"[^>]*>', shown)
    assert regions and all('tabindex="0"' in region for region in regions)
    (dialog,) = re.findall(r'<div class="md-search"[^>]*>', shown)
    assert 'aria-label="Search"' in dialog
