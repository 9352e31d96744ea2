"""Memory of the host in training: what a step frees is kept for the next one."""

from __future__ import annotations

import ctypes

# Parameters of mallopt(3), and values in bytes.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_FREE, _LARGEST_KEPT = (1 << 31) - 1, 1 << 30


def keep_freed_memory() -> bool:
    """Have the C library keep freed buffers of up to 1 GiB, and return whether it does.

    By default glibc gives each buffer of more than 32 MiB back to the system, and a step asks for the same ones again:
    gradients of the embedding, logits, what DeepSpeed flattens. The kernel fills them with zeros every time. Another C
    library is left as it is.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    settings = ((_M_MMAP_THRESHOLD, _LARGEST_KEPT), (_M_TRIM_THRESHOLD, _KEPT_FREE))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)
