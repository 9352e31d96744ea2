"""The place of a model: a directory, a Hub id or the package, checks of its files, and a fingerprint of its weights."""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import get_token, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import CONFIG_MAPPING

from pocl_ray.errors import HubUnreachableError, ModelError
from pocl_ray.models.shipped import shipped_directory
from pocl_ray.run_directory.paths import local_path
from pocl_ray.run_directory.storage import localize

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_READ_BYTES = 1 << 22
_UNSAFE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
_hash_of: dict[tuple[str, int, int], str] = {}


@dataclass(frozen=True)
class ModelRef:
    """A reference to a model. It has plain values only, so that it can be sent to Ray workers and written as JSON.

    Attributes:
        path: Local directory, Hub id, or `samples://NAME` for a model that the package ships.
        revision: Branch, tag or commit of a Hub id.
        dtype: Dtype to load in; `auto` is the dtype that the weights were saved in.
        attention: Attention implementation; `auto` leaves the choice to transformers.
        trust_remote_code: Whether Python code that comes with the model may run.
        adapter: LoRA adapter, a local directory or a Hub id, that is merged into the weights when they are loaded.
        adapter_revision: Branch, tag or commit of a Hub adapter.
        quantization: `int8` to load the linear layers in 8 bit, for inference only.
    """

    path: str
    revision: str | None = None
    dtype: Dtype = "auto"
    attention: Attention = "auto"
    trust_remote_code: bool = False
    adapter: str | None = None
    adapter_revision: str | None = None
    quantization: Literal["none", "int8"] = "none"

    @property
    def directory(self) -> Path | None:
        """The local directory, or None for a Hub id."""
        directory = local_path(self.path)
        return directory if directory.is_dir() else None


def on_this_node(ref: ModelRef) -> ModelRef:
    """Return the model with paths that this node can read.

    Directories on an object store are copied to this node. A shipped model is read from the package that is installed
    here.

    Raises:
        ModelError: The package ships no such model.
        StorageError: The object store has no such directory, or it cannot be read.
    """
    adapter = None if ref.adapter is None else localize(ref.adapter)
    return replace(ref, path=place_on_this_node(ref.path), adapter=adapter)


def place_on_this_node(path: str) -> str:
    """Return what this node can read of a model's place: a directory, or a Hub id as it is.

    Raises:
        ModelError: The package ships no such model.
        StorageError: The object store has no such directory, or it cannot be read.
    """
    shipped = shipped_directory(path)
    return localize(path) if shipped is None else str(shipped)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def check_place(ref: ModelRef) -> None:
    """Check that a model is there and may be loaded, before anything large is read.

    Raises:
        ModelError: The directory, config.json or safetensors are missing; transformers does not know the architecture,
            or it brings its own code; or a Hub id cannot be resolved.
    """
    directory = ref.directory
    if directory is not None:
        _check_has_safetensors(directory)
    else:
        _check_is_no_file(ref.path)
        if _looks_like_path(ref.path):
            raise ModelError(f"{ref.path}: no such model directory")
    _check_architecture(ref, read_config(ref))


def _check_is_no_file(path: str) -> None:
    if local_path(path).is_file():
        raise ModelError(f"{path}: is a file; a model is a directory with config.json and safetensors, or a Hub id")


