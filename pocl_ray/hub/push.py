"""The command `pocl-ray push`: one commit to a repository of the Hub, made if it is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from pocl_ray.errors import ConfigError, StorageError, UserError
from pocl_ray.hub.origins import origins_of
from pocl_ray.report.model_card import Origin, model_card
from pocl_ray.run_directory.claim import CONFIG
from pocl_ray.run_directory.hub_access import hub_fault
from pocl_ray.run_directory.manifest import ENVIRONMENT
from pocl_ray.run_directory.opening import PastRun

What = Literal["student", "adapters", "teacher-cache"]
EXTRA = ("config.yaml", "environment.json", "evaluation.json", "report.html", "report.md")
NEEDED: dict[What, tuple[str, ...]] = {
    "student": ("distill", "evaluation", "report"),
    "adapters": ("distill", "evaluation", "report"),
    "teacher-cache": ("scores",),
}
README = "README.md"
TOKENIZER = "tokenizer"
# A connection that fails is an error of the library that huggingface_hub talks HTTP with. Which one that is depends on
# its version, so it is read from the errors that are built on it.
UNREACHED: tuple[type[Exception], ...] = (
    OSError,
    *(
        kind
        for kind in HfHubHTTPError.__mro__
        if issubclass(kind, Exception) and kind.__module__.partition(".")[0] not in ("builtins", "huggingface_hub")
    ),
)

T = TypeVar("T")


def check_repo(repo: str, key: str) -> None:
    """Check the name of a repository.

    Args:
        repo: Name, `owner/name`.
        key: Argument or key that it comes from, for the message.

    Raises:
        ConfigError: The Hub takes no such name.
    """
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise ConfigError(f"{key}: {repo!r} is no repository; write owner/name, such as my-name/my-student")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"{key}: {_line(error)}") from None


def check_token(key: str) -> None:
    """Check that there is a token for the Hub; whether it may write is known only when it is used.

    Raises:
        UserError: There is none.
    """
    if get_token() is None:
        raise UserError(f"{key}: there is no token for the Hub; run `hf auth login`, or set HF_TOKEN")


def push(run: PastRun, repo: str, private: bool, what: What) -> str:
    """Push the outcome of a run in one commit, and return the URL of the commit.

    Args:
        run: Run whose outcome is pushed.
        repo: Repository, `owner/name`; it is made if it is missing.
        private: Whether a repository that is made is private.
        what: `student`: model, tokenizer, card, report and config; `adapters`: the adapters in place of the model;
            `teacher-cache`: the caches, to a repository of data.

    Raises:
        UserError: The name is none, there is no token or it may not write, the run is not finished or has nothing of
            this kind, or the Hub cannot be reached.
    """
    check_repo(repo, "push")
    run.require(NEEDED[what])
    folder = run.run_dir.local(_folder(run, what))
    _check_weights(run, folder)
    check_token("push")
    if fault := hub_fault():
        raise UserError(f"push: {repo}: {fault}")
    operations = list(_files_of(folder))
    if what == "adapters" and run.run_dir.exists(TOKENIZER):
        operations += _files_of(run.run_dir.local(TOKENIZER))
    is_cache, is_adapter = what == "teacher-cache", what == "adapters"
    card = _cache_card(run) if is_cache else model_card(run.run_dir, _origins(run), repo, is_adapter)
    operations.append(CommitOperationAdd(README, card.encode("utf-8", errors="replace")))
    for name in EXTRA:
        if run.run_dir.exists(name):
            operations.append(CommitOperationAdd(name, run.run_dir.read_bytes(name)))
    kind = "dataset" if is_cache else "model"
    api = HfApi()
    _asked(repo, lambda: _check_card(card, kind))
    _asked(repo, lambda: api.create_repo(repo, repo_type=kind, private=private, exist_ok=True))
    message = f"{what} of the run {run.config.name}, distilled with pocl-ray"
    done: Any = _asked(repo, lambda: api.create_commit(repo, operations, commit_message=message, repo_type=kind))
    return str(done.commit_url)


def _files_of(folder: Path) -> Iterator[CommitOperationAdd]:
    """Yield what a folder holds but its card, which is written again, with licences."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / README:
            yield CommitOperationAdd(str(path.relative_to(folder)), str(path))


def _check_card(card: str, kind: str) -> None:
    """Have the Hub check the metadata of a card."""
    try:
        ModelCard(card).validate(repo_type=kind)
    except ValueError as error:
        raise UserError(f"push: the Hub refuses the model card ({_line(error)})") from None


def _folder(run: PastRun, what: What) -> str:
    """The folder of the run directory that is pushed."""
    folder = {"student": "student", "adapters": "student/adapter", "teacher-cache": "teacher_cache"}[what]
    if not run.run_dir.exists(folder):
        why = {
            "student": "the student was deleted; run the step distill again",
            "adapters": "the run trained no adapters (student.lora); push the student",
            "teacher-cache": "the run kept none (distill.teacher_cache: none)",
        }[what]
        verb = "are" if what == "adapters" else "is"
        raise StorageError(f"{run.place}: there {verb} no {what}: {why}")
    return folder


def _check_weights(run: PastRun, folder: Path) -> None:
    """Refuse a folder without weights: what is pushed would load nowhere."""
    if not any(folder.rglob("*.safetensors")) and not any(folder.rglob("*.arrow")):
        raise StorageError(
            f"{folder}: holds no weights (*.safetensors) and no cache (*.arrow); delete it, and "
            f"`pocl-ray run {run.run_dir.uri_of(CONFIG)}` makes it again"
        )


def _asked(repo: str, ask: Callable[[], T]) -> T:
    """The answer of the Hub; a refusal is one line."""
    try:
        return ask()
    except RepositoryNotFoundError:
        raise UserError(
            f"push: the Hub has no {repo} that this token may see; check the owner, or log in with `hf auth login`"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            remedy = "use a token with write access: `hf auth login`, or HF_TOKEN"
            raise UserError(f"push: the Hub refuses to write to {repo} ({status}); {remedy}") from None
        raise UserError(f"push: {repo}: the Hub failed ({_line(error)}); try again") from None
    except UNREACHED as error:
        raise UserError(f"push: {repo}: the Hub cannot be reached ({_line(error)}); try again") from None


def _origins(run: PastRun) -> list[Origin]:
    environment = run.run_dir.read_json(ENVIRONMENT) if run.run_dir.exists(ENVIRONMENT) else {}
    return origins_of(run.config, environment)


def _cache_card(run: PastRun) -> str:
    """The card of a teacher cache."""
    kind = run.config.distill.teacher_cache
    lines = [f"- {o.role} {o.name}: {o.licence or 'the licence is not known'}" for o in _origins(run)]
    return "\n".join(
        [
            "---",
            "tags:",
            "- distillation",
            "- pocl-ray",
            "---",
            "",
            f"# Teacher cache of the run {run.config.name}",
            "",
            "The outputs of a teacher on the rows of a run of pocl-ray "
            f"(`distill.teacher_cache: {kind}`), one folder for each set.",
            "`config.yaml` names teacher and rows. Only runs with the same teacher and rows can read the cache.",
            "",
            "## Licences",
            "",
            *lines,
            "",
        ]
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
