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
    check_that_nothing_is_loaded_from_elsewhere(tmp_path)
    if browser := next(filter(None, map(shutil.which, BROWSERS)), None):
        check_keyboard_and_names(browser, tmp_path / "methods.html")
        check_search_from_a_folder(browser, tmp_path / "guides" / "cluster.html")


def check_that_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    """Scripts, styles, pictures and frames of every page are files of the site."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        links = re.findall(r'<link\b[^>]*\brel="?(?:stylesheet|icon|preload|preconnect)[^>]*>', text)
        loading = [*links, *re.findall(r"<(?:script|img|iframe|source)\b[^>]*>", text)]
        sources = [source for tag in loading for source in re.findall(r'\b(?:src|href)="?([^" >]+)', tag)]
        assert sources and not [source for source in sources if re.match(r"(?:[a-z]+:)?//", source)], page
        assert any(source.endswith("assets/iframe-worker.js") for source in sources), page


def show(browser: str, address: str) -> str:
    """Return the HTML of a page after its scripts have run."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    return subprocess.run([browser, *options, address], capture_output=True, text=True, timeout=100).stdout


def check_search_from_a_folder(browser: str, page: Path) -> None:
    """Check assets/iframe-worker.js: a page that no server sends finds what is asked for."""
    shown = show(browser, f"{page.as_uri()}?q=checkpoint")
    (found,) = re.findall(r'<div class="md-search-result__meta">(\d+) matching documents</div>', shown)
    assert int(found) > 1
    assert shown.count('<li class="md-search-result__item">') > 1


def check_keyboard_and_names(browser: str, page: Path) -> None:
    """Check what assets/site.js mends in the theme: tables scroll by keyboard, and the search dialog has a name."""
    shown = show(browser, page.as_uri())
    regions = re.findall(r'<div class="md-typeset__scrollwrap"[^>]*>', shown)
    assert regions and all('tabindex="0"' in region for region in regions)
    (dialog,) = re.findall(r'<div class="md-search"[^>]*>', shown)
    assert 'aria-label="Search"' in dialog
