"""Checks before expensive work: of inputs before anything is written, of settings once rows are prepared, and of the
cluster's room once Ray is connected."""

from __future__ import annotations

import os
import time
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.markup import escape
from transformers import PreTrainedTokenizerBase

from pocl_ray.config import Config, StudentConfig, TeacherConfig
from pocl_ray.config.sources import ModelConfig
from pocl_ray.console import console
from pocl_ray.curriculum.schedule import check_curriculum, loss_schedules, plan_sft
from pocl_ray.data.dealing import check_budget
from pocl_ray.data.prepare import Rows, data_fingerprint
from pocl_ray.data.prompts import PromptTemplate
from pocl_ray.data.row_store import RowStore
from pocl_ray.difficulty.choice import choose_signals
from pocl_ray.distill.engine import deepspeed_config
from pocl_ray.distill.kernels import divergences
from pocl_ray.distill.rollout_writers import check_backend
from pocl_ray.errors import ConfigError, UserError
from pocl_ray.evaluation.harness import check_tasks
from pocl_ray.models.loading import check_attention, check_int8
from pocl_ray.models.prepare import check_adapters, check_models, check_other_teacher, origin_fingerprint
from pocl_ray.preview import cache_bytes
from pocl_ray.ray_cluster.actor_pools import plan_pools
from pocl_ray.ray_cluster.capacity import is_one_machine, wait_for_workers, wants_gpu
from pocl_ray.ray_cluster.versions import check_same, skew_s, skew_warning, versions
from pocl_ray.records import Coverage
from pocl_ray.run_directory.disk import check_free
from pocl_ray.run_directory.storage import RunDirectory, check_lasts
from pocl_ray.tracking.run import check_trackers

RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""The variable that Ray sets in the environment of a submitted job."""

LOOK_S = 120.0
"""The time limit for a node to report its versions."""


def check_inputs(config: Config) -> Coverage | None:
    """Check, without rows or a cluster, that files, models, names and templates exist and fit.

    Returns:
        The share of the student that its adapters change, which the user is told; None without adapters.

    Raises:
        UserError: A file or model is missing, or a name is unknown.
    """
    if RAY_JOB in os.environ:
        check_lasts(config.storage_path)
    data_fingerprint(config.data)
    choose_signals(config.difficulty)
    moving = loss_schedules(config.distill, config.rollout)
    check_curriculum(config.curriculum, config.difficulty.rescore == "each_stage", moving)
    divergences(config.distill, config.rollout)
    check_backend(config.rollout)
    check_trackers(config.tracking)
    for text in check_tasks(config.evaluation.tasks, config.seed):
        console.print(f"[yellow]warning:[/] {escape(text)}")
    deepspeed_config(config.train, config.scaling.max_workers, 2 if config.rollout.beside_data else 1)
    check_rescoring(config)
    check_bridging(config)
    if config.data.prompt_template != "chat" and config.data.task != "text":
        PromptTemplate(config.data.prompt_template, None)
    for key, teacher in _teachers(config):
        if teacher.quantization == "int8":
            check_int8(key)
    for key, model in (*_teachers(config), ("student", config.student)):
        check_attention(key, model.attention)
        _check_origin(key, model)
    covered = check_adapters(config.teacher, config.student, *config.other_teachers)
    if covered is not None:
        console.print(f"{'[yellow]warning:[/]' if covered.is_little else '[yellow]note:[/]'} {escape(str(covered))}")
    return covered


def _check_origin(key: str, model: ModelConfig) -> None:
    try:
        origin_fingerprint(model)
    except UserError as error:
        raise type(error)(f"{key}.path: {error}") from error


def check_rescoring(config: Config) -> None:
    """Check that the teacher can be compared with the student again between stages.

    Raises:
        ConfigError: The cache does not hold the teacher's distribution, or a single worker cannot run the teacher.
    """
    compares = config.difficulty.rescore == "each_stage" and choose_signals(config.difficulty).compares
    if compares and config.distill.teacher_cache == "topk":
        raise ConfigError(
            "difficulty.rescore each_stage: a signal that compares the student with the teacher again needs the "
            "teacher's whole distribution, which distill.teacher_cache topk does not keep; set it to hidden or none, "
            "or leave teacher_student_kl and plug-ins out of difficulty.signals"
        )
    if compares and any(teacher.sharded for _, teacher in _teachers(config)):
        raise ConfigError(
            "difficulty.rescore each_stage: each worker scores rows of its own, and a teacher that is sharded over "
            "them runs on all at once; leave teacher_student_kl and plug-ins out of difficulty.signals, or set "
            "teacher.sharded to false"
        )


def check_bridging(config: Config) -> None:
    """Check that no plug-in compares models with different tokenizers.

    Raises:
        ConfigError: A signal of `difficulty.signals` does.
    """
    compared = choose_signals(config.difficulty).plugins
    if config.teacher.cross_tokenizer is not None and compared:
        raise ConfigError(
            f"difficulty.signals: {compared[0]} compares the two models' logits, which teacher.cross_tokenizer "
            f"{config.teacher.cross_tokenizer} leaves without a common vocabulary; leave it out"
        )


def check_settings(
    config: Config,
    num_rows: int,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Check everything that later steps would fail on; it needs neither weights in memory nor a cluster.

    Args:
        config: Config of the run.
        num_rows: Number of training rows.
        tokenizer: Tokenizer of the run, which gives the vocabulary of new models.
        teacher_tokenizer: Tokenizer of the teacher, if it keeps its own.

    Raises:
        ConfigError: There are fewer rows than a global batch holds.
        ModelError: A model has no weights or cannot be built, or a further teacher has another tokenizer.
    """
    for role, model in _models(config):
        if model.sft is not None:
            batch_rows = config.sft_train(model.sft).global_batch_rows
            plan_sft(num_rows, model.sft.num_epochs, model.sft.max_steps, batch_rows, f"{role}.sft")
    for other in config.other_teachers:
        check_other_teacher(other, tokenizer, config.data.max_tokens)
    warn_of_one_tokenizer(tokenizer, teacher_tokenizer)
    max_tokens = config.data.max_tokens
    warning = check_models(config.teacher, config.student, tokenizer, max_tokens, teacher_tokenizer)
    if warning is not None:
        console.print(f"[yellow]warning:[/] {warning}")


