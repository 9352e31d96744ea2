"""A hook of mkdocs: the page of the command line, made from the commands themselves each time the site is built."""

from __future__ import annotations

from typing import Any

import typer
from typer.cli import get_docs_for_click

PAGE = "cli.md"


def render() -> str:
    """Return the page as Markdown."""
    from pocl_ray.cli import app

    command: Any = typer.main.get_command(app)
    context = command.context_class(command, info_name="pocl-ray")
    return get_docs_for_click(obj=command, ctx=context, name="pocl-ray", title="Command line")


def on_files(files: Any, config: Any) -> Any:
    """Add the page to those of the folder."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=render()))
    return files
