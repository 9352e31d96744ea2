"""Asks the Hub whether it answers at all, in seconds: huggingface_hub itself tries for half a minute.

What the Hub then says, and a connection that fails in the middle of an upload, is left to huggingface_hub, which tries
those again.
"""

from __future__ import annotations

import time
from functools import cache

from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import get_session

TIMEOUT_S = 4.0
PAUSE_S = 0.5
"""The seconds between the two questions, since the first one may meet a network that is just coming up."""


@cache
def _ask() -> None:
    """Ask once a process; a question that failed is asked again the next time."""
    session = get_session()
    try:
        session.head(constants.ENDPOINT, timeout=TIMEOUT_S)
    except Exception:  # of the library that huggingface_hub talks HTTP with, which depends on its version
        time.sleep(PAUSE_S)
        session.head(constants.ENDPOINT, timeout=TIMEOUT_S)


def hub_fault() -> str | None:
    """Return why the Hub cannot be reached, with the remedy, as the end of a line; None if it answers.

    Any answer will do, and a refusal too: whether the Hub allows something is known only when it is asked for it.
    """
    try:
        _ask()
    except OfflineModeIsEnabled:
        return "the Hub cannot be reached (HF_HUB_OFFLINE is set; unset it)"
    except Exception as error:  # an HF_ENDPOINT that is no URL has an error of its own kind
        reason = " ".join(str(error).split()) or type(error).__name__
        return (
            f"the Hub cannot be reached at {constants.ENDPOINT} ({reason}); check the network, and HF_ENDPOINT and "
            "HTTPS_PROXY where you need them, and try again"
        )
    return None
