"""What can be found wrong before anything expensive: inputs before anything is written, settings once the rows are
prepared, and the cluster's room as soon as Ray is connected."""

from __future__ import annotations

import os
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from transformers import PreTrainedTokenizerBase

from pocl_ray.config import Config, ScalingConfig
from pocl_ray.console import console
from pocl_ray.curriculum.schedule import check_curriculum, plan_sft
from pocl_ray.data.preparing import Rows, data_fingerprint
from pocl_ray.data.prompts import PromptTemplate
from pocl_ray.difficulty.choice import choose_signals
from pocl_ray.disk import check_free
from pocl_ray.distill.engine import deepspeed_config
from pocl_ray.distill.losses import resolve_loss
from pocl_ray.distill.room import is_one_machine, wait_for_room
from pocl_ray.evaluation.actors import plan_pools, wants_gpu
from pocl_ray.models.preparing import check_models, origin_fingerprint
from pocl_ray.preview import cache_bytes
from pocl_ray.storage import RunDirectory
from pocl_ray.stores import check_lasts
from pocl_ray.versions import check_same, versions

RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the environment of a submitted job."""

LOOK_S = 120.0
"""How long a node may take to say which versions it has."""


def check_inputs(config: Config) -> None:
    """Check what needs neither rows nor a cluster: that files, models, names and templates are there and fit.

    Raises:
        UserError: A file or model is missing, or a name is unknown.
    """
    if RAY_JOB in os.environ:
        check_lasts(config.storage_path)
    data_fingerprint(config.data)
    choose_signals(config.difficulty)
    check_curriculum(config.curriculum)
    resolve_loss(config.distill.loss, config.distill.loss_args, config.distill.scale_by_t_squared)
    deepspeed_config(config.train, config.scaling.max_workers)
    if config.data.prompt_template != "chat":
        PromptTemplate(config.data.prompt_template, None)
    for model in (config.teacher, config.student):
        origin_fingerprint(model)


def check_settings(config: Config, num_rows: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check what the later steps would stumble over; needs neither weights in memory nor a cluster.

    Args:
        config: The run.
        num_rows: Training rows.
        tokenizer: The run's; gives the vocabulary of models that are made.

    Raises:
        ConfigError: Fewer rows than a global batch holds.
        ModelError: A model has no weights, or cannot be made.
    """
    for role, model in (("teacher", config.teacher), ("student", config.student)):
        if model.sft is not None:
            batch_rows = config.sft_train(model.sft).global_batch_rows
            plan_sft(num_rows, model.sft.num_epochs, model.sft.max_steps, batch_rows, f"{role}.sft")
    warning = check_models(config.teacher, config.student, tokenizer)
    if warning is not None:
        console.print(f"[yellow]warning:[/] {warning}")


def check_room(scaling: ScalingConfig) -> None:
    """Check that the cluster that is connected has room for the training workers and for the actors.

    Raises:
        ResourceError: It has not, or has no GPU where one is asked for.
    """
    wait_for_room(scaling, wants_gpu(scaling, ray.cluster_resources()))
    plan_pools(scaling, [scaling.student_actors, scaling.teacher_actors], num_tasks=1)


def check_disk(config: Config, run_dir: RunDirectory, rows: Rows) -> None:
    """Check that the teacher cache will fit the disk of the run directory.

    Raises:
        ResourceError: It will not.
    """
    num_bytes = cache_bytes(config, (rows.train, rows.dev))
    if num_bytes is not None and config.distill.teacher_cache == "hidden":
        remedy = (
            "make room, choose another storage_path, or set distill.cache_dtype to bfloat16 or teacher_cache to none"
        )
        check_free(run_dir, num_bytes, "the teacher's hidden states", remedy)


def check_nodes() -> None:
    """Check that all nodes of the cluster run the same versions as this process; a machine alone always does.

    Nodes that an autoscaler starts later are looked at when they train.

    Raises:
        ResourceError: A node has other versions, or none of the project.
    """
    if is_one_machine():
        return

    def look() -> dict[str, str]:  # nested, so that Ray sends its code: the module may be missing there
        try:
            from pocl_ray.versions import versions
        except ImportError:
            return {"pocl-ray": "none, or an older one"}
        return versions()

    here, told = versions(), ray.remote(num_cpus=0, max_retries=0)(look)
    asked: dict[str, Any] = {}
    for node in ray.nodes():
        if node["Alive"]:
            only_there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[node["NodeManagerAddress"]] = told.options(scheduling_strategy=only_there).remote()
    for address, answer in asked.items():
        try:
            theirs = ray.get(answer, timeout=LOOK_S)
        except RayError as error:  # it may have been taken away, or be busy; training asks again
            console.print(f"[yellow]warning:[/] node {address} does not tell its versions ({type(error).__name__})")
            continue
        check_same(here, theirs, f"node {address}")
