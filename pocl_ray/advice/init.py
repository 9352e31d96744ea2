"""The command `pocl-ray init`: from rows and two models to a commented config that runs as it is."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import psutil
import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pocl_ray.advice.choices import (
    MOST_TOKENS,
    Machine,
    Target,
    check_teacher_fits,
    choose_holdout,
    choose_tokens,
    choose_training,
)
from pocl_ray.advice.first_rows import (
    NUM_LOOKED,
    Lengths,
    Meaning,
    count_all,
    has_turns,
    measure,
    read_first,
    recognise,
)
from pocl_ray.advice.model_shape import look_at, tokenizer_if_reachable
from pocl_ray.advice.writing import Findings, Models, decisions, render
from pocl_ray.config import DataConfig, SourceConfig, StudentConfig, TeacherConfig, load_config
from pocl_ray.config.sources import ColumnRole
from pocl_ray.data.prompts import PromptTemplate
from pocl_ray.data.readers import Reject, SourceRow
from pocl_ray.errors import ConfigError, DataError, ModelError, StorageError
from pocl_ray.models.loading import check_same_tokenizer
from pocl_ray.run_directory.disk import GIB
from pocl_ray.run_directory.storage import replacing_file

FILE_WIDTH = 140  # of the table, where there is no terminal that has one
ASSUMED_GPU_GIB, ASSUMED_CLUSTER_GPUS = 24.0, 8
_CHAT_NAMES = re.compile(r"(?i)(instruct|chat|(?:^|-)it(?:-|$))")
_NUMBER = re.compile(r"-?[0-9]+")
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Request:
    """The arguments of the command.

    Attributes:
        teacher: Directory or Hub id.
        student: Directory or Hub id, or a number of the teacher's layers.
        train: Source of the training rows.
        dev: Source of the dev rows; None takes them from the training rows.
        target: Kind of machine; None: this one.
        out: File to write; None: the student's name.
        columns: Texts such as `prompt=query,output=reply`.
        num_gpus: GPUs; None: those of this machine, or an assumption.
        gpu_gib: Memory of a GPU; None: that of this machine's, or an assumption.
        force: Whether to replace a file.
    """

    teacher: str
    student: str
    train: str
    dev: str | None = None
    target: Target | None = None
    out: Path | None = None
    columns: str = ""
    num_gpus: int | None = None
    gpu_gib: float | None = None
    force: bool = False

    @property
    def is_cut(self) -> bool:
        """Whether the student is cut from the teacher's layers; a number below 1 is refused later."""
        return _NUMBER.fullmatch(self.student) is not None


def init(request: Request) -> Path:
    """Write the config, print what was decided and why, and return the file.

    Raises:
        UserError: The file is there already, rows or models are missing, columns cannot be recognised, or the models do
            not fit the machine. Nothing is written then.
    """
    name = _name_of(f"{request.teacher}-{request.student}-layers" if request.is_cut else request.student)
    out = request.out or Path(f"{name}.yaml")
    if os.path.exists(out) and not request.force:
        raise StorageError(f"{out}: is there already; choose another --out, or replace it with --force")
    findings = look(request, _name_of(out.stem) if request.out else name)
    text = render(findings)
    with replacing_file(out, "--out") as new:
        new.write_text(text, encoding="utf-8")
        try:
            load_config(new)  # a config that is refused never gets its name
        except ConfigError as error:
            raise ConfigError(str(error).replace(str(new), str(out))) from None
    _show(findings, out)
    return out


