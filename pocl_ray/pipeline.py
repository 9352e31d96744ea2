"""The data flow, one way:

    rows -> teacher, student -> scores + teacher cache -> ranking -> plan -> distilled student -> evaluation -> report

Each step is a method; it names what it depends on, and is skipped where the manifest says that it is done. The
cluster is whatever Ray is connected to.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pocl_ray.config import Config
from pocl_ray.console import console
from pocl_ray.curriculum.buckets import bucket_ends
from pocl_ray.curriculum.schedule import plan_control, plan_stages
from pocl_ray.data.preparing import SUMMARY, Rows, data_fingerprint, prepare_all, read_summary, training_texts
from pocl_ray.data.tokenizer_training import train_tokenizer
from pocl_ray.difficulty.ranking import rank_rows
from pocl_ray.difficulty.scoring import score_rows
from pocl_ray.distill.planning import curriculum_task, sft_task
from pocl_ray.distill.task import TrainTask
from pocl_ray.distill.trainer import run_training
from pocl_ray.evaluation.evaluate import evaluate_models
from pocl_ray.identity import claim, environment, neutral_free
from pocl_ray.manifest import Manifest, StepResult
from pocl_ray.models.loading import load_tokenizer
from pocl_ray.models.places import ModelRef
from pocl_ray.models.preparing import check_student_tokenizer, make_student, make_teacher, origin_fingerprint, reference
from pocl_ray.records import RANK, RRF_SCORE, STUDENT, STUDENT_BEFORE, STUDENT_KD, TEACHER, Stage
from pocl_ray.report.build import build_report
from pocl_ray.report.model_card import write_model_card
from pocl_ray.storage import RunDirectory, localize

TOKENIZER, SIGNALS, SCORES, PLAN, CACHE = (
    "tokenizer",
    "scores/signals.parquet",
    "scores.parquet",
    "plan.json",
    "teacher_cache",
)


@dataclass(frozen=True)
class Made:
    """A model of this run: where it is, and the fingerprint of all that it depends on."""

    ref: ModelRef
    fingerprint: str


class Pipeline:
    """The steps of one run, in its directory. A step asks for those it rests on."""

    def __init__(self, config: Config, resume_with_changes: bool = False) -> None:
        """Open the run directory.

        Args:
            config: The run.
            resume_with_changes: Go on in a directory whose config differs; the steps concerned run again.

        Raises:
            StorageError: It cannot be written, or belongs to another config.
        """
        self.config = config
        self.run_dir = RunDirectory.open(config.storage_path, config.name)
        claim(self.run_dir, config, resume_with_changes)
        self.manifest = Manifest(self.run_dir)

    @cached_property
    def tokenizer(self) -> str:
        """Fingerprint of the tokenizer in `tokenizer/`: the teacher's, another one, or one trained on the rows."""
        config = self.config
        place = config.tokenizer.path or config.teacher.path
        depends: list[Any] = [config.tokenizer.model_dump(mode="json"), place, config.teacher.revision]
        if config.tokenizer.train_vocab_size is not None:
            depends.append(data_fingerprint(config.data))

        def work(_: str) -> StepResult:
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / TOKENIZER
                if config.tokenizer.train_vocab_size is not None:
                    train_tokenizer(training_texts(config.data), config.tokenizer.train_vocab_size, folder)
                else:
                    assert place is not None
                    revision = config.teacher.revision if config.tokenizer.path is None else None
                    loaded = load_tokenizer(localize(place), revision, config.teacher.trust_remote_code)
                    loaded.save_pretrained(folder)
                self.run_dir.publish(folder, TOKENIZER)
            return StepResult([TOKENIZER], {})

        return self._step("tokenizer", depends, work)

    @cached_property
    def rows(self) -> Rows:
        """The prepared sets."""
        config = self.config

        def work(_: str) -> StepResult:
            tokenizer = load_tokenizer(str(self.run_dir.local(TOKENIZER)))
            check_student_tokenizer(config.student, tokenizer)
            rows = prepare_all(config.data, tokenizer, config.seed, self.run_dir)
            tokens = sum(made.num_prompt_tokens + made.num_response_tokens for made in rows)
            counts = {"num_rows": sum(made.num_rows for made in rows), "num_tokens": tokens}
            return StepResult([SUMMARY, "rejects.jsonl", *(made.path for made in rows)], counts)

        self._step("rows", [self.tokenizer, data_fingerprint(config.data), config.seed], work)
        rows = read_summary(self.run_dir)
        for name, num_leaks in rows.leaks.items():
            if num_leaks:
                console.print(f"[yellow]note:[/] {num_leaks} prompts of {name} stand in train as well")
        return rows

    @cached_property
    def teacher(self) -> Made:
        """The teacher, fine-tuned where the config says so."""
        config = self.config.teacher

        def work(fingerprint: str) -> StepResult:
            if config.architecture is not None:
                tokenizer = load_tokenizer(str(self.run_dir.local(TOKENIZER)))
                make_teacher(config, tokenizer, self.config.seed, self.run_dir)
            if config.sft is None:
                return StepResult([], {})
            start = reference(config, self._made("teacher_init") if config.architecture is not None else None)
            counts = self._train(sft_task(self.config, "teacher", start, self.rows, self.run_dir, fingerprint))
            return StepResult(["models/teacher"], counts)

        depends: list[Any] = [origin_fingerprint(config), config.dtype]
        if config.architecture is not None or config.sft is not None:
            depends += [self._rows_fingerprint, self._sft_dependencies("teacher"), self.config.seed]
        fingerprint = self._step("teacher", depends, work)
        return Made(reference(config, self._made("teacher") if config.sft is not None else None), fingerprint)

    @cached_property
    def student(self) -> Made:
        """The student before distillation."""
        config, teacher = self.config.student, self.teacher
        is_made = config.path is None

        def work(fingerprint: str) -> StepResult:
            outputs = []
            if is_made:
                tokenizer = load_tokenizer(str(self.run_dir.local(TOKENIZER)))
                make_student(config, teacher.ref, tokenizer, self.config.seed, self.run_dir)
                outputs.append("models/student_init")
            if config.sft is None:
                return StepResult(outputs, {})
            start = reference(config, self._made("student_init") if is_made else None)
            counts = self._train(sft_task(self.config, "student", start, self.rows, self.run_dir, fingerprint))
            return StepResult([*outputs, "models/student"], counts)

        depends: list[Any] = [origin_fingerprint(config), self.tokenizer, self.config.seed]
        if config.num_layers is not None:
            depends.append(teacher.fingerprint)
        if config.sft is not None:
            depends += [self._rows_fingerprint, self._sft_dependencies("student")]
        fingerprint = self._step("student", depends, work)
        name = "student" if config.sft is not None else "student_init" if is_made else None
        return Made(reference(config, self._made(name) if name else None), fingerprint)

    @cached_property
    def signals(self) -> str:
        """Fingerprint of the signals of every training row, and of the teacher cache made in the same pass."""
        config, rows = self.config, self.rows
        caches = config.distill.teacher_cache == "hidden"

        def work(_: str) -> StepResult:
            table, counts = score_rows(
                rows=rows.train,
                dev_rows=rows.dev,
                run_dir=self.run_dir,
                tokenizer=TOKENIZER,
                student=self.student.ref,
                teacher=self.teacher.ref,
                teacher_fingerprint=self.teacher.fingerprint,
                cache=CACHE if caches else None,
                cache_dtype=config.distill.cache_dtype,
                difficulty=config.difficulty,
                max_tokens=config.data.max_tokens,
                scaling=config.scaling,
                seed=config.seed,
            )
            with tempfile.TemporaryDirectory() as scratch:
                pq.write_table(table, Path(scratch) / "signals.parquet")
                self.run_dir.publish(Path(scratch) / "signals.parquet", SIGNALS)
            return StepResult([SIGNALS, *([CACHE] if caches else [])], counts)

        settings = config.difficulty.model_dump(mode="json", include={"generation", "shard_rows"})
        depends = [self._rows_fingerprint, self.student.fingerprint, self.teacher.fingerprint, settings]
        return self._step("scores", [*depends, caches, config.distill.cache_dtype, config.seed], work)

    @cached_property
    def ranking(self) -> str:
        """Fingerprint of `scores.parquet`: the signals, and the rank that they give each row."""
        difficulty = self.config.difficulty

        def work(_: str) -> StepResult:
            table = pq.read_table(self.run_dir.local(SIGNALS))
            chosen = {name: table[name].to_numpy() for name in difficulty.signals}
            rrf_score, rank = rank_rows(chosen, difficulty.rrf_k, difficulty.tie_break, self.config.seed)
            table = table.append_column(RRF_SCORE, [rrf_score]).append_column(RANK, [rank])
            with tempfile.TemporaryDirectory() as scratch:
                pq.write_table(table, Path(scratch) / SCORES)
                self.run_dir.publish(Path(scratch) / SCORES, SCORES)
            return StepResult([SCORES], {"num_rows": table.num_rows})

        settings = difficulty.model_dump(mode="json", include={"signals", "rrf_k", "tie_break"})
        return self._step("ranking", [self.signals, settings, self.config.seed], work)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The curriculum, written to `plan.json`."""
        config, num_rows = self.config, self.rows.train.num_rows
        stages = plan_stages(config, num_rows)
        content = {
            "num_rows": num_rows,
            "num_buckets": config.curriculum.num_buckets,
            "bucket_ends": bucket_ends(num_rows, config.curriculum.num_buckets),
            "global_batch_rows": config.train.global_batch_rows,
            "num_steps": sum(stage.num_steps for stage in stages),
            "stages": [stage.to_json() for stage in stages],
        }

        def work(_: str) -> StepResult:
            self.run_dir.write_json(PLAN, content)
            return StepResult([PLAN], {})

        self._step("plan", content, work)
        return stages

    @cached_property
    def distilled(self) -> Made:
        """The student after the whole curriculum."""
        return self._distill("distill", self.stages, "student")

    @cached_property
    def control(self) -> Made | None:
        """The student after plain distillation, at the same number of optimizer steps."""
        if self.config.control is None:
            return None
        return self._distill("control", plan_control(self.stages, self.config.control), "control/student")

    @cached_property
    def evaluation(self) -> str:
        """Fingerprint of `evaluation.json`: the student beside where it came from."""
        config = self.config
        models = {STUDENT: self.distilled}
        if config.evaluation.student_before:
            models[STUDENT_BEFORE] = self.student
        if self.control is not None:
            models[STUDENT_KD] = self.control
        if config.evaluation.teacher:
            models[TEACHER] = self.teacher

        def work(_: str) -> StepResult:
            refs = {name: made.ref for name, made in models.items()}
            result, counts = evaluate_models(
                models=refs,
                sets=self.rows.tests,
                run_dir=self.run_dir,
                tokenizer=TOKENIZER,
                evaluation=config.evaluation,
                max_tokens=config.data.max_tokens,
                scaling=config.scaling,
            )
            self.run_dir.write_json("evaluation.json", result)
            return StepResult(["evaluation.json", "predictions.parquet"], counts)

        settings = config.evaluation.model_dump(mode="json", include={"seeds", "greedy", "generation"})
        fingerprints = {name: made.fingerprint for name, made in models.items()}
        return self._step("evaluation", [self._rows_fingerprint, fingerprints, settings], work)

    @cached_property
    def report(self) -> str:
        """Write the report and the model card from what the run directory holds."""
        depends = [self.evaluation, self.config.report.model_dump(mode="json")]

        def work(_: str) -> StepResult:
            build_report(self.run_dir)
            write_model_card(self.run_dir)
            return StepResult(["report.html", "report.md"], {})

        return self._step("report", depends, work)

    def _distill(self, name: str, stages: tuple[Stage, ...], output: str) -> Made:
        task_of = lambda fingerprint: curriculum_task(  # noqa: E731
            self.config,
            name=name,
            fingerprint=fingerprint,
            run_dir=self.run_dir,
            stages=stages,
            student=self.student.ref,
            teacher=self.teacher.ref,
            teacher_fingerprint=self.teacher.fingerprint,
            rows=self.rows,
            output=output,
        )

        def work(fingerprint: str) -> StepResult:
            task = task_of(fingerprint)
            return StepResult([task.output, task.metrics], self._train(task))

        train = neutral_free(self.config)["train"]
        distill = self.config.distill.model_dump(mode="json", include={"loss", "loss_args", "scale_by_t_squared"})
        dev = self.config.evaluation.model_dump(mode="json", include={"dev_generation", "max_dev_rows"})
        plan = [stage.to_json() for stage in stages]
        depends = [self.ranking, self.student.fingerprint, plan, train, distill, dev, self.config.curriculum.hand_off]
        fingerprint = self._step(name, [*depends, self.config.student.gradient_checkpointing, self.config.seed], work)
        return Made(reference(self.config.student, self.run_dir.uri_of(output)), fingerprint)

    def _train(self, task: TrainTask) -> dict[str, Any]:
        standing = run_training(task, self.config.scaling)
        return {"num_steps": standing.step, "num_tokens": standing.num_tokens}

    def _sft_dependencies(self, role: str) -> Any:
        sft = getattr(self.config, role).sft
        return None if sft is None else [sft.model_dump(mode="json"), neutral_free(self.config)["train"]]

    @property
    def _rows_fingerprint(self) -> list[str]:
        return [made.fingerprint for made in self.rows]

    def _made(self, name: str) -> str:
        return self.run_dir.uri_of(f"models/{name}")

    def _step(self, name: str, depends: Any, work: Callable[[str], StepResult]) -> str:
        def announced(fingerprint: str) -> StepResult:
            console.print(f"[bold]{name}[/]")
            self.run_dir.write_json("environment.json", environment())
            return work(fingerprint)

        fingerprint, seconds = self.manifest.run(name, depends, announced)
        console.print(f"  [dim]{name} is done already[/]" if seconds is None else f"  [dim]{seconds:.1f} s[/]")
        return fingerprint
