"""Teacher and student before training: ready-made, built from an architecture, or cut from the teacher."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pocl_ray.config import Config, ModelConfig, StudentConfig, TeacherConfig
from pocl_ray.errors import ModelError
from pocl_ray.models.adapter_targets import coverage
from pocl_ray.models.building import build_model, last_line, model_from_config
from pocl_ray.models.heads import check_split
from pocl_ray.models.loading import check_same_tokenizer, load_model, load_tokenizer, num_parameters, release_eos_row
from pocl_ray.models.lora import ADAPTER, check_adapter, import_peft
from pocl_ray.models.places import (
    ModelRef,
    check_place,
    find_file,
    model_fingerprint,
    on_this_node,
    place_on_this_node,
)
from pocl_ray.models.saving import save_model
from pocl_ray.records import STUDENT, STUDENT_BEFORE, TEACHER, Coverage
from pocl_ray.run_directory.paths import local_path
from pocl_ray.run_directory.storage import RunDirectory


def evenly_spaced(num_layers: int, num_teacher_layers: int) -> tuple[int, ...]:
    """Return the layers that a student keeps: the first, the last, and layers evenly spaced between them.

    Raises:
        ModelError: The number of layers is below 1, or above the teacher's.
    """
    if not 1 <= num_layers <= num_teacher_layers:
        raise ModelError(f"num_layers: {num_layers} of a teacher with {num_teacher_layers} layers; give 1 to that many")
    gaps = max(num_layers - 1, 1)
    # Round half up in integers. round() would choose the even neighbour, so that spacing depends on the index's parity.
    return tuple((2 * i * (num_teacher_layers - 1) + gaps) // (2 * gaps) for i in range(num_layers))


def cut_layers(model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """Return a student that consists of some of a teacher's layers, evenly spaced, and of all its other weights.

    The student is a new model, built from an adjusted config, so that everything that depends on depth (layer indices
    of the KV cache, kinds of layers) fits. The teacher does not change.

    Args:
        model: Teacher with complete weights (not partitioned by ZeRO-3).
        num_layers: Number of layers to keep, from 1 to all.

    Returns:
        The student in training mode, in the teacher's dtype and on the teacher's device.

    Raises:
        ModelError: More layers are requested than the teacher has, or the model family cannot be cut.
    """
    family = type(model).__name__
    if type(model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{family}: a student cannot be cut from a model that brings its own code")
    kept = evenly_spaced(num_layers, model.config.get_text_config().num_hidden_layers)
    prefix = _layers_prefix(model)
    config = _cut_config(model.config, kept)
    attention = getattr(model.config, "_attn_implementation", None)
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    student = model_from_config(config, seed=0, dtype=model.dtype, **options)
    try:
        student.load_state_dict(_cut_state(model.state_dict(), prefix, kept), strict=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{family}: a student cannot be cut from this family ({reason})") from error
    student.generation_config = copy.deepcopy(model.generation_config)
    release_eos_row(student)
    nn.Module.to(student, model.device)
    return student.train()


def _layers_prefix(model: PreTrainedModel) -> str:
    """The name of the list of layers, such as `model.layers`."""
    depth = model.config.get_text_config().num_hidden_layers
    lists = [
        name
        for name, module in model.base_model.named_modules(prefix=model.base_model_prefix)
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    top = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists if other != name)]
    if len(top) != 1:
        raise ModelError(f"{type(model).__name__}: a student cannot be cut from it (lists of layers found: {top})")
    return top[0]


def _cut_config(config: PreTrainedConfig, kept: tuple[int, ...]) -> PreTrainedConfig:
    """The student's config. Lists with an entry for each layer (`layer_types`, `no_rope_layers`) are cut as well."""
    depth = config.num_hidden_layers
    fields = config.to_dict()
    for name, value in fields.items():
        if "layer" in name and isinstance(value, list) and len(value) == depth:
            fields[name] = [value[i] for i in kept]
    fields[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(kept)
    fields.pop("_name_or_path", None)
    return type(config).from_dict(fields)


def _cut_state(state: dict[str, Tensor], prefix: str, kept: tuple[int, ...]) -> dict[str, Tensor]:
    """The weights under the student's names: layer kept[j] becomes layer j."""
    place_of = {layer: place for place, layer in enumerate(kept)}
    cut: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith(f"{prefix}."):
            cut[name] = tensor
            continue
        layer, _, rest = name.removeprefix(f"{prefix}.").partition(".")
        if int(layer) in place_of:
            cut[f"{prefix}.{place_of[int(layer)]}.{rest}"] = tensor
    return cut


VOCABULARY_MULTIPLE = 8

# Encoders that transformers lists as causal language models: without `is_decoder` each token sees those behind it.
_BOTH_WAYS = (
    *("bert", "bert-generation", "big_bird", "camembert", "cpmant", "data2vec-text", "electra", "ernie"),
    *("megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer"),
    *("xlm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)


def reference(config: ModelConfig, path: str | None = None) -> ModelRef:
    """Return the reference of a model; `path` replaces the config's path for a model that this run has made.

    A local directory becomes absolute, because Ray Train's workers have another working directory.
    """
    place = path or config.path
    assert place is not None
    ref = ModelRef(_absolute(place), None, config.dtype, config.attention, config.trust_remote_code)
    if path is not None:
        return ref
    ref = replace(ref, revision=config.revision)
    if not isinstance(config, TeacherConfig):
        return ref
    ref = replace(ref, quantization=config.quantization)
    if config.adapter is None:
        return ref
    return replace(ref, adapter=_absolute(config.adapter), adapter_revision=config.adapter_revision)


def _absolute(place: str) -> str:
    """The absolute path of a local directory; a Hub id or URL does not change."""
    directory = local_path(place)
    return str(directory) if directory.is_dir() else place


def trained_reference(config: StudentConfig, start: ModelRef, path: str) -> ModelRef:
    """Return the reference of a student that was trained from `start` and written to `path`."""
    if config.lora is None or config.lora.merge:
        return reference(config, path)
    return replace(start, adapter=f"{path}/{ADAPTER}", adapter_revision=None)


def references_of_run(config: Config, run_dir: RunDirectory) -> dict[str, ModelRef]:
    """Return the references of a finished run's models, by their names in evaluation.json, without the control."""

    def made(role: str, model: ModelConfig) -> str | None:
        name = role if model.sft is not None else None if model.path is not None else f"{role}_init"
        return None if name is None else run_dir.uri_of(f"models/{name}")

    before = reference(config.student, made("student", config.student))
    return {
        TEACHER: reference(config.teacher, made("teacher", config.teacher)),
        STUDENT_BEFORE: before,
        STUDENT: trained_reference(config.student, before, run_dir.uri_of("student")),
    }


def origin_fingerprint(config: ModelConfig) -> str | dict[str, object]:
    """Return the origin that a model's weights depend on before this run changes them."""
    if config.path is not None:
        return model_fingerprint(on_this_node(reference(config)))
    return config.model_dump(mode="json", include={"architecture", "num_layers"})


def make_teacher(config: TeacherConfig, tokenizer: PreTrainedTokenizerBase, seed: int, run_dir: RunDirectory) -> None:
    """Build an untrained teacher from its architecture in `models/teacher_init`."""
    assert config.architecture is not None
    _save_built(config.architecture, tokenizer, seed, run_dir, "models/teacher_init")


def make_student(
    config: StudentConfig,
    teacher: ModelRef | None,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    run_dir: RunDirectory,
) -> None:
    """Build or cut the student in `models/student_init`. The teacher is only needed for a cut.

    Raises:
        ModelError: The architecture does not work, or more layers are requested than the teacher has.
    """
    if config.architecture is not None:
        _save_built(config.architecture, tokenizer, seed + 1, run_dir, "models/student_init")
        return
    assert config.num_layers is not None and teacher is not None
    plain = replace(on_this_node(teacher), dtype="auto", attention="auto", trust_remote_code=False)
    model = cut_layers(load_model(plain), config.num_layers)
    with tempfile.TemporaryDirectory() as scratch:
        run_dir.publish(save_model(model, tokenizer, Path(scratch) / "model"), "models/student_init")


def check_student_tokenizer(
    config: StudentConfig, tokenizer: PreTrainedTokenizerBase, is_bridged: bool = False
) -> None:
    """Refuse a student with another tokenizer than the run's.

    Args:
        config: Config of the student.
        tokenizer: Tokenizer of the run.
        is_bridged: Whether the teacher has another tokenizer.

    Raises:
        ModelError: The vocabularies differ.
    """
    if config.path is None:
        return
    own = load_tokenizer(place_on_this_node(config.path), config.revision, config.trust_remote_code)
    if not is_bridged:
        check_same_tokenizer(tokenizer, own)
    elif tokenizer.get_vocab() != own.get_vocab():
        raise ModelError("tokenizer: it differs from that of student.path; leave the section out to take the student's")


def check_teacher_tokenizer(config: TeacherConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a ready-made teacher with another tokenizer than the run's, such as the one of `tokenizer.path`.

    Raises:
        ModelError: The vocabularies differ.
    """
    if config.path is None:
        return
    ref = on_this_node(reference(config))
    if any(find_file(ref, name) is not None for name in ("tokenizer.json", "tokenizer_config.json")):
        check_same_tokenizer(load_tokenizer(ref.path, ref.revision, ref.trust_remote_code), tokenizer)


def check_other_teacher(config: TeacherConfig, tokenizer: PreTrainedTokenizerBase, max_tokens: int = 1) -> None:
    """Refuse a further teacher that cannot be loaded, or that has another tokenizer than the run's.

    Raises:
        ModelError: There are no weights, the vocabularies differ, or the rows do not fit it (`check_fits`).
    """
    assert config.path is not None
    ref = on_this_node(reference(config))
    check_place(ref)
    check_same_tokenizer(load_tokenizer(ref.path, ref.revision, ref.trust_remote_code), tokenizer)
    check_fits(f"other teacher {ref.path}", skeleton(config, tokenizer), tokenizer, max_tokens)


def check_adapters(teacher: TeacherConfig, student: StudentConfig, *others: TeacherConfig) -> Coverage | None:
    """Check from small files that adapters can be created and merged.

    Returns:
        The share of the student that its adapters change; None if it is trained itself.

    Raises:
        ConfigError: peft is not installed, or a target of the adapters is not a layer of the student.
        ModelError: A teacher's adapter is missing or cannot be merged.
    """
    for one in (teacher, *others):
        if one.adapter is not None:
            import_peft("teacher.adapter")
            check_adapter(on_this_node(reference(one)))
    if student.lora is None:
        return None
    import_peft("student.lora")
    return adapter_coverage(teacher, student)


def adapter_coverage(teacher: TeacherConfig, student: StudentConfig) -> Coverage:
    """Return the share of the student that its adapters change, from the models' configs alone.

    Raises:
        ConfigError: A target of the adapters is not in the student.
    """
    assert student.lora is not None
    model = skeleton(student if student.num_layers is None else teacher, tokenizer=None)
    if student.num_layers is not None:
        with torch.device("meta"):
            model = cut_layers(model, student.num_layers)
    return coverage(model, student.lora)


def check_models(
    teacher: TeacherConfig,
    student: StudentConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int = 1,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> str | None:
    """Check from the configs alone that both models can be loaded or built, and that the rows fit them.

    Args:
        teacher: Section of the teacher.
        student: Section of the student.
        tokenizer: Tokenizer of the run.
        max_tokens: `data.max_tokens`: prompt and answer together.
        teacher_tokenizer: Tokenizer of the teacher, if it keeps its own.

    Returns:
        A warning if the student has more parameters than its teacher, else None.

    Raises:
        ModelError: Weights are missing, an architecture does not work, the student has more layers than the teacher,
            or a model lacks embeddings for the tokenizer's ids or positions for the rows.
    """
    large = skeleton(teacher, tokenizer)
    for key, model in (("teacher", teacher), ("student", student)):
        if model.architecture is not None:
            _check_memory(key, num_parameters(skeleton(model, tokenizer)))
    check_fits("teacher", large, teacher_tokenizer or tokenizer, max_tokens)
    if student.num_layers is not None:
        evenly_spaced(student.num_layers, large.config.get_text_config().num_hidden_layers)
        return None
    small = skeleton(student, tokenizer)
    check_fits("student", small, tokenizer, max_tokens)
    num_teacher, num_student = num_parameters(large), num_parameters(small)
    if num_student <= num_teacher:
        return None
    return (
        f"the student has {num_student:,} parameters, more than its teacher's {num_teacher:,}; "
        "teacher.path and student.path may be the wrong way round"
    )


def _check_memory(key: str, num_weights: int) -> None:
    """Refuse a model that this machine could not make, before it tries to."""
    needed, there = 4 * num_weights, psutil.virtual_memory().total
    if needed > there:
        raise ModelError(
            f"{key}.architecture: its {num_weights:,} parameters take {needed / 2**30:,.0f} GiB in float32, and this "
            f"machine, which makes it, has {there / 2**30:,.0f} GiB of memory; make it smaller"
        )


def check_fits(key: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
    """Check that a model has an embedding for each token id and a position for each token, and reads left to right.

    Args:
        key: Section of the model, for the message.
        model: Model without memory for its weights.
        tokenizer: Tokenizer of the rows that it reads.
        max_tokens: `data.max_tokens`.

    Raises:
        ModelError: An embedding or a position is missing, or the model reads in both directions.
    """
    family = model.config.model_type
    if family in _BOTH_WAYS and not getattr(model.config, "is_decoder", False):
        raise ModelError(f"{key}: {family} reads in both directions and cannot answer; choose a decoder model")
    embedding: Any = model.get_input_embeddings()
    num_ids, num_rows = max(tokenizer.get_vocab().values()) + 1, embedding.weight.shape[0]
    if num_ids > num_rows:
        raise ModelError(
            f"{key}: the tokenizer has ids up to {num_ids - 1}, and the model embeddings for {num_rows} of them; "
            "resize its embeddings, or choose the tokenizer that it came with"
        )
    # Only tables end: rotary and relative positions go on beyond what a model was trained on.
    has_table = any(
        isinstance(module, nn.Embedding) and any(word in name.rsplit(".", 1)[-1] for word in ("position", "wpe"))
        for name, module in model.named_modules()
    )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if has_table and positions is not None and max_tokens > positions:
        raise ModelError(
            f"{key}: data.max_tokens is {max_tokens}, and the model has {positions} positions; set it to {positions} "
            "or less"
        )


def skeleton(config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedModel:
    """Return a model without memory for its weights, from its config alone.

    Args:
        config: Section of a model with a path or an architecture.
        tokenizer: Tokenizer that gives the vocabulary of a new model; None: the default vocabulary.

    Raises:
        ModelError: The model is missing, or its config does not work.
    """
    with torch.device("meta"):
        if config.architecture is not None:
            return _build(config.architecture, tokenizer, seed=0)
        assert config.path is not None
        ref = on_this_node(reference(config))
        check_place(ref)
        try:
            loaded = AutoConfig.from_pretrained(
                ref.directory or ref.path, revision=ref.revision, trust_remote_code=ref.trust_remote_code
            )
            return AutoModelForCausalLM.from_config(loaded, trust_remote_code=ref.trust_remote_code)
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"{ref.path}: cannot be loaded: {reason}") from error


def _build(architecture: dict[str, object], tokenizer: PreTrainedTokenizerBase | None, seed: int) -> PreTrainedModel:
    if tokenizer is None:
        return build_model(architecture, VOCABULARY_MULTIPLE, 0, None, seed)
    vocab_size = -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    eos_id, bos_id = tokenizer.eos_token_id, tokenizer.bos_token_id
    assert isinstance(eos_id, int)
    return build_model(architecture, vocab_size, eos_id, bos_id if isinstance(bos_id, int) else None, seed)


def _save_built(
    architecture: dict[str, object],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    run_dir: RunDirectory,
    rel: str,
) -> None:
    model = _build(architecture, tokenizer, seed)
    try:
        check_split(model)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"architecture: the model fails on its first tokens: {last_line(error)}") from error
    with tempfile.TemporaryDirectory() as scratch:
        run_dir.publish(save_model(model, tokenizer, Path(scratch) / "model"), rel)
