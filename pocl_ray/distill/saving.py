"""Writing checkpoints beside training: one thread that takes finished tensors to disk, in order. No Ray.

Gathering is collective and stops training; what comes after (files, digests, the way to storage) does not. Host
memory is bounded: whoever brings more than fits waits, so a state of any size passes through.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class Writer:
    """Runs jobs one after the other in a thread of its own. After a failed one no other runs, and every call raises."""

    def __init__(self, buffer_bytes: int) -> None:
        """Set it up; the thread starts with the first job.

        Args:
            buffer_bytes: What jobs may hold in memory while they wait; 0 does each of them at once, in the caller.
        """
        self.buffer_bytes = buffer_bytes
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._change = threading.Condition()
        self._num_bytes = self._num_jobs = 0
        self._failure: BaseException | None = None

    def submit(self, job: Callable[[], T], num_bytes: int = 0) -> Future[T]:
        """Have a job done; waits where it holds more than there is room for.

        Args:
            job: What is to be done.
            num_bytes: Memory that is free when it is done.

        Returns:
            Its result to be.
        """
        with self._change:
            self._change.wait_for(
                lambda: self._num_bytes == 0 or num_bytes == 0 or self._num_bytes + num_bytes <= self.buffer_bytes
            )
            self._raise_failure()
            self._num_bytes += num_bytes
            self._num_jobs += 1
        done = self._pool.submit(self._run, job, num_bytes)
        if self.buffer_bytes == 0:
            done.result()
        return done

    def join(self) -> None:
        """Wait until all jobs are done.

        Raises:
            Exception: What one of them raised.
        """
        with self._change:
            self._change.wait_for(lambda: self._num_jobs == 0)
            self._raise_failure()

    def close(self) -> None:
        """End the thread once all jobs are done, whatever came of them."""
        self._pool.shutdown()

    def _run(self, job: Callable[[], T], num_bytes: int) -> T:
        try:
            self._raise_failure()
            return job()
        except BaseException as error:
            self._failure = self._failure or error
            raise
        finally:
            del job  # and the memory that it holds
            with self._change:
                self._num_bytes -= num_bytes
                self._num_jobs -= 1
                self._change.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


@dataclass(frozen=True)
class Written:
    """A checkpoint that is being written.

    Attributes:
        directory: Where its files come to lie; whoever is given this takes it over.
        whole: Done when all of them do.
    """

    directory: Path
    whole: Future[None]

    def wait(self) -> Path:
        """Return the directory once it is whole.

        Raises:
            Exception: What the writing raised.
        """
        self.whole.result()
        return self.directory


class Uploads:
    """Where checkpoints go once they are written; this one is for a loop whose checkpoints go nowhere."""

    def wait(self) -> None:
        """Wait until the last checkpoint has arrived; nothing to wait for on workers that sent none."""

    def meet(self) -> None:
        """Wait for all workers, for as long as it takes: a collective would take a long upload for a hang."""


def link_tree(source: Path, target: Path) -> None:
    """Give the files of a directory a second name in another, which stays when the first is gone; copies elsewhere."""
    shutil.copytree(source, target, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a filesystem without links
        shutil.copy2(source, target)
