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


def test_names_of_rows_stay_in_view_while_a_table_scrolls() -> None:
    style = (TEMPLATES[0].parent / "style.css.j2").read_text(encoding="utf-8")
    (rule,) = re.findall(r"\.scroll tbody th,[^{]*{([^}]*)}", style)
    assert "position: sticky" in rule and "left: 0" in rule and "background" in rule


@pytest.mark.parametrize(("page", "plot"), [("experiment", "plots[plot]"), ("search", "plots.parallel")])
def test_drawings_of_many_panels_scroll_where_they_would_become_too_small(page: str, plot: str) -> None:
    text = next(path for path in TEMPLATES if path.name.startswith(page)).read_text(encoding="utf-8")
    assert f'<div class="scroll" tabindex="0">{{{{ figure({plot}' in text
