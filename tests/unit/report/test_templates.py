"""The templates of all pages: what scrolls can be reached by keyboard, and each column has a name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pocl_ray

TEMPLATES = sorted((Path(pocl_ray.__file__).parent / "report" / "templates").glob("*.html.j2"))


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_tables_scroll_by_keyboard_and_their_columns_have_names(template: Path) -> None:
    text = template.read_text(encoding="utf-8")
    regions = re.findall(r'<div class="scroll"[^>]*>', text)
    assert regions and all('tabindex="0"' in region for region in regions)
    assert not re.search(r"<th[^>]*></th>", text)
