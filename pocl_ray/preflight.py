"""What can be found wrong before anything expensive: inputs before anything is written, settings once the rows are
prepared, and the cluster's room as soon as Ray is connected."""

from __future__ import annotations

import os

import ray
from transformers import PreTrainedTokenizerBase

from pocl_ray.config import Config, ScalingConfig
from pocl_ray.console import console
from pocl_ray.curriculum.schedule import check_curriculum, plan_sft
from pocl_ray.data.preparing import data_fingerprint
from pocl_ray.data.prompts import PromptTemplate
from pocl_ray.difficulty.choice import choose_signals
from pocl_ray.distill.engine import deepspeed_config
from pocl_ray.distill.losses import resolve_loss
from pocl_ray.distill.room import wait_for_room
from pocl_ray.evaluation.actors import plan_pools, wants_gpu
from pocl_ray.models.preparing import check_models, origin_fingerprint
from pocl_ray.stores import check_lasts

RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the environment of a submitted job."""


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
