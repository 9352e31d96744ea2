"""Arrays that one worker has and all of them need."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist


def from_rank_zero(array: np.ndarray | None, dtype: torch.dtype, device: torch.device) -> np.ndarray:
    """Return rank 0's array of one axis on every worker; collective.

    Args:
        array: Array, on rank 0; None on the other ranks, or for an empty one.
        dtype: Dtype of the array.
        device: Device of collective operations.
    """
    if not dist.is_initialized():
        assert array is not None, "a process alone reads its own checkpoint"
        return array
    size = torch.tensor([0 if array is None else array.size], device=device)
    dist.broadcast(size, src=0)  # first: the others must make room for as many values
    values = torch.empty(int(size), dtype=dtype, device=device)
    if array is not None:
        values.copy_(torch.from_numpy(array))
    dist.broadcast(values, src=0)
    return values.cpu().numpy()
