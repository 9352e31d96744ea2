"""Writing of model directories, such that a half-written one is never taken for finished."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from pocl_ray.errors import StorageError


@contextmanager
def atomic_directory(directory: Path) -> Iterator[Path]:
    """Yield an empty sibling of `directory` that replaces it when the block ends without an exception.

    An older `directory` is replaced as a whole. After a crash there is the old one or none, but never a mixture.

    Args:
        directory: Local directory to create or replace.

    Raises:
        StorageError: The place cannot be written.
    """
    directory = Path(directory).absolute()
    token = uuid.uuid4().hex[:8]
    staging = directory.with_name(f".{directory.name}.writing-{token}")
    retired = directory.with_name(f".{directory.name}.retired-{token}")
    try:
        # tempfile.mkdtemp would set mode 0700, which the rename keeps. It would lock out other users of a shared disk.
        staging.mkdir(parents=True)
    except OSError as error:
        raise StorageError(f"{directory}: cannot be written ({error.strerror}); choose a place you may write") from None
    try:
        yield staging
        _share_files(staging)
        if directory.exists():
            directory.rename(retired)
        staging.rename(directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> Path:
    """Write a Hugging Face directory: config, safetensors, tokenizer, and a generation config with the eos token.

    Args:
        model: Model, which is written in its present dtype.
            tokenizer: Tokenizer of the model, with `eos` and `pad`.
            directory: Target directory; it is replaced if it exists.

    Returns:
        The directory.

    Raises:
        StorageError: The place cannot be written.
    """
    with atomic_directory(directory) as staging:
        write_model_files(model, tokenizer, staging)
    return Path(directory)


def write_model_files(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write the files of `save_model` into an existing directory, which the caller moves into place."""
    _fill_generation_config(model, tokenizer)
    with quiet_transformers():
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide the library's progress bars while the block runs.

    Saving also makes accelerate import DeepSpeed, which warns on a machine without a GPU unless its accelerator is set.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _share_files(directory: Path) -> None:
    """Give files the mode of the directory. safetensors writes mode 0600, which is unusable on a shared disk."""
    mode = directory.stat().st_mode & 0o666
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _fill_generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set eos, pad and bos if they are missing; a list of eos ids from the model does not change."""
    settings = model.generation_config
    if settings is None:
        raise ValueError(f"{type(model).__name__} cannot generate: not a causal language model")
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        if getattr(settings, name, None) is None:
            setattr(settings, name, getattr(tokenizer, name))
