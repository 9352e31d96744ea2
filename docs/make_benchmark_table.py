"""The tables of measured speed in docs/performance.md and README.md, from a file that `make benchmark` has written.

    python docs/make_benchmark_table.py [FILE]      copy FILE to docs/figures/benchmark.json and rewrite both pages

Without FILE the pages are rewritten from the file that is there. A test holds the pages to it.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "figures" / "benchmark.json"
BEGIN, END = "<!-- benchmark: written by docs/make_benchmark_table.py -->", "<!-- end of benchmark -->"
IN_README = ("step with cached", "step with live", "evaluation", "on-policy", "scoring", "whole run")


def bar_text(bar: dict[str, Any]) -> tuple[str, str]:
    """Return a figure and its bar as the table shows them."""
    name, sign = bar["figure"], "≥" if bar["at_least"] else "≤"
    unit = " s" if name == "s" else f" {name}"
    return f"{_number(bar['measured'])}{unit}", f"{sign} {_number(bar['limit'])}{'' if _met(bar) else ', **missed**'}"


def _met(bar: dict[str, Any]) -> bool:
    measured, limit = bar["measured"], bar["limit"]
    return bool(measured >= limit if bar["at_least"] else measured <= limit)


def _number(value: float) -> str:
    return f"{value:.2f}" if 0.1 <= abs(value) < 1000 else f"{value:.2g}"


def dates_of(found: dict[str, Any]) -> str:
    """Return the day of the measurement, or all days of one that was completed later."""
    return " and ".join(sorted({row.get("date", found["date"]) for row in found["measurements"]})) or found["date"]


def table_of(found: dict[str, Any]) -> str:
    """Return the table of docs/performance.md."""
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in found["versions"] if name != "python")
    lines = [
        f"Measured on {dates_of(found)}: {found['device']}, {found['cores']} cores, {versions}. Ratios are medians of "
        "rounds in which the sides take turns, with the least and the most; the other figures are ours / theirs.",
        "",
        "| work | measured | bar | least to most | tokens/s | peak GiB | padding | needed / done | of matmul peak |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["measurements"]:
        if not row["bars"] and not row["sides"]:  # a text alone, among the settings
            continue
        bars = [bar_text(bar) for bar in row["bars"]]
        spread = row["ratio"] and f"{row['ratio']['least']:.2f} to {row['ratio']['most']:.2f}"
        cells = [
            row["work"] + (f" ({row['against']})" if row["against"] else ""),
            "; ".join(measured for measured, _ in bars),
            "; ".join(limit for _, limit in bars),
            spread or "",
            _pair(row, "tokens_per_s", "{:.0f}"),
            _pair(row, "peak_gib", "{:.2f}"),
            _pair(row, "padding", "{:.0%}"),
            _pair(row, "needed_over_done", "{:.2f}"),
            _pair(row, "matmul_share", "{:.0%}"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- Not measured: {work}: {reason}." for work, reason in found["not_measured"].items())]
    works: dict[str, list[str]] = {}
    for row in found["measurements"]:
        works.setdefault(row["setting"], []).append(row["work"])
    settings = [f"- {'; '.join(named)}: {setting}." for setting, named in works.items()]
    return "\n".join([*lines, "", "Settings:", "", *settings])


def _pair(row: dict[str, Any], column: str, form: str) -> str:
    values = [side[column] for side in row["sides"]]
    if all(value is None for value in values):
        return ""
    return " / ".join("-" if value is None else form.format(value) for value in values)


def short_table_of(found: dict[str, Any]) -> str:
    """Return the table of the README: the ratios alone."""
    lines = [f"| {found['device']}, {dates_of(found)} | times as fast | least to most | bar |", "|---|---:|---:|---:|"]
    for row in found["measurements"]:
        if row["ratio"] and row["work"].startswith(IN_README):
            bar = row["bars"][0]
            value = bar["measured"] if "times as fast" in bar["figure"] else row["ratio"]["median"]
            limit = bar_text(bar)[1] if "times as fast" in bar["figure"] else ""
            least, most = row["ratio"]["least"], row["ratio"]["most"]
            lines.append(f"| {row['work']} | {value:.2f} | {least:.2f} to {most:.2f} | {limit} |")
    return "\n".join(lines)


def rewritten(page: str, table: str) -> str:
    """Return a page with the text between the two marks replaced.

    Raises:
        ValueError: The page lacks a mark.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"a page lacks {BEGIN} or {END}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


PAGES = {ROOT / "docs" / "performance.md": table_of, ROOT / "README.md": short_table_of}


def main() -> int:
    """Copy the figures and rewrite the pages."""
    if len(sys.argv) > 1:
        given = Path(sys.argv[1])
        if json.loads(given.read_text())["small"]:
            print(f"{sys.argv[1]}: measured with --small, whose figures say nothing", file=sys.stderr)
            return 2
        if given.resolve() != FIGURES:
            shutil.copyfile(given, FIGURES)
    found = json.loads(FIGURES.read_text())
    for page, table in PAGES.items():
        page.write_text(rewritten(page.read_text(), table(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
