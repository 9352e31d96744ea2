"""What a run starts from: tokenizer, rows, and the two models as they are before distillation."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from pocl_ray.config import Config, TeacherConfig
from pocl_ray.console import console
from pocl_ray.data.preparing import SUMMARY, Rows, data_fingerprint, prepare_all, read_summary, training_texts
from pocl_ray.data.tokenizer_training import train_tokenizer
from pocl_ray.dependencies import sft_dependencies
from pocl_ray.distill.planning import sft_task
from pocl_ray.distill.trainer import train_counted
from pocl_ray.manifest import StepResult
from pocl_ray.models.loading import load_tokenizer
from pocl_ray.models.places import ModelRef
from pocl_ray.models.preparing import check_student_tokenizer, make_student, make_teacher, origin_fingerprint, reference
from pocl_ray.responses.rows import OWN_REJECTS, read_responses, replace_responses, settle_rejects
from pocl_ray.responses.rows import SUMMARY as RESPONSES_SUMMARY
from pocl_ray.responses.writing import PARTS, STOPPED, WritingTask, write_answers
from pocl_ray.steps import Steps
from pocl_ray.storage import fingerprint, localize

TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class Made:
    """A model of this run: where it is, and the fingerprint of all that it depends on."""

    ref: ModelRef
    fingerprint: str


class Inputs:
    """The steps before scoring. A step asks for those it rests on."""

    def __init__(self, config: Config, steps: Steps) -> None:
        """Take the config and the runner of steps; nothing is done yet."""
        self.config, self.steps, self.run_dir = config, steps, steps.run_dir

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

        return self.steps.run("tokenizer", depends, work)

    @cached_property
    def rows(self) -> Rows:
        """The sets that the student meets: the prepared ones, or train with the teacher's answers as responses."""
        prepared, is_theirs = self.prepared, self.config.data.responses == "teacher"
        if is_theirs:
            _ = self.responses
        settle_rejects(self.run_dir, is_theirs)
        return replace(prepared, train=read_responses(self.run_dir)) if is_theirs else prepared

    @cached_property
    def responses(self) -> str:
        """Fingerprint of the training rows with the teacher's answers in place of their own responses."""
        config, prepared, teacher = self.config, self.prepared, self.teacher
        generation = config.teacher.generation

        def work(fingerprint: str) -> StepResult:
            parts = f"{PARTS}/{fingerprint[:12]}"
            task = WritingTask(
                run_dir=self.run_dir,
                rows=prepared.train.path,
                tokenizer=TOKENIZER,
                teacher=teacher.ref,
                generation=generation,
                max_tokens=config.data.max_tokens,
                seed=config.seed,
                parts=parts,
            )
            answers = write_answers(task, config.scaling)
            tokenizer = load_tokenizer(str(self.run_dir.local(TOKENIZER)))
            limit = config.data.max_reject_share
            made = replace_responses(prepared.train, answers, tokenizer, self.run_dir, config.data.train.path, limit)
            self.run_dir.delete(PARTS)
            counts = {
                "num_rows": made.num_rows,
                "num_tokens": made.num_response_tokens,
                "num_unstopped_answers": answers.num_rows - int(pc.sum(answers[STOPPED]).as_py()),
                "num_rejected": prepared.train.num_rows - made.num_rows,
            }
            return StepResult([made.path, RESPONSES_SUMMARY, OWN_REJECTS], counts)

        depends = [
            self.tokenizer,
            prepared.train.fingerprint,
            teacher.fingerprint,
            generation.model_dump(mode="json"),
            config.data.max_tokens,
            config.seed,
        ]
        return self.steps.run("responses", depends, work, on_cluster=True)

    @cached_property
    def prepared(self) -> Rows:
        """The sets as they were read, every row with its own response."""
        config = self.config
        numbers = list(config.difficulty.columns)

        def work(_: str) -> StepResult:
            tokenizer = load_tokenizer(str(self.run_dir.local(TOKENIZER)))
            check_student_tokenizer(config.student, tokenizer)
            rows = prepare_all(config.data, tokenizer, config.seed, self.run_dir, numbers)
            tokens = sum(made.num_prompt_tokens + made.num_response_tokens for made in rows)
            counts = {"num_rows": sum(made.num_rows for made in rows), "num_tokens": tokens}
            return StepResult([SUMMARY, "rejects.jsonl", *(made.path for made in rows)], counts)

        depends = [self.tokenizer, data_fingerprint(config.data), config.seed, *([numbers] if numbers else [])]
        self.steps.run("rows", depends, work)
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
            counts = train_counted(
                sft_task(self.config, "teacher", start, self.prepared, self.run_dir, fingerprint), self.config.scaling
            )
            return StepResult(["models/teacher"], counts)

        depends: list[Any] = _loaded_as(config)
        if config.architecture is not None or config.sft is not None:
            depends += [_fingerprints(self.prepared), sft_dependencies(self.config, "teacher"), self.config.seed]
        fingerprint = self.steps.run("teacher", depends, work, on_cluster=config.sft is not None)
        return Made(reference(config, self._made("teacher") if config.sft is not None else None), fingerprint)

    @cached_property
    def other_teachers(self) -> tuple[Made, ...]:
        """The further teachers, as they lie."""
        return tuple(Made(reference(config), fingerprint(_loaded_as(config))) for config in self.config.other_teachers)

    @cached_property
    def student(self) -> Made:
        """The student before distillation."""
        config = self.config.student
        teacher = self.teacher if config.num_layers is not None else None
        is_made = config.path is None

        def work(fingerprint: str) -> StepResult:
            outputs = []
            if is_made:
                tokenizer = load_tokenizer(str(self.run_dir.local(TOKENIZER)))
                make_student(config, teacher.ref if teacher else None, tokenizer, self.config.seed, self.run_dir)
                outputs.append("models/student_init")
            if config.sft is None:
                return StepResult(outputs, {})
            start = reference(config, self._made("student_init") if is_made else None)
            counts = train_counted(
                sft_task(self.config, "student", start, self.rows, self.run_dir, fingerprint), self.config.scaling
            )
            return StepResult([*outputs, "models/student"], counts)

        depends: list[Any] = [origin_fingerprint(config), self.tokenizer, self.config.seed]
        if teacher is not None:
            depends.append(teacher.fingerprint)
        if config.sft is not None:
            depends += [self.rows_fingerprint, sft_dependencies(self.config, "student")]
        fingerprint = self.steps.run("student", depends, work, on_cluster=config.sft is not None)
        name = "student" if config.sft is not None else "student_init" if is_made else None
        return Made(reference(config, self._made(name) if name else None), fingerprint)

    @property
    def rows_fingerprint(self) -> list[str]:
        """Of every set."""
        return _fingerprints(self.rows)

    def _made(self, name: str) -> str:
        return self.run_dir.uri_of(f"models/{name}")


def _fingerprints(rows: Rows) -> list[str]:
    return [made.fingerprint for made in rows]


def _loaded_as(config: TeacherConfig) -> list[Any]:
    """What the answers of a ready-made teacher depend on."""
    depends: list[Any] = [origin_fingerprint(config), config.dtype]
    return depends if config.quantization == "none" else [*depends, config.quantization]
