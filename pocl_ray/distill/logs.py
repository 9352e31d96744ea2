"""The log of a training worker, in Ray's log directory: every line names run, task, stage and rank."""

from __future__ import annotations

import logging
from typing import Any

FORMAT = "%(asctime)s %(levelname)s %(message)s"


class WorkerLog(logging.LoggerAdapter):  # type: ignore[type-arg]
    """Puts run, task, stage and rank before each message.

    Attributes:
        stage: The current one; set as it changes.
    """

    def __init__(self, run: str, task: str, rank: int) -> None:
        """Begin the log of a worker; it goes to stderr, which Ray keeps for each worker."""
        logger = logging.getLogger(f"pocl_ray.worker.{task}")
        if not logger.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter(FORMAT))
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
            logger.propagate = False
        super().__init__(logger, {})
        self.run, self.task, self.rank = run, task, rank
        self.stage = 0

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return the message as it is written."""
        return f"run={self.run} task={self.task} stage={self.stage} rank={self.rank} {msg}", kwargs
