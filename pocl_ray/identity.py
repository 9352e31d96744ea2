"""What a run directory belongs to: the config that made it, and the machines and versions that did the work."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import yaml

from pocl_ray.config import Config
from pocl_ray.config.loading import dump_config
from pocl_ray.errors import StorageError
from pocl_ray.records import Stage
from pocl_ray.storage import RunDirectory

CONFIG = "config.yaml"
PACKAGES = ("pocl-ray", "ray", "torch", "deepspeed", "transformers", "datasets", "pyarrow", "numpy")

# Keys that change how fast or on what a run goes, and not what it computes: another value goes on with the same run.
NEUTRAL = (
    "storage_path",
    "scaling",
    "report",
    "tune",
    "distill.chunk_mib",
    "difficulty.batch_tokens",
    "train.micro_batch_rows",
    "train.zero_stage",
    "train.offload_optimizer",
    "train.num_checkpoints",
    "train.checkpoint_every_steps",
    "train.log_every_steps",
)


def neutral_free(config: Config) -> dict[str, Any]:
    """Return the config as a tree without the keys that do not change the result."""
    tree = config.model_dump(mode="json")
    for key in NEUTRAL:
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node.pop(leaf)
    return tree


def ranking_dependencies(config: Config, signals: str) -> list[Any]:
    """Return all that the ranking depends on, given the fingerprint of the signals."""
    settings = config.difficulty.model_dump(mode="json", include={"signals", "rrf_k", "tie_break"})
    return [signals, settings, config.seed]


def distill_dependencies(config: Config, ranking: str, student: str, stages: Sequence[Stage]) -> list[Any]:
    """Return all that a distilled student depends on, given the fingerprints of the ranking and of its start."""
    train = neutral_free(config)["train"]
    seed = train.pop("seed")
    return [
        ranking,
        student,
        [stage.to_json() for stage in stages],
        train,
        config.distill.model_dump(mode="json", include={"loss", "loss_args", "scale_by_t_squared"}),
        config.evaluation.model_dump(mode="json", include={"dev_generation", "max_dev_rows"}),
        config.curriculum.hand_off,
        config.seed if seed is None else seed,
    ]


def sft_dependencies(config: Config, role: Literal["teacher", "student"]) -> Any:
    """Return what supervised fine-tuning of a model adds to its dependencies; None where there is none."""
    sft = getattr(config, role).sft
    if sft is None:
        return None
    merged = neutral_free(config.model_copy(update={"train": config.sft_train(sft)}))["train"]
    del merged["seed"]
    return [sft.model_dump(mode="json", exclude={"train"}), merged]


def claim(run_dir: RunDirectory, config: Config, resume_with_changes: bool) -> None:
    """Take a run directory for this config, or refuse.

    Raises:
        StorageError: It belongs to a run with another config; the message says what differs.
    """
    if run_dir.exists(CONFIG) and not resume_with_changes:
        try:
            earlier = Config.model_validate(yaml.safe_load(run_dir.read_text(CONFIG)))
        except (ValueError, yaml.YAMLError):
            raise StorageError(
                f"{run_dir.uri_of(CONFIG)}: written by another version of pocl-ray; choose another name"
            ) from None
        changes = list(differences(neutral_free(earlier), neutral_free(config)))
        if changes:
            raise StorageError(
                f"{run_dir.uri}: belongs to a run with another config: {'; '.join(changes)}. Choose another name, or "
                "pass --resume-with-changes to run the steps that this concerns again"
            )
    run_dir.write_text(CONFIG, dump_config(config))


def differences(before: Any, now: Any, key: str = "") -> Iterator[str]:
    """Yield `key: before -> now` for each leaf of two trees that differs."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in sorted({*before, *now}):
            yield from differences(before.get(name), now.get(name), f"{key}.{name}" if key else str(name))
    elif before != now:
        yield f"{key}: {before!r} -> {now!r}"


def environment() -> dict[str, Any]:
    """Return versions, the project's git revision, and the nodes of the cluster that is connected."""
    import ray

    nodes = [
        {
            "cpus": node["Resources"].get("CPU", 0),
            "gpus": node["Resources"].get("GPU", 0),
            "memory_gib": round(node["Resources"].get("memory", 0) / 2**30, 1),
            "devices": sorted(
                k.removeprefix("accelerator_type:") for k in node["Resources"] if "accelerator_type" in k
            ),
        }
        for node in (ray.nodes() if ray.is_initialized() else [])
        if node["Alive"]
    ]
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "git_revision": _git_revision(),
        "platform": platform.platform(),
        "nodes": nodes,
        "written_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    project = Path(__file__).resolve().parents[1]
    if not (project / ".git").exists():
        return None
    command = ["git", "-C", str(project), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"})
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
