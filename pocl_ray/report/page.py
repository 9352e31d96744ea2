"""Renders the templates: the page (autoescaped), its Markdown form, and the model card."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from pocl_ray.config import ScheduleConfig
from pocl_ray.records import Stage

NOTHING = "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"


def fixed(value: float, places: int = 2) -> str:
    """Return a number with a fixed number of decimal places, or a dash if it is not finite."""
    if not math.isfinite(value):
        return NOTHING
    return f"{round(value, places) + 0.0:,.{places}f}".replace("-", _MINUS)  # + 0.0 removes the sign of a zero


def correlation(value: float) -> str:
    """Return a coefficient with two decimal places and no zero before the point, or a dash if it is not finite."""
    return fixed(value).replace("0.", ".") if abs(value) < 0.995 else fixed(value)


def signed(value: float, places: int = 2) -> str:
    """Return a difference with its sign, or a dash if it is not finite."""
    shown = fixed(value, places)
    return f"+{shown}" if math.isfinite(value) and round(value, places) > 0 else shown


def number(value: float | None, places: int = 2) -> str:
    """Return a number with a fixed number of decimal places, or a dash where there is none."""
    return fixed(math.nan if value is None else value, places)


def percent(share: float) -> str:
    """Return a share as percentage, or a dash if it is not finite."""
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%".replace("-", _MINUS) if math.isfinite(share) else NOTHING


def count(value: float) -> str:
    """Return a whole number with thousands separators, or a dash if it is not finite."""
    return f"{value:,.0f}" if math.isfinite(value) else NOTHING


def short(value: float) -> str:
    """Return a number to three significant digits, or a dash if it is not finite."""
    return f"{value:.3g}".replace("-", _MINUS) if math.isfinite(value) else NOTHING


def duration(seconds: float) -> str:
    """Return a time in its two largest units, or a dash if it is not finite."""
    if not math.isfinite(seconds):
        return NOTHING
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {whole % 60:02d} s"


def markdown(text: object) -> str:
    """Return text escaped for Markdown, on one line, so that it can also stand in a table."""
    line = " ".join(str(text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", line)


def indented(text: object) -> str:
    """Return text as a Markdown code block that no content can end early."""
    return "\n".join("    " + line for line in str(text).splitlines())


def setting(stage: Stage, key: str) -> str:
    """Return a stage's setting of the loss; if it moves, its first and its last value."""
    first, last = stage.setting_at(key, 0), stage.setting_at(key, stage.num_steps - 1)
    return short(first) if first == last else f"{short(first)} to {short(last)}"


def argument(value: float | ScheduleConfig) -> str:
    """Return a parameter of a loss; if it moves, its values in order."""
    if not isinstance(value, ScheduleConfig):
        return short(value)
    return f"{' to '.join(map(short, value.numbers))} by {value.by}"


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
        fixed=fixed,
        correlation=correlation,
        number=number,
        signed=signed,
        percent=percent,
        count=count,
        short=short,
        setting=setting,
        argument=argument,
        duration=duration,
        md=markdown,
        indented=indented,
        plain_json=_plain_json,
        plain_number=_plain_number,
        pretty_json=_pretty_json,
    )
    return environment


def render_html(context: Mapping[str, Any]) -> str:
    """Return report.html; all content of the run is escaped."""
    return _environment().get_template("report.html.j2").render(context)


def render_markdown(context: Mapping[str, Any]) -> str:
    """Return report.md."""
    return _environment().get_template("report.md.j2").render(context)


def render_search(context: Mapping[str, Any]) -> str:
    """Return the page of a search, tune/report.html; all content of the run is escaped."""
    return _environment().get_template("search.html.j2").render(context)


def render_experiment(context: Mapping[str, Any]) -> str:
    """Return the page of an experiment, experiment/report.html; everything that comes from the run is escaped."""
    return _environment().get_template("experiment.html.j2").render(context)


def render_comparison(context: Mapping[str, Any]) -> str:
    """Return the page of a comparison of runs; everything that comes from the runs is escaped."""
    return _environment().get_template("comparison.html.j2").render(context)


def render_model_card(context: Mapping[str, Any]) -> str:
    """Return the README.md of the student."""
    return _environment().get_template("model_card.md.j2").render(context)


def _plain_json(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _plain_number(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, (int, float)) else str(value)


def _pretty_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2, default=str)
