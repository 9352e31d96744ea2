"""Going on from a checkpoint: the newest one that is whole, the same on every worker. No Ray.

A node that dies while it writes, or a disk that loses a block, leaves a checkpoint that must not be trained on. Every
file of a checkpoint has its digest in `progress.json`, so that this is seen, and the checkpoint before is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from pocl_ray.distill.checkpoint import DamagedCheckpointError, Progress, read_progress
from pocl_ray.distill.loop import TrainingLoop
from pocl_ray.errors import StorageError


class Saved(Protocol):
    """A checkpoint in storage, as Ray Train hands it out."""

    path: str

    def as_directory(self) -> AbstractContextManager[str]:
        """Give a local directory of its files while the context lasts."""


@contextmanager
def newest_whole(checkpoints: Sequence[Saved], warn: Callable[[str], object]) -> Iterator[tuple[Progress, Path] | None]:
    """Give the newest checkpoint whose files are all as they were written.

    Args:
        checkpoints: The newest first.
        warn: Told of each one that is passed over.

    Yields:
        Its progress and a local directory of its files; None where there are no checkpoints.

    Raises:
        StorageError: All of them are damaged, or another version wrote them.
    """
    for number, checkpoint in enumerate(checkpoints, 1):
        with ExitStack() as stack:
            try:
                directory = Path(stack.enter_context(checkpoint.as_directory()))
                progress = read_progress(directory)
            except (DamagedCheckpointError, FileNotFoundError) as error:
                reason = (
                    error if isinstance(error, DamagedCheckpointError) else f"{checkpoint.path}: no such checkpoint"
                )
                if number == len(checkpoints):
                    raise StorageError(
                        f"{reason}, and there is no whole one before it; delete {Path(checkpoint.path).parent} to "
                        "train from the start"
                    ) from None
                warn(f"{reason}; going on from the one before")
                continue
            yield progress, directory
            return
    yield None


def resume(
    loop: TrainingLoop,
    checkpoints: Sequence[Saved],
    share: Callable[[Any], Any],
    warn: Callable[[str], object],
) -> None:
    """Restore the newest whole checkpoint, or leave the loop at its start; collective.

    Rank 0 alone reads and checks, and tells the others what it found: they could not see different states, nor wait
    in a collective for one that gave up.

    Args:
        loop: Fresh from its set-up.
        checkpoints: The newest first; looked at on rank 0.
        share: Returns on every worker what rank 0 gave it; may take as long as rank 0 needs to read.
        warn: Told, on rank 0, of damaged checkpoints.

    Raises:
        StorageError: On every worker: all checkpoints are damaged, or another version wrote them.
    """
    with ExitStack() as stack:
        own: tuple[Progress, Path] | None = None
        told: Progress | StorageError | None = None
        if loop.engine.rank == 0:
            try:
                own = stack.enter_context(newest_whole(checkpoints, warn))
                told = None if own is None else replace(own[0], metrics=[])  # the stream is rank 0's to write
            except StorageError as error:
                told = error
        outcome = share(told)
        if isinstance(outcome, StorageError):
            raise outcome
        if own is not None:
            loop.restore(*own)
        elif outcome is not None:
            loop.restore(outcome, None)
