"""Makes a drawing of matplotlib part of the page: its colours follow the page's theme, its text the page's font."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping


def inline_svg(svg: str, *, prefix: str, label: str, css_colours: Mapping[str, str]) -> str:
    """Return an `<svg>` element that can stand inside HTML.

    Args:
        svg: A whole SVG document, with text kept as text.
        prefix: Put before every id, because ids of all drawings of a page share one namespace.
        label: Read out instead of the drawing.
        css_colours: Colour as `#rrggbb` to the name of the CSS variable that replaces it.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style\b.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    view_box = re.search(r'viewBox="([^"]+)"', body)
    assert view_box is not None, "matplotlib writes a viewBox"
    opening = f'<svg class="plot" role="img" aria-label="{html.escape(label)}" viewBox="{view_box.group(1)}">'
    body = opening + body[body.index(">") + 1 :]
    body = re.sub(r'(?<=\sid=")', prefix, body)
    body = re.sub(r'(?<=href="#)', prefix, body)
    body = re.sub(r"(?<=url\(#)", prefix, body)
    body = re.sub(r"font: ((?:\S+ )*?[\d.]+px) [^;\"]+", r"font: \1 var(--font)", body)
    pattern = re.compile("|".join(map(re.escape, css_colours)), re.IGNORECASE)
    # Only drawing instructions hold colours; a text such as "#ffffff" in a label must stay as it is.
    return re.sub(
        r'style="[^"]*"',
        lambda style: pattern.sub(lambda hit: f"var(--{css_colours[hit.group().lower()]})", style.group()),
        body,
    )
