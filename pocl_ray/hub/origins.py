"""Where a student comes from, as far as it is known: licences, languages and Hub ids of its models and rows.

A card of the Hub says it (`license`, `language` in its metadata), and so does the README.md of a local model. For what
ships with pocl-ray it is the licence of pocl-ray. Everything else is not known, and the card says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import DatasetCard, ModelCard
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from pocl_ray.config import Config
from pocl_ray.report.model_card import Origin, hub_id

OWN_LICENCE = "apache-2.0"


@dataclass(frozen=True)
class _Found:
    """The metadata of a card."""

    licence: str | None = None
    languages: tuple[str, ...] = ()


def origins_of(config: Config) -> list[Origin]:
    """Return the origins of a student: teachers, the untuned student and the training rows."""
    others = [(f"teacher {place}", teacher) for place, teacher in enumerate(config.other_teachers, start=2)]
    found = []
    for role, model in (("teacher", config.teacher), *others, ("student", config.student)):
        if model.path is not None:
            found.append(_origin(role, model.path, is_model=True))
    return [*found, _origin("rows", config.data.train.path, is_model=False)]


def _origin(role: str, path: str, is_model: bool) -> Origin:
    own = _card(path, is_model)
    return Origin(role, hub_id(path) or path.rstrip("/").rpartition("/")[2], own.licence, own.languages)


def _card(path: str, is_model: bool) -> _Found:
    if path.startswith("samples://"):
        return _Found(OWN_LICENCE, ("en",))
    card_type = ModelCard if is_model else DatasetCard
    local = Path(path).expanduser() / "README.md"
    if not local.is_file() and not hub_id(path):
        return _Found()
    try:
        data = card_type.load(local if local.is_file() else path, ignore_metadata_errors=True).data
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError, OfflineModeIsEnabled, OSError, ValueError):
        return _Found()  # no card, or no way to it: not known
    languages = data.language
    listed = [languages] if isinstance(languages, str) else languages or []
    return _Found(data.license or None, tuple(str(each) for each in listed))
