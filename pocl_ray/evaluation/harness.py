"""A task of EleutherAI's lm-evaluation-harness on a model that is loaded already, and the check before a run.

Everything that is measured is lm-eval's own work: prompts, requests, metrics and standard errors. It is imported here
alone, and only if the config names tasks.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl_ray.config import EvaluationTaskConfig
from pocl_ray.errors import ConfigError, ResourceError, UserError
from pocl_ray.heartbeat import beat
from pocl_ray.models.places import nearest
from pocl_ray.run_directory.digests import file_digest, fingerprint

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

KEY = "evaluation.tasks"
INSTALL = "pip install 'pocl-ray[lm-eval]'"
NONE = "none"
"""The name of the filter that leaves answers as they are; lm-eval's keys are `metric,filter`."""

_MAX_FOLDER_MIB = 1024
_MAX_NUMPY_SEED = 2**32
_BOOTSTRAP_ITERS = 1000  # of metrics that are no mean: their standard error is itself off by 2 % then
_CPU_BATCH_ROWS = 8
_NOISY = ("lm_eval", "datasets", "huggingface_hub")


def harness_version() -> str:
    """Return the version of lm-eval, on which its tasks depend."""
    return version("lm_eval")


def check_tasks(tasks: Sequence[EvaluationTaskConfig], seed: int) -> list[str]:
    """Check that each task can be made: its data set is loaded, and the requests of its first row are built.

    Returns:
        Warnings: settings of the config that a task does not follow.

    Raises:
        ConfigError: lm-eval is not installed, a folder is missing or too large, a name is unknown, or a task cannot be
            made. The message names the task and the remedy.
    """
    if tasks and find_spec("lm_eval") is None:
        raise ConfigError(f"{KEY}: lm-eval is not installed: {INSTALL}")
    return [warning for task in tasks for warning in _check_task(task, seed)]


def _check_task(task: EvaluationTaskConfig, seed: int) -> list[str]:
    folder = None if task.path is None else Path(task.path).expanduser().resolve()
    if folder is not None:
        _check_folder(task, folder)
    with _told_of(task), _quiet(folder):
        manager = _manager(task.name, folder)
        if task.name not in manager.all_tasks:
            own = f"path {task.path} defines no such task" if folder is not None else "lm-eval knows no such task"
            raise ConfigError(f"{KEY}: {task.name}: {own}{nearest(task.name, manager.all_tasks)}")
        loaded = manager.load([task.name])["tasks"]
        for name, made in loaded.items():
            if getattr(made, "UNSAFE_CODE", False):
                raise ConfigError(f"{KEY}: {name} runs code that a model writes, which pocl-ray does not; leave it out")
            for metric, aggregation in made.aggregation().items():
                if not callable(aggregation):  # lm-eval would only fail once all answers are there
                    raise ConfigError(f"{KEY}: {name}: lm-eval does not know how to aggregate metric {metric}")
            if getattr(made, "MULTIMODAL", False):
                raise ConfigError(f"{KEY}: {name} asks about images or sound, and students read text; leave it out")
            if task.num_fewshot is not None and made.get_config("num_fewshot") != 0:
                made.set_config(key="num_fewshot", value=task.num_fewshot)
            made.set_fewshot_seed(seed=seed)
            made.build_all_requests(limit=1)
    fixed = [name for name, made in loaded.items() if task.num_fewshot and made.get_config("num_fewshot") == 0]
    if not fixed:
        return []
    return [f"{KEY}: {', '.join(fixed)} sets num_fewshot 0, which lm-eval keeps, not {task.num_fewshot}"]


def _check_folder(task: EvaluationTaskConfig, folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError(f"{KEY}: {task.name}: path {task.path} is no folder; name the one that holds its YAML file")
    num_mib = sum(path.stat().st_size for path in _files(folder)) / 2**20
    if num_mib > _MAX_FOLDER_MIB:
        raise ConfigError(
            f"{KEY}: {task.name}: path {task.path} holds {num_mib:,.0f} MiB, and it is copied to the run directory "
            f"(at most {_MAX_FOLDER_MIB:,}); name a folder of tasks alone"
        )


def folder_digest(path: str) -> str:
    """Return the digest of all files of a folder of tasks, by name and content."""
    folder = Path(path).expanduser()
    return fingerprint([[str(file.relative_to(folder)), file_digest(file)] for file in _files(folder)])


def _files(folder: Path) -> list[Path]:
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in found if "__pycache__" not in path.parts]  # a check of the task writes these


def run_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: EvaluationTaskConfig,
    folder: Path | None,
    seed: int,
    batch_rows: int,
) -> dict[str, Any]:
    """Return a model's figures on a task, on a group and its tasks, or on all tasks of a tag.

    Args:
        model: Model on its device.
        tokenizer: Tokenizer of the model.
        task: Task, with the number of examples and of rows.
        folder: This node's copy of `task.path`; None without one.
        seed: Seed of all random draws, such as those of few-shot examples.
        batch_rows: Maximum number of requests that the model reads at once; on a CPU at most 8.

    Returns:
        `{task: {"metrics": {metric: {"value", "stderr", "higher_is_better", "num_rows"}}, "num_rows", "num_fewshot",
        "group"}}`, a group before its tasks. `stderr` is None where lm-eval has no estimate; `group` is the name of the
        group that a task belongs to.

    Raises:
        ResourceError: lm-eval is not installed on this node.
        ConfigError: The task cannot be made, or its own code failed.
    """
    if find_spec("lm_eval") is None:
        raise ResourceError(f"{KEY}: lm-eval is not installed on a node that evaluates: {INSTALL}")
    # Standard errors by bootstrap would otherwise fork this process, which holds a model, once for each CPU.
    os.environ["DISABLE_MULTIPROC"] = "1"
    watch = model.register_forward_pre_hook(lambda *_: beat(f"evaluating on {task.name}"))
    try:
        with _told_of(task), _quiet(folder):
            return _figures(_evaluated(_reader(model, tokenizer, batch_rows), task, folder, seed), task.name)
    finally:
        watch.remove()


