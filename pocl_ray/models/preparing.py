"""Teacher and student as they are before training: loaded from where they lie, made from a config, or cut."""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pocl_ray.config import ModelConfig, StudentConfig, TeacherConfig
from pocl_ray.models.building import build_model
from pocl_ray.models.loading import check_same_tokenizer, load_model, load_tokenizer
from pocl_ray.models.places import ModelRef, model_fingerprint
from pocl_ray.models.saving import save_model
from pocl_ray.models.shrink import cut_layers
from pocl_ray.storage import RunDirectory, localize

VOCABULARY_MULTIPLE = 8


def reference(config: ModelConfig, path: str | None = None) -> ModelRef:
    """Return a model's reference; `path` takes the place of the config's, for a model made in this run."""
    place = path or config.path
    assert place is not None
    revision = config.revision if path is None else None
    return ModelRef(place, revision, config.dtype, config.attention, config.trust_remote_code)


def origin_fingerprint(config: ModelConfig) -> str | dict[str, object]:
    """Return what a model's weights depend on before this run does anything to them."""
    if config.path is not None:
        return model_fingerprint(
            reference(config, localize(config.path)) if "://" in config.path else reference(config)
        )
    return config.model_dump(mode="json", include={"architecture", "num_layers"})


def make_teacher(config: TeacherConfig, tokenizer: PreTrainedTokenizerBase, seed: int, run_dir: RunDirectory) -> None:
    """Build an untrained teacher from its architecture into `models/teacher_init`."""
    assert config.architecture is not None
    _save_built(config.architecture, tokenizer, seed, run_dir, "models/teacher_init")


def make_student(
    config: StudentConfig, teacher: ModelRef, tokenizer: PreTrainedTokenizerBase, seed: int, run_dir: RunDirectory
) -> None:
    """Build or cut the student into `models/student_init`.

    Raises:
        ModelError: The architecture does not work, or more layers are asked for than the teacher has.
    """
    if config.architecture is not None:
        _save_built(config.architecture, tokenizer, seed + 1, run_dir, "models/student_init")
        return
    assert config.num_layers is not None
    path = localize(teacher.path)
    model = cut_layers(load_model(ModelRef(path, teacher.revision, "auto")), config.num_layers)
    with tempfile.TemporaryDirectory() as scratch:
        run_dir.publish(save_model(model, tokenizer, Path(scratch) / "model"), "models/student_init")


def check_student_tokenizer(config: StudentConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a student that comes with another tokenizer than the run's.

    Raises:
        ModelError: The vocabularies differ.
    """
    if config.path is not None:
        place = localize(config.path)
        check_same_tokenizer(tokenizer, load_tokenizer(place, config.revision, config.trust_remote_code))


def _save_built(
    architecture: dict[str, object],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    run_dir: RunDirectory,
    rel: str,
) -> None:
    vocab_size = -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    eos_id = tokenizer.eos_token_id
    assert isinstance(eos_id, int)
    bos_id = tokenizer.bos_token_id
    model = build_model(architecture, vocab_size, eos_id, bos_id if isinstance(bos_id, int) else None, seed)
    with tempfile.TemporaryDirectory() as scratch:
        run_dir.publish(save_model(model, tokenizer, Path(scratch) / "model"), rel)
