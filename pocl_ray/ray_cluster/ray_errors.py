"""Ray's errors about processes that died, as one line for the user."""

from __future__ import annotations

from collections.abc import Iterator

from ray.exceptions import RayActorError

from pocl_ray.errors import GaveUpError, UserError
from pocl_ray.run_directory.disk import machine_fault

MAX_CHARS = 200
ENDS = (UserError, GaveUpError)
_DETAIL = "Worker exit detail:"
_NO_WORD = "connection error code 2"  # Ray's text for every process that ends without a message to Ray
_HEADS = ("The actor died unexpectedly", "The actor is dead because its worker process has died")


def explain_death(error: RayActorError) -> str:
    """Return why the process of an actor died: its exit, or the loss of its node, without ids and addresses."""
    text = str(error)
    if _NO_WORD in text:
        return "its process was killed or crashed (out of memory, perhaps)"
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("\t")]
    said = [line.rpartition(_DETAIL)[2].strip() for line in lines if _DETAIL in line or not line.startswith(_HEADS)]
    return one_line(" ".join(said) or text)


def one_line(text: str) -> str:
    """Return a text as one line of at most MAX_CHARS characters."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_CHARS else f"{line[: MAX_CHARS - 3]}..."


def find_user_error(error: BaseException) -> UserError | GaveUpError | None:
    """Return the UserError or GaveUpError in a chain of Ray's wrappers, or None."""
    for found in _wrapped(error):
        # RayTaskError also creates an instance of the cause's class; the cause itself is the plain error.
        if isinstance(found, ENDS) and not isinstance(getattr(found, "cause", None), ENDS):
            return type(found)(str(found).splitlines()[0])  # Ray Data appends lines about its retries
        if fault := machine_fault(found, "actors write"):
            return fault
    return None


def find_actor_death(error: BaseException) -> RayActorError | None:
    """Return the error about a dead actor in a chain of Ray's wrappers, or None."""
    return next((found for found in _wrapped(error) if isinstance(found, RayActorError)), None)


def _wrapped(error: BaseException) -> Iterator[BaseException]:
    """An error and all errors that it wraps, as Python's causes or as Ray's."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        found = pending.pop()
        if found is None or id(found) in seen:
            continue
        yield found
        seen.add(id(found))
        pending += [found.__cause__, found.__context__, getattr(found, "cause", None)]