def look(request: Request, name: str) -> Findings:
    """Return everything that the config is made of, without writing anything.

    Raises:
        UserError: Rows or models are missing or do not fit.
    """
    if not request.train:
        raise DataError("--train is empty; name a file, a folder, a glob or a Hub id")
    for option, place in (("--teacher", request.teacher), ("--student", request.student)):
        if not place.strip():
            raise ModelError(f"{option} is empty; name a model directory or a Hub id")
    if request.gpu_gib is not None and not math.isfinite(request.gpu_gib):
        raise ConfigError(f"--gpu-gib {request.gpu_gib}: write the memory of a GPU in GiB, such as 24")
    source = SourceConfig(path=request.train)
    rows = read_first(source, "train")
    meaning = recognise(request.train, rows, _parse_columns(request.columns))
    source = source.model_copy(update={"columns": meaning.mapping})
    dev = None if request.dev is None else _dev_source(request.dev, meaning, _parse_columns(request.columns))
    models = _look_at_models(request)
    own = models.tokenizers[int(models.bridged)]
    template = _template(rows, meaning, models.tokenizers if models.bridged else (own,), request.teacher)
    data = DataConfig(train=source, holdout_rows=1, task=meaning.task, prompt_template=template[0])
    lengths = measure(rows, data, own)
    _check_rejects(request.train, lengths, len(rows), data.max_reject_share)
    num_rows = count_all(data) + 1
    if num_rows < 2 and dev is None:
        raise DataError(f"{request.train}: of one row no dev row can be held out; give more rows, or dev rows by --dev")
    machine = this_machine(request)
    large, small = models.shapes
    check_teacher_fits(machine, large)
    positions = [shape.num_positions for shape in (large, small) if shape is not None and shape.num_positions]
    tokens = choose_tokens(lengths, min([MOST_TOKENS[machine.target], *positions]))
    holdout = 0 if dev is not None else choose_holdout(num_rows)
    head, is_cut = 0 if large is None else large.size.head_weights, models.student.num_layers is not None
    training = choose_training(machine, small, head, tokens.max_tokens, num_rows - holdout, is_cut)
    return Findings(
        name, models, source, dev, meaning, template, lengths, len(rows), num_rows, holdout, machine, tokens, training
    )


def _name_of(place: str) -> str:
    """The name of a run: the end of a path, with the signs that a name may have."""
    parts = [part for part in place.rstrip("/").split("/") if part not in ("", ".", "..")] or ["run"]
    return _NOT_IN_A_NAME.sub("-", parts[-1]).strip("-._") or "run"


def _parse_columns(text: str) -> dict[ColumnRole, str]:
    """The mapping of `--columns`."""
    mapping: dict[ColumnRole, str] = {}
    roles = get_args(ColumnRole)
    for pair in filter(None, (part.strip() for part in text.split(","))):
        role, equals, column = (part.strip() for part in pair.partition("="))
        if not equals or not column or role not in roles:
            raise ConfigError(f"--columns {pair!r}: write ROLE=NAME, where a role is one of {', '.join(roles)}")
        # The topic may be told by a column that is read as well.
        pairs = ((other, name) for other, name in mapping.items() if other == role or "topic" not in (other, role))
        taken = next((other for other, name in pairs if other == role or name == column), None)
        if taken is not None:
            raise ConfigError(f"--columns {text!r}: gives {role}={column} and {taken}={mapping[taken]}; name each once")
        mapping[cast(ColumnRole, role)] = column
    return mapping


def _dev_source(path: str, train: Meaning, given: dict[ColumnRole, str]) -> SourceConfig:
    source = SourceConfig(path=path)
    meaning = recognise(path, read_first(source, "dev"), given)
    if meaning.task != train.task:
        raise DataError(
            f"{path}: its columns are those of {meaning.task} rows, and the training rows are {train.task}; "
            "say which is which with --columns"
        )
    return source.model_copy(update={"columns": meaning.mapping})


def _look_at_models(request: Request) -> Models:
    teacher = TeacherConfig(path=request.teacher)
    is_cut = request.is_cut
    try:
        student = StudentConfig(num_layers=int(request.student)) if is_cut else StudentConfig(path=request.student)
    except ValueError:
        raise ConfigError(f"--student {request.student}: at least 1 layer of the teacher is needed") from None
    shapes = look_at(teacher, student, None)
    tokenizers = [tokenizer_if_reachable(teacher) if shapes[0] is not None else None, None]
    if not is_cut and shapes[1] is not None:
        try:
            tokenizers[1] = tokenizer_if_reachable(student)
        except ModelError:  # it brings none, and takes the teacher's
            tokenizers[1] = None
    return Models(teacher, student, shapes, (tokenizers[0], tokenizers[1]), _differ(*tokenizers))


