"""What `scale_model.py` measures here: seconds of steps of several sizes, and rows a second of scoring on Ray."""

from __future__ import annotations

import json
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scale_model import Model, fit, training_flops

from pocl_ray.models.places import ModelRef
from pocl_ray.records import RowsSummary
from pocl_ray.storage import RunDirectory

TOLERANCE = 0.25
EVEN = 0.15
BYTES_A_ROW = 1024.0
REPEATS = 5
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
    """A run directory with two tiny models, in which row sets of any size are scored."""

    run_dir: RunDirectory
    teacher: ModelRef
    student: ModelRef


def score_sizes(sizes: Sequence[int]) -> bool:
    """Score row sets of several sizes; whether rows a second are even and the driver's memory does not grow with rows.

    Seconds of a set of 64 rows, which are process starts, are taken off.
    """
    from pocl_ray.session import ray_session

    print(f"\nscoring on Ray\n{'rows':>9} {'s':>8} {'rows/s':>8} {'driver MiB':>11}")
    with tempfile.TemporaryDirectory() as folder, ray_session():
        made = _prepare(Path(folder), max(sizes))
        start = _score(made, Path(folder), 64)
        rates, peaks = [], []
        for size in sizes:
            seconds = _score(made, Path(folder), size) - start
            rates.append(size / max(seconds, 1e-3))
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0)
            print(f"{size:9,d} {seconds:8.1f} {rates[-1]:8.0f} {peaks[-1] / 2**20:11.0f}", flush=True)
    evenness = max(rates) / min(rates) - 1
    growth = (peaks[-1] - peaks[0]) / max(1, sizes[-1] - sizes[0])
    print(f"rows a second differ by {evenness:.0%}; the driver's peak grows by {growth:.0f} bytes a row")
    return evenness < EVEN and growth < BYTES_A_ROW


def _prepare(folder: Path, num_rows: int) -> _Prepared:
    from pocl_ray.data.tokenizer_training import train_tokenizer
    from pocl_ray.models.building import build_model
    from pocl_ray.models.loading import load_tokenizer
    from pocl_ray.models.saving import save_model

    rng, lines = np.random.default_rng(0), []
    for _ in range(num_rows):
        text = " ".join(rng.choice(WORDS, size=4))
        lines.append(json.dumps({"instruction": "Copy:", "input": text, "output": text}) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    run_dir = RunDirectory.open(str(folder), "run")
    train_tokenizer(lines[:500], 300, run_dir.local("tokenizer"))
    tokenizer = load_tokenizer(str(run_dir.local("tokenizer")))
    refs = []
    for seed, width in enumerate((32, 16)):
        sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
        shape = {"model_type": "llama", **sizes, **heads}
        model = build_model(shape, len(tokenizer), tokenizer.eos_token_id, None, seed)
        refs.append(ModelRef(str(save_model(model, tokenizer, run_dir.local(f"models/{width}")))))
    return _Prepared(run_dir, *refs)


def _score(made: _Prepared, folder: Path, num_rows: int) -> float:
    """Score the first rows, and return the seconds that it took."""
    from pocl_ray.config import DataConfig, DifficultyConfig, ScalingConfig, SourceConfig
    from pocl_ray.data.rows import prepare_rows
    from pocl_ray.difficulty.scoring import score_rows
    from pocl_ray.models.loading import load_tokenizer

    source = folder / f"{num_rows}.jsonl"
    with (folder / "rows.jsonl").open(encoding="utf-8") as lines:
        source.write_text("".join(line for line, _ in zip(lines, range(num_rows), strict=False)), encoding="utf-8")
    lengths = {"max_prompt_tokens": 40, "max_tokens": 64}
    config = DataConfig(train=SourceConfig(path="unused"), holdout_rows=1, prompt_template="plain", **lengths)
    tokenizer = load_tokenizer(str(made.run_dir.local("tokenizer")))
    rows = made.run_dir.local(f"rows/{num_rows}.arrow")
    summary, _ = prepare_rows(f"rows{num_rows}", SourceConfig(path=str(source)), config, tokenizer, rows)
    start = time.perf_counter()
    table, _ = score_rows(
        rows=RowsSummary(**asdict(summary)),
        dev_rows=summary,
        run_dir=made.run_dir,
        tokenizer="tokenizer",
        student=made.student,
        teacher=made.teacher,
        teacher_fingerprint="",
        cache=None,
        cache_dtype="auto",
        difficulty=DifficultyConfig.model_validate({"generation": {"max_new_tokens": 4}}),
        max_tokens=64,
        scaling=ScalingConfig(),
        seed=0,
        compare=False,
    )
    assert table.num_rows == num_rows
    return time.perf_counter() - start
