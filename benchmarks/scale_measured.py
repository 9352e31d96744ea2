"""Measurements that check `scale_model.py`: seconds of steps of several sizes, and rows per second of scoring on Ray.

    python benchmarks/scale_measured.py                       fit the form of a step's time to measured steps
    python benchmarks/scale_measured.py --scoring 2000,8000   and score so many short rows with a tiny model, on Ray

The form, `FLOPs / rate + overhead`, is fitted to all steps but one, and then held against that one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
from scale_model import Model, fit, training_flops

from pocl_ray.models.places import ModelRef
from pocl_ray.records import RowsSummary
from pocl_ray.run_directory.storage import RunDirectory

TOLERANCE = 0.25
EVEN = 0.15
BYTES_A_ROW = 200.0
REPEATS = 5
DISTINCT, DISTINCT_ROWS = "rows/distinct.arrow", 10_000
WARM_ROWS, MAX_TOKENS = 64, 64
SMALL_ROWS, SMALL_REPEATS = 20_000, 3
SHAPES = ((2, 4), (2, 16), (6, 8), (10, 4), (10, 16))
"""Layers and rows; the last is what the fit has not seen."""
WORDS = "apple river stone cloud green seven market window silver garden morning paper".split()  # noqa: SIM905


def calibrate() -> bool:
    """Fit the form of the model to measured steps, and say whether it meets the one left out."""
    points = []
    print(f"\nsteps on this machine\n{'layers':>6} {'rows':>5} {'GFLOP':>7} {'s':>8} {'predicted':>10}")
    for layers, rows in SHAPES:
        points.append(_measured_step(layers, rows))
    rate, overhead = fit(points[:-1])
    for (layers, rows), (flops, seconds) in zip(SHAPES, points, strict=True):
        print(f"{layers:6d} {rows:5d} {flops / 1e9:7.1f} {seconds:8.3f} {flops / rate + overhead:10.3f}")
    flops, seconds = points[-1]
    error = (flops / rate + overhead) / seconds - 1
    print(f"{rate / 1e9:.1f} GFLOP/s and {1000 * overhead:.0f} ms a step; the last step, not fitted: {error:+.0%}")
    return abs(error) < TOLERANCE


def _measured_step(layers: int, num_rows: int) -> tuple[float, float]:
    """FLOPs of a distillation step by the model, and its seconds: the least of several."""
    import torch
    from step_sides import OurStep, random_model, random_rows, smollm2_shape, student_of

    teacher = random_model(smollm2_shape(layers, vocabulary=4096, hidden=192), seed=0).eval()
    student = student_of(teacher, max(1, layers // 2))
    side = OurStep(student, teacher)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    rows = random_rows(num_rows, 4096, seed=1)
    side.prepare(rows)
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        side.loss(rows).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    longest = max(len(row.ids_T) for row in rows)
    response = sum(len(row.ids_T) - row.num_prompt_tokens for row in rows)
    return training_flops(_shape(student), _shape(teacher), num_rows * longest, response), min(seconds)


def _shape(model: object) -> Model:
    config, parameters = model.config, dict(model.named_parameters())  # type: ignore[attr-defined]
    body = sum(p.numel() for name, p in parameters.items() if "embed_tokens" not in name and "lm_head" not in name)
    return Model(body, config.hidden_size, config.num_hidden_layers, config.vocab_size, 0)


@dataclass(frozen=True)
class _Prepared:
    """A run directory with two tiny models and some rows, of which sets of any size are made and scored."""

    run_dir: RunDirectory
    teacher: ModelRef
    student: ModelRef


@dataclass(frozen=True)
class _Scored:
    """The cost of scoring a set: rows per second after the start of processes, all seconds, and the driver's memory."""

    rate: float
    seconds: float
    bytes_before: int
    peak_bytes: int


