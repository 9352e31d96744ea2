"""The start of a process: how torch gets its memory, and garbage collection that waits until the imports are over.

Importing torch, transformers and Ray makes hundreds of thousands of objects, and all of them stay. The collector looks
through them again and again meanwhile and finds nothing, which is a fifth of the CPU seconds of a start. Every process
of a run pays for its own imports: the driver, Ray Train's controller, each training worker, each actor of Ray Data.
"""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

AT_MOST_S = 20.0
"""The time after which a process collects again although it has not said that its imports are over."""

_waiting = threading.Event()


def memory_settings() -> dict[str, str]:
    """Return the variables by which torch uses memory better; it reads them when it first allocates.

    Tensors of 2 MiB and more get huge pages where the kernel has them, which it fills with zeros far faster than small
    ones. oneDNN keeps the code of the last 64 matrix products in place of 1,024: packed batches have ever new shapes,
    so older ones do not come back. `docs/performance.md` has the effect of both.
    """
    huge_pages = {"THP_MEM_ALLOC_ENABLE": "1"} if HUGE_PAGES.exists() else {}
    return {**huge_pages, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}


def set_up_memory() -> None:
    """Give `memory_settings` to this process, before it imports torch; what the user has set stays."""
    for name, value in memory_settings().items():
        os.environ.setdefault(name, value)


def put_off_collections(at_most_s: float = AT_MOST_S) -> None:
    """Collect no garbage until `collect_again`, or for so many seconds; without effect where it is off already."""
    if not gc.isenabled():
        return
    gc.disable()
    _waiting.set()
    timer = threading.Timer(at_most_s, collect_again)
    timer.daemon = True
    timer.start()


def collect_again() -> None:
    """Collect garbage as before, except for the objects that exist now, since imported modules stay.

    It does nothing unless collections were put off.
    """
    if _waiting.is_set():
        _waiting.clear()
        gc.freeze()
        gc.enable()