def _reader(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_rows: int) -> HFLM:
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        # It holds the logits of a whole batch: on a GPU it finds the size that fits, elsewhere nothing would stop it.
        batch_size="auto" if model.device.type == "cuda" else min(_CPU_BATCH_ROWS, batch_rows),
        max_batch_size=batch_rows,
        softmax_dtype="float32",  # bfloat16 has three digits, too few to tell the log-probabilities of two answers
    )


def _evaluated(reader: HFLM, task: EvaluationTaskConfig, folder: Path | None, seed: int) -> Mapping[str, Any]:
    from lm_eval import simple_evaluate

    found = simple_evaluate(
        model=reader,
        tasks=[task.name],
        num_fewshot=task.num_fewshot,
        limit=task.limit,
        task_manager=_manager(task.name, folder),
        bootstrap_iters=_BOOTSTRAP_ITERS,
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed % _MAX_NUMPY_SEED,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    assert found is not None, "lm-eval returns None on other ranks, and there is one"
    return found


def _manager(name: str, folder: Path | None) -> TaskManager:
    """lm-eval's index of tasks. That of its own ones reads 15,000 files, so a folder goes without where it can."""
    from lm_eval.tasks import TaskManager

    if folder is None:
        return _own_tasks()
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return manager if _is_whole(manager, name) else TaskManager(include_path=str(folder))


def _is_whole(manager: TaskManager, name: str) -> bool:
    """Whether an index holds all members of a group, and of the groups in it."""
    content = manager.task_index[name].cfg if name in manager.all_groups else None
    listed = (content or {}).get("task", [])
    members = [one if isinstance(one, str) else one.get("task", one.get("group")) for one in listed]
    return all(member in manager.all_tasks and _is_whole(manager, member) for member in members)


@cache
def _own_tasks() -> TaskManager:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _figures(found: Mapping[str, Any], root: str) -> dict[str, Any]:
    """lm-eval's results in our form. Its keys are `acc,none` and `acc_stderr,none`."""
    members: Mapping[str, list[str]] = found["group_subtasks"]
    figures: dict[str, Any] = {}
    for name, group in _in_order(root, members, found["results"]):
        results, better = found["results"].get(name, {}), found["higher_is_better"].get(name) or {}
        metrics, num_rows = {}, results.get("sample_len")
        counts = results.get("sample_count", {})  # of a group: some of its tasks may lack the metric
        for key, value in results.items():
            metric, _, applied = key.rpartition(",")
            if not metric or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            metrics[metric if applied == NONE else key] = {
                "value": _finite(value),
                "stderr": _finite(results.get(f"{metric}_stderr,{applied}")),
                "higher_is_better": better.get(metric),
                "num_rows": counts.get(key, num_rows),
            }
        if metrics:
            settings = {"num_fewshot": found["n-shot"].get(name), "group": group}
            figures[name] = {"metrics": metrics, "num_rows": num_rows, **settings}
    return figures


def _in_order(root: str, members: Mapping[str, list[str]], results: Iterable[str]) -> list[tuple[str, str | None]]:
    """Every task with its group, a group before its members. A tag is not among the results, but its tasks are."""
    if root not in results:
        return [(name, None) for name in results]
    found: list[tuple[str, str | None]] = [(root, None)]
    for place, (name, _) in enumerate(found):  # the list grows meanwhile
        found[place + 1 : place + 1] = [(member, name) for member in members.get(name, ())]
    return found


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


class _Complaints(logging.Handler):
    """Keeps lm-eval's messages of errors, which often say more than the exception that follows."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self.lines.append(" ".join(record.getMessage().split()))


@contextlib.contextmanager
def _told_of(task: EvaluationTaskConfig) -> Iterator[None]:
    """Turn errors of a task into one line that names it. Its YAML, its code and its data are the user's or lm-eval's.

    Errors of the machine pass through.
    """
    complaints, logger = _Complaints(), logging.getLogger(_NOISY[0])
    logger.addHandler(complaints)
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except ConnectionError as error:
        raise ConfigError(
            f"{KEY}: {task.name}: its data set cannot be downloaded ({_line(error)}), and the cache of this machine "
            "does not hold it; start once with a connection, copy the cache (HF_HOME) from a machine that has it, or "
            "leave the task out"
        ) from error
    except ImportError as error:
        raise ConfigError(
            f"{KEY}: {task.name}: needs a package that is missing ({_line(error)}); install it, or leave the task out"
        ) from error
    except Exception as error:
        why = "; ".join([*complaints.lines[-1:], f"{type(error).__name__}: {_line(error)}"])
        raise ConfigError(
            f"{KEY}: {task.name}: lm-eval cannot run it ({why}); correct its YAML or its data, or leave it out"
        ) from error
    finally:
        logger.removeHandler(complaints)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _quiet(folder: Path | None) -> Iterator[None]:
    """Hide the bars and messages of lm-eval while the block runs, with a folder of tasks as the working directory."""
    levels = {name: logging.getLogger(name).level for name in _NOISY}
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            if folder is not None:
                stack.enter_context(contextlib.chdir(folder))  # data files of a task are relative to its folder
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
