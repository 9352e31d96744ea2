"""Where a student comes from, as far as it is known: licences, languages and Hub ids of its models and rows.

A card of the Hub says it (`license`, `language` in its metadata), and so does the README.md of a local model. For what
ships with pocl-ray it is the licence of pocl-ray. Everything else is not known, and the card says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, ModelCard
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from pocl_ray.config import Config
from pocl_ray.report.model_card import Origin, on_hub

OWN_LICENCE = "apache-2.0"


@dataclass(frozen=True)
class _Found:
    """The metadata of a card."""

    licence: str | None = None
    languages: tuple[str, ...] = ()


def origins_of(config: Config, environment: Mapping[str, Any]) -> list[Origin]:
    """Return the origins of a student: teachers, the untuned student and the training rows.

    Args:
        config: Config of the run.
        environment: Content of its environment.json, which tells ids on the Hub from folders.
    """
    others = [(f"teacher {place}", teacher) for place, teacher in enumerate(config.other_teachers, start=2)]
    found = []
    for role, model in (("teacher", config.teacher), *others, ("student", config.student)):
        if model.path is not None:
            found.append(_origin(role, model.path, environment, is_model=True))
    return [*found, _origin("rows", config.data.train.path, environment, is_model=False)]


def _origin(role: str, path: str, environment: Mapping[str, Any], is_model: bool) -> Origin:
    known = on_hub(path, environment)
    own = _card(path, bool(known), is_model)
    return Origin(role, known or path.rstrip("/").rpartition("/")[2], own.licence, own.languages)


def _card(path: str, is_on_hub: bool, is_model: bool) -> _Found:
    if path.startswith("samples://"):
        return _Found(OWN_LICENCE, ("en",))
    card_type = ModelCard if is_model else DatasetCard
    local = Path(path).expanduser() / "README.md"
    if not local.is_file() and not is_on_hub:
        return _Found()
    try:
        data = card_type.load(local if local.is_file() else path, ignore_metadata_errors=True).data
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError, OfflineModeIsEnabled, OSError, ValueError):
        return _Found()  # no card, or no way to it: not known
    languages = data.language
    listed = [languages] if isinstance(languages, str) else languages or []
    return _Found(data.license or None, tuple(str(each) for each in listed))
