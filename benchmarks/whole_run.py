"""A whole run from rows to the distilled student, four stages: `pocl-ray distill` against the authors' scripts.

    python benchmarks/whole_run.py [--teacher DIR] [--rows FILE] [--num-rows 32] [--epochs 1] [--rounds 1]

    ours     one command: rows read, scored and ranked, the teacher's hidden states cached by the same pass, four stages
    authors  `authors_scripts.py`: a scoring script, then a script for each stage, each of which loads all again

Counted is everything from the start of the first process to the end of the last: imports, Ray, loading, scoring,
training, saving. Both have all cores, float32, the same models, rows, batches, steps and schedules. The order of the
rows must be the same, and the losses of all steps agree to 1e-3. Evaluations are in neither; ours cannot be left out,
and is one token for one dev row. Processes and their imports weigh more the smaller the run is: `--epochs 8` is the
published number.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from authors_scripts import LOSSES, ORDER, SETTINGS, read_rows
from measuring import (
    Agreement,
    Bar,
    Measurement,
    SideRun,
    add_json_option,
    conclude,
    ratio_of,
    report_side,
    summarize,
)
from text_rows import MAX_PROMPT_TOKENS, MAX_TOKENS, TEMPLATE, stop_tokens, word_tokenizer, write_rows
from training_sides import PREPARE, add_model_options, models_of, run_apart
from transformers import PreTrainedTokenizerBase

from pocl_ray.models.loading import load_tokenizer
from pocl_ray.models.saving import save_model

BAR, SAME_LOSS = 6.0, 1e-3
SIDES = ("ours", "authors")
STAGES, SEED, LEARNING_RATE, SCORING_BATCH = 4, 0, 1e-4, 16
HERE = Path(__file__).resolve().parent


def prepare(options: argparse.Namespace) -> None:
    """Write models, rows and the settings of both sides into the folder."""
    folder, models = options.folder, models_of(options)
    vocabulary = models["student"].config.vocab_size
    tokenizer = load_tokenizer(options.teacher) if options.teacher else word_tokenizer(vocabulary)
    if not options.teacher:
        models["student"].generation_config.eos_token_id = stop_tokens(vocabulary)
    for name, model in models.items():
        save_model(model, tokenizer, folder / name)
    settings = {
        "rows": str(folder / "rows.jsonl"),
        "template": TEMPLATE,
        "max_tokens": MAX_TOKENS,
        **{name: str(folder / name) for name in models},
        "new_tokens": options.new_tokens,
        "scoring_batch": SCORING_BATCH,
        "stages": STAGES,
        "epochs": options.epochs,
        "batch": options.batch,
        "learning_rate": LEARNING_RATE,
        "seed": SEED,
    }
    write_texts(options, settings, tokenizer)
    (folder / SETTINGS).write_text(json.dumps(settings))
    (folder / "config.yaml").write_text(json.dumps(our_config(options, settings)))  # JSON is YAML
    print("{}")


def write_texts(options: argparse.Namespace, settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the rows, of which none has to be cut: how a long one is cut is not what is compared here."""
    path = Path(settings["rows"])
    if not (options.rows and options.teacher):
        write_rows(path, options.num_rows, len(tokenizer), SEED)
        return
    found = read_rows({**settings, "rows": str(options.rows)}, tokenizer)
    lines = options.rows.read_text(encoding="utf-8").splitlines()
    fitting = [
        line
        for line, row in zip(lines, found, strict=True)
        if len(row.prompt) <= MAX_PROMPT_TOKENS and len(row.prompt) + len(row.response) <= MAX_TOKENS
    ][: options.num_rows]
    if len(fitting) < options.num_rows:
        raise SystemExit(f"{options.rows}: {len(fitting)} rows fit, {options.num_rows} are needed; lower --num-rows")
    path.write_text("\n".join(fitting) + "\n", encoding="utf-8")