def _differ(teachers: Any, students: Any) -> bool:
    """Whether the models have different tokenizers, as far as both are known."""
    if teachers is None or students is None:
        return False
    try:
        check_same_tokenizer(teachers, students)
    except ModelError:
        return True
    return False


def _template(
    rows: Sequence[SourceRow | Reject], meaning: Meaning, tokenizers: Sequence[Any], teacher: str
) -> tuple[str, str]:
    """The name of the prompt template, and why."""
    if meaning.task == "text":
        return "alpaca", "not used: plain text has no prompt"
    turns = has_turns(rows, meaning)
    if None in tokenizers:
        if turns or _CHAT_NAMES.search(teacher):
            return "chat", "assumed by the teacher's name: its tokenizer is not here"
        return "alpaca", "assumed: the teacher's tokenizer is not here; chat for a chat model"
    try:
        for tokenizer in tokenizers:
            PromptTemplate("chat", tokenizer)
        return "chat", "the tokenizer has a chat template"
    except (ConfigError, ModelError) as error:
        if turns:
            raise DataError(
                "rows with conversations of several turns need a model with a chat template "
                f"({error}); choose another teacher, or give rows of one turn"
            ) from None
    if meaning.roles.get("output") == "completion":
        return "plain", "prompt and completion are one running text"
    return "alpaca", "the papers' text; the tokenizer has no chat template"


def _check_rejects(place: str, lengths: Lengths, num_looked: int, limit: float) -> None:
    if lengths.num_rejected > limit * num_looked:
        raise DataError(
            f"{place}: {lengths.num_rejected} of the first {num_looked} rows cannot be used ({lengths.reason}), and a "
            f"run stops above {limit:.0%}; mend them, or say which columns are meant with --columns"
        )


def this_machine(request: Request) -> Machine:
    """Return the machine that a config is for: this one, or what is assumed of another."""
    num_here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    target: Target = request.target or ("gpu" if num_here else "laptop")
    cpus, free = os.cpu_count() or 1, shutil.disk_usage(Path.cwd()).free
    if target == "laptop":
        memory = psutil.virtual_memory().total / GIB
        return Machine(target, 1, memory, cpus, free, has_bf16=False, is_seen=True)
    is_here = num_here > 0 and target == "gpu"
    gpus = request.num_gpus or (num_here if is_here else ASSUMED_CLUSTER_GPUS if target == "cluster" else 1)
    here = torch.cuda.get_device_properties(0).total_memory / GIB if is_here else ASSUMED_GPU_GIB
    has_bf16 = torch.cuda.is_bf16_supported() if is_here else True
    return Machine(
        target, gpus, request.gpu_gib or here, cpus, free if target == "gpu" else None, has_bf16, is_seen=is_here
    )


def _show(findings: Findings, out: Path) -> None:
    """Print the decisions, a row as the models will read it, and what to do next."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("what", "chosen", "why"):
        table.add_column(heading, overflow="fold")
    for row in decisions(findings):
        table.add_row(*map(escape, row))
    console.print(table)
    prompt, response = findings.lengths.example
    if findings.meaning.task != "text":
        console.print(f"a row as the models read it:\n{escape(_short(prompt))}[bold]{escape(_short(response))}[/]\n")
    looked = min(NUM_LOOKED, findings.num_rows)
    console.print(
        f"looked at the first {looked} rows; wrote {out}. Next:\n"
        f"  pocl-ray plan {out}\n  pocl-ray run {out} --dry-run\n  pocl-ray run {out}"
    )


def _short(text: str, most: int = 600) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"
