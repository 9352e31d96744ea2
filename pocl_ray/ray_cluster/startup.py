"""The start of a process: garbage collection waits until its imports are over.

Importing torch, transformers and Ray makes hundreds of thousands of objects, and all of them stay. The collector looks
through them again and again meanwhile and finds nothing, which is a fifth of the CPU seconds of a start. Every process
of a run pays for its own imports: the driver, Ray Train's controller, each training worker, each actor of Ray Data.
"""

from __future__ import annotations

import gc
import threading

AT_MOST_S = 20.0
"""The time after which a process collects again although it has not said that its imports are over."""

_waiting = threading.Event()


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
