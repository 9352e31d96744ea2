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


def from_all_ranks(own_MP: torch.Tensor) -> torch.Tensor:
    """Return the rows of all workers, rank 0's first; collective.

    Args:
        own_MP: Rows of this worker, shape (M, P); the number of rows M may be another on each worker, and 0.
    """
    num_ranks = dist.get_world_size()
    if num_ranks == 1:
        return own_MP
    sizes = [torch.zeros(1, dtype=torch.int64, device=own_MP.device) for _ in range(num_ranks)]
    dist.all_gather(sizes, torch.tensor([len(own_MP)], device=own_MP.device))
    most = max(int(size) for size in sizes)
    padded = torch.cat([own_MP, own_MP.new_zeros(most - len(own_MP), own_MP.shape[1])])
    found = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(found, padded)
    return torch.cat([values[: int(size)] for values, size in zip(found, sizes, strict=True)])