def read_config(ref: ModelRef) -> dict[str, Any]:
    """Return the content of the model's config.json.

    Raises:
        ModelError: The file is missing or is not JSON, or the Hub does not offer it.
    """
    path = find_file(ref, "config.json")
    if path is None:
        raise ModelError(f"{ref.path}: has no config.json; a Hugging Face model directory is needed")
    return _read_json(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: is not a JSON object")
    return content


def find_file(ref: ModelRef, name: str) -> Path | None:
    """Return the local path of one file of the model, downloaded from the Hub if needed; None if there is no such file.

    Raises:
        ModelError: The place is a file, or the Hub cannot be reached, or has no such model or revision.
    """
    if ref.directory is not None:
        path = ref.directory / name
        return path if path.is_file() else None
    _check_is_no_file(ref.path)
    try:
        return Path(hf_hub_download(ref.path, name, revision=ref.revision))
    except GatedRepoError:
        raise ModelError(
            f"{ref.path}: access to this Hub model is restricted; ask for it on the model's page, and log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"{ref.path}: the Hub has no revision {ref.revision!r} of it") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelError(f"{ref.path}: neither a directory here nor a model on the Hub{_login_hint()}") from None
    except LocalEntryNotFoundError:
        reason = "the Hub cannot be reached and its cache here does not hold it"
        raise HubUnreachableError(f"{ref.path}: no such directory here, and {reason}") from None
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(f"{ref.path}: the Hub failed ({_first_line(error)})") from None


def _login_hint() -> str:
    """The remedy for a private model: without access the Hub does not tell it from one that does not exist."""
    if get_token() is None:
        return "; if it is private, log in with `hf auth login` or set HF_TOKEN"
    return "; if it is private, your token has no access to it"


def adapter_file(ref: ModelRef, name: str) -> Path | None:
    """Return the local path of one file of the model's adapter; None if there is no such file.

    Raises:
        ModelError: There is no such adapter.
    """
    assert ref.adapter is not None
    return find_file(ModelRef(ref.adapter, ref.adapter_revision), name)


def adapter_config(ref: ModelRef) -> dict[str, Any]:
    """Return the content of `adapter_config.json` of the model's adapter.

    Raises:
        ModelError: There is no such adapter, or the file is not JSON.
    """
    path = adapter_file(ref, ADAPTER_CONFIG)
    if path is None:
        raise ModelError(f"{ref.adapter}: has no {ADAPTER_CONFIG}; a LoRA adapter as peft writes it is needed")
    return _read_json(path)


def model_fingerprint(ref: ModelRef) -> str:
    """Return the fingerprint of the weights: a hash of config and safetensors, or id and commit of a Hub model.

    The fingerprint of an adapter is appended to that of its model.

    Tokenizer files and the place do not count, so a copy of a model has the same fingerprint. The process remembers
    file hashes by path, size and modification time.

    Raises:
        ModelError: The model is missing.
    """
    if ref.adapter is not None:
        own = model_fingerprint(replace(ref, adapter=None, adapter_revision=None))
        return f"{own} + {_adapter_fingerprint(ref)}"
    directory = ref.directory
    if directory is None:
        config_path = find_file(ref, "config.json")
        if config_path is None:
            raise ModelError(f"{ref.path}: has no config.json; a Hugging Face model is needed")
        return f"hub:{ref.path}@{config_path.parent.name}"  # the Hub's cache names the folder after the commit
    _check_has_safetensors(directory)
    if not (directory / "config.json").is_file():
        raise ModelError(f"{ref.path}: has no config.json; a Hugging Face model directory is needed")
    return _hash_of_files([directory / "config.json", *sorted(directory.glob("*.safetensors"))])


def _adapter_fingerprint(ref: ModelRef) -> str:
    adapter_config(ref)
    files = [path for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if (path := adapter_file(ref, name)) is not None]
    return _hash_of_files(files)


def _hash_of_files(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\0{_remembered_sha256(path)}\0".encode())
    return f"sha256:{digest.hexdigest()}"


def _remembered_sha256(path: Path) -> str:
    status = path.stat()
    key = (str(path.resolve()), status.st_size, status.st_mtime_ns)
    if key not in _hash_of:
        _hash_of[key] = file_sha256(path)
    return _hash_of[key]


def _looks_like_path(path: str) -> bool:
    """Return whether a text is a mistyped path, and not a Hub id (`name` or `owner/name`, often with dots)."""
    first, _, rest = path.partition("/")
    return path.startswith((".", "/", "~")) or "/" in rest or "\\" in path or (bool(rest) and Path(first).is_dir())


def _check_has_safetensors(directory: Path) -> None:
    if any(directory.glob("*.safetensors")):
        return
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory}: has no config.json; a Hugging Face model directory is needed")
    unsafe = next((path.name for pattern in _UNSAFE_PATTERNS for path in sorted(directory.glob(pattern))), None)
    if unsafe is not None:
        remedy = "convert with the Hub's `safetensors/convert` or model.save_pretrained()"
        raise ModelError(f"{directory}: only safetensors are read, and it holds {unsafe}; {remedy}")
    raise ModelError(f"{directory}: has no weights (*.safetensors)")


def _check_architecture(ref: ModelRef, config: dict[str, Any]) -> None:
    model_type = config.get("model_type")
    brings_code = "auto_map" in config
    if model_type in CONFIG_MAPPING or (brings_code and ref.trust_remote_code):
        return
    if brings_code:
        remedy = "set trust_remote_code: true if you trust its authors"
        raise ModelError(f"{ref.path}: brings its own Python code for {model_type!r}; {remedy}")
    if model_type is None:
        raise ModelError(f"{ref.path}: config.json names no model_type")
    hint = nearest(model_type, CONFIG_MAPPING)
    raise ModelError(f"{ref.path}: transformers knows no model_type {model_type!r}{hint}")


def nearest(name: Any, known: Any) -> str:
    """Return "; did you mean ...?" with the most similar known name, or an empty string."""
    matches = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
