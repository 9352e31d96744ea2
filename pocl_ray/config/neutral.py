"""The keys that a result does not depend on, and a config without them."""

from __future__ import annotations

from typing import Any

from pocl_ray.config.root import Config

# Keys that change the speed of a run or its machines, and not its results. The same run may go on with another value.
NEUTRAL = (
    "storage_path",
    "scaling",
    "report",
    "tracking",
    "hub",
    "tune",
    "experiment",
    "distill.chunk_mib",
    "teacher.sharded",
    "distill.kernel",
    "difficulty.batch_tokens",
    "train.micro_batch_rows",
    "train.micro_batch_tokens",
    "train.packing",
    "train.zero_stage",
    "train.offload_optimizer",
    "train.num_checkpoints",
    "train.checkpoint_every_steps",
    "train.checkpoint_buffer_gib",
    "train.log_every_steps",
    "train.max_nonfinite_steps",
)


def neutral_free(config: Config) -> dict[str, Any]:
    """Return the config as a tree, without the keys that do not change the result."""
    tree = config.model_dump(mode="json")
    for key in NEUTRAL:
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node.pop(leaf)
    return tree