def our_config(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the config of the run, with the settings of the paper but for the sizes."""
    source = {"path": settings["rows"]}
    return {
        "name": "whole",
        "storage_path": str(options.folder / "runs"),
        "seed": SEED,
        "data": {
            "train": source,
            "dev": {**source, "max_rows": 1},
            "prompt_template": TEMPLATE,
            "max_prompt_tokens": MAX_PROMPT_TOKENS,
            "max_tokens": MAX_TOKENS,
        },
        "teacher": {"path": settings["teacher"], "dtype": "float32"},
        "student": {"path": settings["student"]},
        "difficulty": {
            "generation": {
                "sampling_temperature": 0.0,
                "no_repeat_ngram_size": 6,
                "max_new_tokens": options.new_tokens,
            }
        },
        "curriculum": {
            "num_buckets": STAGES,
            "interval_epochs": options.epochs,
            "kd_temperature": {"shape": "linear", "start": 1.0, "end": 2.0, "decimals": 2},
            "kd_ratio": {"shape": "linear", "start": 0.7, "end": 1.0, "decimals": 2},
            "optimizer": "restart",
            "hand_off": "last",
        },
        "distill": {"loss": "forward_kl", "teacher_cache": "hidden"},
        "train": {
            "global_batch_rows": options.batch,
            "micro_batch_rows": options.batch,
            "learning_rate": LEARNING_RATE,
            "precision": "fp32",
            "eval_every_epochs": options.epochs,
        },
        "evaluation": {"max_dev_rows": 1, "dev_generation": {"max_new_tokens": 1}},
        "scaling": {"cpus_per_worker": os.cpu_count() or 1},
        "tracking": [],
    }


def commands_of(side: str, folder: Path) -> list[list[str]]:
    """Return the command lines of a side, one after the other."""
    if side == "ours":
        return [[sys.executable, "-m", "pocl_ray", "distill", str(folder / "config.yaml")]]
    script = [sys.executable, str(HERE / "authors_scripts.py"), str(folder)]
    return [[*script, "score"], *([*script, "stage", str(stage)] for stage in range(STAGES))]


def run_side(options: argparse.Namespace) -> None:
    """Run the processes of one side and report them."""
    if options.side == PREPARE:
        prepare(options)
        return
    folder: Path = options.folder
    settings = json.loads((folder / SETTINGS).read_text())
    # As many threads as there are cores: for torch by itself, and from Ray for a worker that has all of them.
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    env["RAY_worker_niceness"] = "0"  # else workers give way to all that runs
    (folder / LOSSES).unlink(missing_ok=True)
    started = time.perf_counter()
    for command in commands_of(options.side, folder):
        status = subprocess.run(command, env=env, stdout=sys.stderr).returncode
        if status != 0:
            raise SystemExit(f"{' '.join(command[1:])} failed with exit status {status}")
    seconds = time.perf_counter() - started
    if options.side == "ours":
        order, losses = results_of(folder / "runs" / "whole")
        (folder / "runs").rename(folder / f"runs-{time.monotonic_ns()}")  # the next round begins at the start
    else:
        order = json.loads((folder / ORDER).read_text())
        losses = [json.loads(line) for line in (folder / LOSSES).read_text().splitlines()]
    report_side(SideRun([seconds], tokens_of(settings, order), 0, losses, json.dumps(order)))


def results_of(run: Path) -> tuple[list[int], list[float]]:
    """Return the order of the rows and the loss of each step of our run."""
    scores = pq.read_table(run / "scores.parquet").sort_by("rank")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return scores["id"].to_pylist(), [record["train/loss"] for record in records if "train/loss" in record]


def tokens_of(settings: dict[str, Any], order: list[int]) -> int:
    """Return the tokens of all rows of all epochs, prompts and responses; of whole batches alone."""
    rows = read_rows(settings, load_tokenizer(settings["student"]))
    lengths = [len(rows[row].prompt) + len(rows[row].response) for row in order]
    ends = [len(order) if stage == STAGES - 1 else len(order) // STAGES * (stage + 1) for stage in range(STAGES)]
    return settings["epochs"] * sum(sum(lengths[:end]) for end in ends)


def measurement_of(options: argparse.Namespace, runs: dict[str, list[SideRun]]) -> Measurement:
    """Return the row of the table."""
    ours, authors = (runs[side] for side in SIDES)
    ratio = ratio_of(ours, authors)
    pairs = [*zip(ours, authors, strict=True)]
    is_complete = all(len(own.losses) == len(theirs.losses) > 0 for own, theirs in pairs)
    apart = [abs(a / b - 1) for own, theirs in pairs for a, b in zip(own.losses, theirs.losses, strict=False)]
    models = "SmolLM2-135M" if options.teacher else "random weights of the shape of SmolLM2-135M"
    rows = "real rows" if options.rows and options.teacher else "rows of random words as long as Dolly's"
    setting = (
        f"{models} to {options.student_layers} layers, {options.num_rows} {rows}, {options.epochs} epoch(s) a stage, "
        f"{len(ours[0].losses)} steps of {options.batch} rows, answers of at most {options.new_tokens} tokens, fp32, "
        f"{os.cpu_count()} cores, {options.rounds} round(s)"
    )
    return Measurement(
        "whole run from rows to student, four stages",
        "the authors' scripts re-stated",
        setting,
        (Bar("times as fast", ratio.median, BAR),),
        # Without the peak memory, which is that of several processes here.
        (replace(summarize("ours", ours), peak_gib=None), replace(summarize("authors", authors), peak_gib=None)),
        ratio,
        (
            Agreement("orders of the rows", float(len({run.answers for run in (*ours, *authors)}) > 1), 0.0),
            Agreement("losses of all steps", max(apart) if is_complete else float("inf"), SAME_LOSS),
        ),
    )


def main() -> int:
    """Run the rounds and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--num-rows", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4, help="rows of an optimizer step")
    parser.add_argument("--epochs", type=int, default=1, help="of a stage")
    parser.add_argument("--new-tokens", type=int, default=64, help="most tokens of an answer")
    parser.add_argument("--rounds", type=int, default=1)
    add_json_option(parser)
    parser.add_argument("--side", choices=[*SIDES, PREPARE], help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.bf16 = False
    if options.side:
        run_side(options)
        return 0
    if options.num_rows // STAGES < options.batch:
        parser.error(f"--num-rows must be at least {STAGES} times --batch")
    runs = run_apart(__file__, SIDES, options.rounds, sys.argv[1:])
    return conclude([measurement_of(options, runs)], options.json)


if __name__ == "__main__":
    sys.exit(main())
