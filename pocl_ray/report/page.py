"""Fills the templates: the page (autoescaped), the same in Markdown, and the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from pocl_ray.report import text


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("pocl_ray.report", "templates"),
        autoescape=select_autoescape(enabled_extensions=("html.j2",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        fixed=text.fixed,
        correlation=text.correlation,
        signed=text.signed,
        percent=text.percent,
        count=text.count,
        short=text.short,
        setting=text.setting,
        duration=text.duration,
        md=text.markdown,
        indented=text.indented,
        plain_json=_plain_json,
        plain_number=_plain_number,
        pretty_json=_pretty_json,
    )
    return environment


def render_html(context: Mapping[str, Any]) -> str:
    """Return report.html; everything that comes from the run is escaped."""
    return _environment().get_template("report.html.j2").render(context)


def render_markdown(context: Mapping[str, Any]) -> str:
    """Return report.md."""
    return _environment().get_template("report.md.j2").render(context)


def render_search(context: Mapping[str, Any]) -> str:
    """Return the page of a search, tune/report.html; everything that comes from the run is escaped."""
    return _environment().get_template("search.html.j2").render(context)


def render_model_card(context: Mapping[str, Any]) -> str:
    """Return the README.md of the student."""
    return _environment().get_template("model_card.md.j2").render(context)


def _plain_json(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _plain_number(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, (int, float)) else str(value)


def _pretty_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2, default=str)