def check_budgets(config: Config, run_dir: RunDirectory, rows: Rows) -> None:
    """Check that the longest row fits each token budget; families that are padded are checked when they are loaded.

    Raises:
        ConfigError: It does not fit.
    """
    budgets = {key: budget for key, budget in _budgets(config).items() if isinstance(budget, int)}
    if not budgets:  # or all are found by the workers, on their GPUs
        return
    stores = [RowStore.open(run_dir.local(made.path)) for made in (rows.train, rows.dev)]
    longest = max(int((store.prompt_lengths + store.response_lengths).max()) for store in stores)
    for key, budget in budgets.items():
        written = config.data.max_tokens if key == "train" and config.rollout.is_on else 0
        check_budget(budget, max(longest, written), True, key)


def _budgets(config: Config) -> dict[str, int | str | None]:
    """Return the token budget of each section that trains."""
    models = [(f"{role}.sft.train", model.sft) for role, model in _models(config)]
    budgets = {key: config.sft_train(sft).micro_batch_tokens for key, sft in models if sft is not None}
    return {**budgets, "train": config.train.micro_batch_tokens}


def warn_of_one_tokenizer(tokenizer: PreTrainedTokenizerBase, teachers: PreTrainedTokenizerBase | None) -> None:
    """Warn if both tokenizers are the same although they are bridged: a divergence by token would say more."""
    if teachers is not None and teachers.get_vocab() == tokenizer.get_vocab():
        console.print(
            "[yellow]warning:[/] teacher and student have the same tokenizer, over which a divergence token by token "
            "says more than sorted probabilities: remove teacher.cross_tokenizer and choose another distill.loss"
        )


def check_room(config: Config) -> None:
    """Check that the connected cluster has room for the training workers and for the actors.

    Raises:
        ResourceError: There is no room, or no GPU although one is requested.
        ConfigError: A setting does not fit workers with GPUs, or without.
    """
    scaling = config.scaling
    use_gpu = wants_gpu(scaling)
    if use_gpu:
        check_whole_gpus(config)
    else:
        check_without_gpus(config)
    wait_for_workers(scaling, use_gpu)
    plan_pools(scaling, [scaling.student_actors, scaling.teacher_actors], num_tasks=1)


