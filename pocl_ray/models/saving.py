"""Writing of model directories, such that a half-written one is never taken for finished."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from pocl_ray.errors import ModelError, StorageError
from pocl_ray.run_directory.storage import replacing


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
    with ExitStack() as stack:
        try:
            staging = stack.enter_context(replacing(directory))
            # Not tempfile.mkdtemp: its mode 0700 would survive the rename and shut out other users of a shared disk.
            staging.mkdir()
        except OSError as error:
            raise StorageError(
                f"{directory}: cannot be written ({error.strerror}); choose a place you may write"
            ) from None
        yield staging
        _share_files(staging)


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


def write_model_files(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    loaded_as: str = "auto",
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write the files of `save_model` into an existing directory, which the caller moves into place.

    Args:
        model: Model to write.
        tokenizer: Its tokenizer, with `eos` and `pad`.
        directory: Target directory.
        loaded_as: Dtype that transformers loads the model in by itself; `auto` is the dtype of the weights.
        state: Tensors to write in place of the model's own.
    """
    _set_generation_config(model, tokenizer)
    with quiet_transformers():
        model.save_pretrained(directory, state_dict=state)
    tokenizer.save_pretrained(directory)
    if loaded_as != "auto":
        path = directory / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(config | {"dtype": loaded_as}, indent=2) + "\n", encoding="utf-8")


def try_saving(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    """Write a model with hardly any of its weights to a scratch directory, to see before training that it can be saved.

    Args:
        model: Model as it is before training.
        tokenizer: Its tokenizer.
        place: Name of the model in the message.

    Raises:
        ModelError: It cannot be saved.
    """
    # One column of each matrix is enough: fused experts are split by their other axes as they are saved. A view keeps
    # the address, by which safetensors tells shared tensors.
    state = {name: tensor[..., :1] if tensor.dim() > 1 else tensor for name, tensor in _state_of(model).items()}
    try:
        with tempfile.TemporaryDirectory() as scratch:
            write_model_files(model, tokenizer, Path(scratch), state=state)
    except (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{place}: after training it could not be saved: {reason}") from error


def _state_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def stop_ids_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the end of sequence of the tokenizer and those of the model's generation config; chat models have several.

    Args:
        model: Model that answers.
        tokenizer: Its tokenizer.
    """
    own = getattr(model.generation_config, "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(own if isinstance(own, (list, tuple)) else [own])}
    found = sorted(int(token) for token in ids if token is not None)
    assert found, "neither tokenizer nor model has an end-of-sequence token"
    return found


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


def _set_generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the generation config of evaluation: answers end at any stop token of tokenizer and model, nothing else.

    A model's published settings may change greedy answers (`repetition_penalty`), and transformers refuses to save
    some of them (a temperature without `do_sample`).
    """
    if model.generation_config is None:
        raise ValueError(f"{type(model).__name__} cannot generate: not a causal language model")
    stop_ids = stop_ids_of(model, tokenizer)
    model.generation_config = GenerationConfig(
        eos_token_id=stop_ids[0] if len(stop_ids) == 1 else stop_ids,
        pad_token_id=stop_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