def score_sizes(sizes: Sequence[int]) -> bool:
    """Score row sets of several sizes; whether rows a second are even and the driver's memory stays flat.

    Rows a second are those after the first fifth, when processes have started and models are loaded; small sets are
    scored several times, as a second of something else on the machine is much for them. Memory is what the driver
    itself allocated (the kernel's RssAnon), not what it maps of the rows' file and of Ray's object store.
    """
    from pocl_ray.ray_cluster.session import ray_session

    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - else workers give way to all that runs
    print(f"\nscoring on Ray\n{'rows':>9} {'s':>8} {'rows/s':>8} {'driver MiB before':>18} {'at its peak':>12}")
    with tempfile.TemporaryDirectory() as folder, ray_session():
        made = _prepare(Path(folder))
        _score(made, WARM_ROWS)
        job = []
        for size in sizes:
            runs = [_score(made, size) for _ in range(SMALL_REPEATS if size <= SMALL_ROWS else 1)]
            median = sorted(runs, key=lambda run: run.rate)[len(runs) // 2]
            job.append(median)
            memory = f"{median.bytes_before / 2**20:18.0f} {median.peak_bytes / 2**20:12.0f}"
            print(f"{size:9,d} {median.seconds:8.1f} {median.rate:8.0f} {memory}", flush=True)
    rates = [each.rate for each in job]
    evenness = max(rates) / min(rates) - 1
    growth = (job[-1].peak_bytes - job[0].peak_bytes) / max(1, sizes[-1] - sizes[0])
    print(f"rows a second differ by {evenness:.0%}; the driver's peak grows by {growth:.0f} bytes a row")
    return evenness < EVEN and growth < BYTES_A_ROW


def _prepare(folder: Path) -> _Prepared:
    from pocl_ray.config import DataConfig, SourceConfig
    from pocl_ray.data.rows import prepare_rows
    from pocl_ray.data.tokenization import train_tokenizer
    from pocl_ray.models.building import build_model
    from pocl_ray.models.loading import load_tokenizer
    from pocl_ray.models.saving import save_model

    texts = [" ".join(words) for words in np.random.default_rng(0).choice(WORDS, size=(DISTINCT_ROWS, 4))]
    lines = [json.dumps({"instruction": "Copy:", "input": text, "output": text}) + "\n" for text in texts]
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    run_dir = RunDirectory.open(str(folder), "run")
    train_tokenizer(lines[:500], 300, run_dir.local("tokenizer"))
    tokenizer = load_tokenizer(str(run_dir.local("tokenizer")))
    lengths = {"max_prompt_tokens": 40, "max_tokens": MAX_TOKENS}
    config = DataConfig(train=SourceConfig(path="unused"), holdout_rows=1, prompt_template="plain", **lengths)
    prepare_rows("distinct", SourceConfig(path=str(folder / "rows.jsonl")), config, tokenizer, run_dir.local(DISTINCT))
    refs = []
    for seed, width in enumerate((32, 16)):
        sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
        shape = {"model_type": "llama", **sizes, **heads}
        model = build_model(shape, len(tokenizer), tokenizer.eos_token_id, None, seed)
        refs.append(ModelRef(str(save_model(model, tokenizer, run_dir.local(f"models/{width}")))))
    return _Prepared(run_dir, *refs)


def _rows(run_dir: RunDirectory, num_rows: int) -> RowsSummary:
    """Write a set of so many rows, the distinct ones over and over: all sets are then alike but for their size."""
    from pocl_ray.data.row_store import ROWS_SCHEMA, RowStore
    from pocl_ray.data.rows import arrow_writer, summarize_rows
    from pocl_ray.records import ID

    store, name = RowStore.open(run_dir.local(DISTINCT)), f"rows{num_rows}"
    path = run_dir.local(f"rows/{name}.arrow")
    with arrow_writer(path, ROWS_SCHEMA) as writer:
        written = 0
        for batch in itertools.cycle(store.batches):
            part = batch.slice(0, num_rows - written)
            ids = pa.array(np.arange(written, written + part.num_rows))
            writer.write_batch(part.set_column(0, ROWS_SCHEMA.field(ID), ids))
            written += part.num_rows
            if written == num_rows:
                break
    return summarize_rows(name, path, 0)


def _score(made: _Prepared, num_rows: int) -> _Scored:
    from pocl_ray.config import DifficultyConfig, ScalingConfig
    from pocl_ray.difficulty import job

    came: list[tuple[float, int]] = []

    class Clocked(job.Results):
        """Results that note when they came."""

        def add(self, table: pa.Table) -> None:
            super().add(table)
            came.append((time.perf_counter(), self.num_results))

    rows = _rows(made.run_dir, num_rows)
    generation = {"max_new_tokens": 4, "batch_rows": 256}
    before, start = _own_bytes(), time.perf_counter()
    with patch.object(job, "Results", Clocked), _Peak() as peak:
        inputs = job.ScoringInputs(
            rows=rows,
            dev_rows=rows,
            run_dir=made.run_dir,
            tokenizer="tokenizer",
            student=made.student,
            teacher=made.teacher,
            cache=None,
            difficulty=DifficultyConfig.model_validate({"generation": generation}),
            max_tokens=MAX_TOKENS,
            seed=0,
            compare=False,
        )
        table, _ = job.score_rows(inputs, ScalingConfig())
    seconds = time.perf_counter() - start
    assert table.num_rows == num_rows
    (started, first), (ended, last) = next(each for each in came if each[1] >= num_rows / 5), came[-1]
    return _Scored((last - first) / (ended - started or math.inf), seconds, before, peak.bytes)


class _Peak:
    """The most memory of its own that this process holds while a block runs, looked at 50 times a second."""

    def __enter__(self) -> _Peak:
        self.bytes, self._over = _own_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.bytes = max(self.bytes, _own_bytes())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def _own_bytes() -> int:
    """Anonymous resident memory: what this process allocated, without files and shared memory that it maps."""
    line = next(each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def main() -> int:
    """Return 1 where the fit misses the step left out by more than a quarter, or scoring is uneven, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scoring", metavar="ROWS,ROWS", help="score so many rows each with a tiny model on Ray")
    args = parser.parse_args()
    is_right = calibrate()
    if args.scoring:
        is_right &= score_sizes([int(n) for n in args.scoring.split(",")])
    return int(not is_right)


if __name__ == "__main__":
    sys.exit(main())
