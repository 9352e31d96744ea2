"""What Ray says of a process that died, as one line for the user."""

from __future__ import annotations

from ray.exceptions import RayActorError

MAX_CHARS = 200
_DETAIL = "Worker exit detail:"
_NO_WORD = "connection error code 2"  # what Ray says of every process that ends without telling it
_HEADS = ("The actor died unexpectedly", "The actor is dead because its worker process has died")


def died_of(error: RayActorError) -> str:
    """Return why the process of an actor died: its exit, or what became of its node, without ids and addresses."""
    text = str(error)
    if _NO_WORD in text:
        return "its process was killed or crashed (out of memory, perhaps)"
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("\t")]
    said = [line.rpartition(_DETAIL)[2].strip() for line in lines if _DETAIL in line or not line.startswith(_HEADS)]
    return one_line(" ".join(said) or text)


def one_line(text: str) -> str:
    """Return a text as one line of at most MAX_CHARS."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_CHARS else f"{line[: MAX_CHARS - 3]}..."