def check_whole_gpus(config: Config) -> None:
    """Refuse to fill a GPU that workers share.

    Raises:
        ConfigError: The config asks for it.
    """
    share = config.scaling.resources_per_worker.get("GPU", 1)
    autos = [key for key, budget in _budgets(config).items() if budget == "auto"]
    if autos and share < 1:
        raise ConfigError(
            f"{autos[0]}.micro_batch_tokens: auto fills a whole GPU, of which scaling.resources_per_worker gives a "
            f"worker {share:g}; set a number of tokens, or micro_batch_rows in its place"
        )


def check_without_gpus(config: Config) -> None:
    """Refuse settings that need a GPU.

    Raises:
        ConfigError: The config has such a setting.
    """
    divergences(config.distill, config.rollout, torch.device("cpu"))
    for key, budget in _budgets(config).items():
        if budget == "auto":
            raise ConfigError(
                f"{key}.micro_batch_tokens: auto measures a GPU's memory, and the workers have none; set a number of "
                "tokens, or micro_batch_rows in its place"
            )
    for key, model in (*_teachers(config), ("student", config.student)):
        if model.attention == "flash_attention_2":
            raise ConfigError(
                f"{key}.attention: flash_attention_2 runs on GPUs, and the workers have none; set it to auto"
            )
    if config.rollout.backend == "vllm":
        raise ConfigError("rollout.backend: vllm runs on GPUs, and the workers have none; set it to transformers")


def check_disk(config: Config, run_dir: RunDirectory, rows: Rows) -> None:
    """Check that the teacher caches fit the disk of the run directory.

    Raises:
        ResourceError: They do not fit.
    """
    read = rows.as_teacher_reads
    num_bytes = cache_bytes(config, (read.train, read.dev))
    if num_bytes is not None and config.distill.teacher_cache != "none":
        remedy = "make room, choose another storage_path, or set distill.teacher_cache to topk or none"
        check_free(run_dir, num_bytes, "the teacher's answers", remedy)


def check_nodes() -> None:
    """Check that all nodes of the cluster run the same versions as this process; a single machine always does.

    Nodes that an autoscaler starts later are checked when they train. A clock that is far off gives a warning.

    Raises:
        ResourceError: A node has other versions, or lacks the project.
    """
    if is_one_machine():
        return

    def look() -> tuple[
        dict[str, str], float
    ]:  # nested, so that Ray sends its code, since the module may be missing on the node
        try:
            from pocl_ray.ray_cluster.versions import versions
        except ImportError:
            return {"pocl-ray": "none, or an older one"}, time.time()
        return versions(), time.time()

    here, told = versions(), ray.remote(num_cpus=0, max_retries=0)(look)
    asked_at = time.time()
    asked: list[tuple[str, Any]] = []
    for node in ray.nodes():
        if node["Alive"]:
            only_there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked.append((node["NodeManagerAddress"], told.options(scheduling_strategy=only_there).remote()))
    for address, answer in asked:
        try:
            theirs, their_time = ray.get(answer, timeout=LOOK_S)
        except RayError as error:  # the node may be gone or busy; training checks again
            console.print(f"[yellow]warning:[/] node {address} does not tell its versions ({type(error).__name__})")
            continue
        check_same(here, theirs, f"node {address}")
        if warning := skew_warning(f"node {address}", skew_s(asked_at, their_time, time.time())):
            console.print(f"[yellow]warning:[/] {warning}")


def _models(config: Config) -> tuple[tuple[str, TeacherConfig | StudentConfig], ...]:
    """The models that may be fine-tuned first, each with its key."""
    return ("teacher", config.teacher), ("student", config.student)


def _teachers(config: Config) -> list[tuple[str, TeacherConfig]]:
    """All teachers, each with its key."""
    others = [(f"other_teachers.{place}", one) for place, one in enumerate(config.other_teachers)]
    return [("teacher", config.teacher), *others]
