"""Conversion of a GGUF file to a Hugging Face directory of safetensors.

transformers reads GGUF directly, but each time it takes about twenty seconds for 135M parameters, and every Ray worker
would need that time. The converted directory loads in a fraction of a second.

The weights are stored as float32. A 4-bit block stands for `scale * q + minimum` with float16 scale and minimum, whose
values float32 holds exactly. bfloat16 would round each value a second time (by up to 0.4 %). It can be chosen at run
time, when the model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pocl_ray.errors import ModelError
from pocl_ray.models.places import file_sha256
from pocl_ray.models.saving import atomic_directory, quiet_transformers, write_model_files

RECORD_NAME = "import.json"
_RECORD_VERSION = 1
_GGUF_MAGIC = b"GGUF"


def is_imported(directory: Path, source_sha256: str) -> bool:
    """Return whether `directory` holds a finished import of the GGUF file with this hash, with every file unchanged."""
    try:
        record = json.loads((directory / RECORD_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False
    if not isinstance(record, dict) or record.get("version") != _RECORD_VERSION:
        return False
    if record.get("source_sha256") != source_sha256:
        return False
    files = {name: directory / name for name in record["sha256"]}
    return all(path.is_file() and file_sha256(path) == record["sha256"][name] for name, path in files.items())


def import_gguf(gguf_path: Path, directory: Path, on_step: Callable[[str], None] = lambda _: None) -> Path:
    """Convert a GGUF file to a Hugging Face directory, unless the directory already holds it.

    Args:
        gguf_path: GGUF file, with an architecture and a quantization that transformers can read.
        directory: Target directory. It is replaced if it holds another import, and refused if it holds other files.
        on_step: Function that is called with a short description when a step begins, for progress output.

    Returns:
        The directory, with float32 safetensors, tokenizer with chat template, generation config, and a record of
        hashes.

    Raises:
        ModelError: The file is missing or is not GGUF, transformers cannot convert its architecture, or the directory
            holds other files.
        StorageError: The place cannot be written.
    """
    gguf_path, directory = Path(gguf_path), Path(directory)
    _check_is_gguf(gguf_path)
    source_sha256 = file_sha256(gguf_path)
    if is_imported(directory, source_sha256):
        return directory
    check_replaceable(directory)
    on_step("converting to safetensors")
    model, tokenizer = _read_gguf(gguf_path)
    with atomic_directory(directory) as staging:
        on_step("writing safetensors")
        write_model_files(model, tokenizer, staging)
        on_step("checking what was written")
        _check_written(model, tokenizer, staging)
        _write_record(gguf_path, source_sha256, staging)
    return directory


def check_replaceable(directory: Path) -> None:
    """Refuse a directory that holds files that no import has written.

    Raises:
        ModelError: The directory is not empty and has no import record, or it is a file.
    """
    if directory.is_file():
        raise ModelError(f"{directory}: is a file; name a directory")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / RECORD_NAME).is_file():
        raise ModelError(f"{directory}: holds other files; name an empty or a new directory")


def _check_is_gguf(path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    with path.open("rb") as file:
        if file.read(len(_GGUF_MAGIC)) != _GGUF_MAGIC:
            raise ModelError(f"{path}: not a GGUF file (it does not begin with 'GGUF')")


def _read_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer, without any trace of quantization in the config."""
    folder, name = str(path.parent), path.name
    try:
        with quiet_transformers(), redirect_stderr(StringIO()):  # its tqdm bars would break our progress line
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
            model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    except (ValueError, KeyError, NotImplementedError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{path}: transformers cannot convert this GGUF file: {reason}") from error
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = ""
    # Plain attributes, because saving reads them to learn whether the weights are still quantized.
    object.__setattr__(model, "hf_quantizer", None)
    object.__setattr__(model, "is_quantized", False)
    return model, tokenizer


def _check_written(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Read all files back and compare them with the memory: a full disk must not go unnoticed."""
    with quiet_transformers():
        written = AutoModelForCausalLM.from_pretrained(directory, use_safetensors=True, dtype=torch.float32)
    expected = model.state_dict()
    for name, tensor in written.state_dict().items():
        if not torch.equal(tensor, expected[name]):
            raise ModelError(f"{directory}: {name} does not read back as written; is the disk full?")
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{directory}: {name} holds values that are not finite; the GGUF file is damaged")
    written_tokenizer = AutoTokenizer.from_pretrained(directory)
    probe = "The quick  brown fox:\n\t1234567890, naïve — 你好!"
    if written_tokenizer(probe)["input_ids"] != tokenizer(probe)["input_ids"]:
        raise ModelError(f"{directory}: the tokenizer does not read back as written")
    if written_tokenizer.chat_template != tokenizer.chat_template:
        raise ModelError(f"{directory}: the chat template does not read back as written")


def _write_record(source: Path, source_sha256: str, directory: Path) -> None:
    hashes = {path.name: file_sha256(path) for path in sorted(directory.iterdir()) if path.is_file()}
    record = {"version": _RECORD_VERSION, "source": source.name, "source_sha256": source_sha256, "sha256": hashes}
    (directory / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
