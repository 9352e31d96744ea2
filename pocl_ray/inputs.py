"""The steps before scoring: tokenizer, rows, teacher, the teacher's responses, and the student before distillation."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from pocl_ray.config import Config, DataConfig, TeacherConfig
from pocl_ray.console import console
from pocl_ray.data.chat_turns import assistant_turn, end_as_the_template
from pocl_ray.data.prepare import (
    PAIRING,
    SUMMARY,
    Rows,
    data_fingerprint,
    prepare_all,
    read_summary,
    training_texts,
)
from pocl_ray.data.row_counts import told_cuts, told_rejects
from pocl_ray.data.row_store import describe_pairing
from pocl_ray.data.rows import row_tokenizer
from pocl_ray.data.tokenization import train_tokenizer
from pocl_ray.distill.task import sft_task
from pocl_ray.evaluation.benchmarks import EvaluatedModel
from pocl_ray.evaluation.evaluate import OwnTokens
from pocl_ray.fingerprints import sft_dependencies
from pocl_ray.models.loading import load_tokenizer
from pocl_ray.models.places import ModelRef, place_on_this_node
from pocl_ray.models.prepare import (
    check_student_tokenizer,
    check_teacher_tokenizer,
    make_student,
    make_teacher,
    origin_fingerprint,
    reference,
)
from pocl_ray.ray_train.driver import train_counted
from pocl_ray.records import TEACHER, RowsSummary
from pocl_ray.responses.replace import (
    OWN_REJECTS,
    hand_over_responses,
    own_files,
    replace_responses,
    settle_rejects,
    with_responses,
)
from pocl_ray.responses.replace import SUMMARY as RESPONSES_SUMMARY
from pocl_ray.responses.writing import PARTS, STOPPED, WritingTask, write_answers
from pocl_ray.run_directory.digests import fingerprint
from pocl_ray.run_directory.manifest import StepResult, Steps

TOKENIZER, TEACHER_TOKENIZER = "tokenizer", "teacher_tokenizer"


@dataclass(frozen=True)
class FingerprintedModel:
    """A model of this run: its place, and the fingerprint of everything that it depends on."""

    ref: ModelRef
    fingerprint: str


class Inputs:
    """The steps before scoring. Each step requests the steps that it depends on."""

    def __init__(self, config: Config, steps: Steps, teacher: FingerprintedModel | None = None) -> None:
        """Take the config and the runner of steps, but do nothing yet.

        Args:
            config: Config of the run.
            steps: Runner of its steps.
            teacher: Teacher that another run of the same rows has made; None: this run makes its own.
        """
        self.config, self.steps, self.run_dir, self._given_teacher = config, steps, steps.run_dir, teacher

    @cached_property
    def tokenizer(self) -> str:
        """The fingerprint of the tokenizer in `tokenizer/`: the teacher's, another one, or one trained on the rows.

        If the teacher keeps its own, that one is in `teacher_tokenizer/`, and `tokenizer/` holds the student's.
        """
        config = self.config
        owner = config.teacher if config.teacher.cross_tokenizer is None else config.student
        place = config.tokenizer.path or owner.path
        depends: list[Any] = [config.tokenizer.model_dump(mode="json"), place, owner.revision]
        if config.tokenizer.train_vocab_size is not None:
            depends.append(data_fingerprint(config.data))
        if self._is_bridged:
            depends += [config.teacher.path, config.teacher.revision]
        depends += self._turns(place, owner.revision if config.tokenizer.path is None else None)

        def work(_: str) -> StepResult:
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / TOKENIZER
                if config.tokenizer.train_vocab_size is not None:
                    train_tokenizer(training_texts(config.data), config.tokenizer.train_vocab_size, folder)
                else:
                    assert place is not None
                    revision = owner.revision if config.tokenizer.path is None else None
                    _copy_tokenizer(place, revision, owner.trust_remote_code, folder, config.data)
                self.run_dir.publish(folder, TOKENIZER)
                if self._is_bridged:
                    own, teacher = Path(scratch) / TEACHER_TOKENIZER, config.teacher
                    assert teacher.path is not None, "the config holds it"
                    _copy_tokenizer(teacher.path, teacher.revision, teacher.trust_remote_code, own, config.data)
                    self.run_dir.publish(own, TEACHER_TOKENIZER)
            return StepResult([TOKENIZER, *([TEACHER_TOKENIZER] if self._is_bridged else [])], {})

        return self.steps.run("tokenizer", depends, work)

    def _turns(self, place: str | None, revision: str | None) -> list[Any]:
        """The assistant's turns in chat templates that write more than an answer and the end of sequence."""
        config, teacher = self.config, self.config.teacher
        if config.tokenizer.train_vocab_size is not None or not _is_chat(config.data):
            return []
        owner = teacher if teacher.cross_tokenizer is None else config.student
        places = [(place, revision, owner.trust_remote_code)]
        if self._is_bridged:
            places.append((teacher.path, teacher.revision, teacher.trust_remote_code))
        found: list[Any] = []
        for where, commit, trusts in places:
            assert where is not None, "the config holds it"
            tokenizer = load_tokenizer(place_on_this_node(where), commit, trusts)
            if getattr(tokenizer, "chat_template", None):
                turn = assistant_turn(tokenizer, config.data.template_args)
                if not turn.is_plain(str(tokenizer.eos_token)):
                    found.append([where, turn.opening, turn.closing, turn.end])
        return found

    @property
    def _is_bridged(self) -> bool:
        return self.config.teacher.cross_tokenizer is not None

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the run's tokenizer, which is the student's."""
        return load_tokenizer(str(self.run_dir.local(TOKENIZER)))

    def load_teacher_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Return the teacher's tokenizer if it has its own, else None."""
        return load_tokenizer(str(self.run_dir.local(TEACHER_TOKENIZER))) if self._is_bridged else None

    @cached_property
    def rows(self) -> Rows:
        """The sets for the student: the prepared sets, or those with the teacher's answers as responses in train."""
        prepared, is_theirs = self.prepared, self.config.data.responses == "teacher"
        if is_theirs:
            _ = self.responses
        settle_rejects(self.run_dir, is_theirs)
        return with_responses(prepared, self.run_dir) if is_theirs else prepared

    @cached_property
    def responses(self) -> str:
        """The fingerprint of the training rows in which the teacher's answers replace the responses."""
        config, prepared, teacher = self.config, self.prepared, self.teacher
        generation = config.teacher.generation

        def work(fingerprint: str) -> StepResult:
            parts = f"{PARTS}/{fingerprint[:12]}"
            task = WritingTask(
                run_dir=self.run_dir,
                rows=prepared.as_teacher_reads.train.path,
                tokenizer=TEACHER_TOKENIZER if self._is_bridged else TOKENIZER,
                teacher=teacher.ref,
                generation=generation,
                max_tokens=config.data.max_tokens,
                seed=config.seed,
                parts=parts,
            )
            answers = write_answers(task, config.scaling)
            summary = self._replace_responses(answers)
            self.run_dir.delete(PARTS)
            counts = {
                "num_rows": summary.num_rows,
                "num_tokens": summary.num_response_tokens,
                "num_unstopped_answers": answers.num_rows - int(pc.sum(answers[STOPPED]).as_py()),
                "num_rejected": prepared.train.num_rows - summary.num_rows,
            }
            return StepResult([summary.path, RESPONSES_SUMMARY, OWN_REJECTS, *own_files(prepared)], counts)

        depends = [
            self.tokenizer,
            prepared.train.fingerprint,
            *(summary.fingerprint for name, summary in prepared.for_teacher.items() if name == "train"),
            teacher.fingerprint,
            generation.model_dump(mode="json"),
            config.data.max_tokens,
            config.seed,
        ]
        return self.steps.run("responses", depends, work)

    def _replace_responses(self, answers: pa.Table) -> RowsSummary:
        config, prepared, tokenizer = self.config, self.prepared, self.load_tokenizer()
        source, limit = config.data.train.path, config.data.max_reject_share
        teachers = self.load_teacher_tokenizer()
        if teachers is None:
            return replace_responses(prepared.train, answers, tokenizer, self.run_dir, source, limit)
        ours = row_tokenizer(config.data, tokenizer)
        return hand_over_responses(prepared, answers, teachers, ours, self.run_dir, source, limit)

    @cached_property
    def prepared(self) -> Rows:
        """The sets as they were read; each row has its own response."""
        config = self.config
        numbers = list(config.difficulty.columns)

        def work(_: str) -> StepResult:
            tokenizer = self.load_tokenizer()
            check_student_tokenizer(config.student, tokenizer, self._is_bridged)
            if not self._is_bridged:
                check_teacher_tokenizer(config.teacher, tokenizer)
            teachers = self.load_teacher_tokenizer()
            rows = prepare_all(config.data, tokenizer, config.seed, self.run_dir, numbers, teachers)
            tokens = sum(summary.num_prompt_tokens + summary.num_response_tokens for summary in rows)
            counts = {"num_rows": sum(summary.num_rows for summary in rows), "num_tokens": tokens}
            written = [summary.path for summary in (*rows, *rows.for_teacher.values())]
            return StepResult([SUMMARY, "rejects.jsonl", *written], counts)

        depends = [self.tokenizer, data_fingerprint(config.data), config.seed, *([numbers] if numbers else [])]
        self.steps.run("rows", depends, work)
        rows = read_summary(self.run_dir)
        for is_warning, line in (*told_rejects(rows), *told_cuts(rows)):
            console.print(f"[yellow]{'warning' if is_warning else 'note'}:[/] {line}")
        for name, num_leaks in rows.leaks.items():
            if num_leaks:
                console.print(f"[yellow]note:[/] {num_leaks} prompts of {name} stand in train as well")
        if rows.for_teacher:
            console.print(f"[yellow]note:[/] {describe_pairing(self.run_dir.read_json(SUMMARY)[PAIRING]['train'])}")
        return rows

    @cached_property
    def teacher(self) -> FingerprintedModel:
        """The teacher, fine-tuned if the config says so."""
        if self._given_teacher is not None:
            return self._given_teacher
        config = self.config.teacher

        def work(fingerprint: str) -> StepResult:
            if config.architecture is not None:
                make_teacher(config, self.load_tokenizer(), self.config.seed, self.run_dir)
            if config.sft is None:
                return StepResult([], {})
            start = reference(config, self._uri_of("teacher_init") if config.architecture is not None else None)
            rows, tokens = self.prepared.as_teacher_reads, TEACHER_TOKENIZER if self._is_bridged else TOKENIZER
            task = sft_task(self.config, "teacher", start, rows, self.run_dir, fingerprint, tokens)
            return StepResult(["models/teacher"], train_counted(task, self.config.scaling))

        depends: list[Any] = _loaded_as(config)
        if config.architecture is not None or config.sft is not None:
            depends += [_fingerprints(self.prepared), sft_dependencies(self.config, "teacher"), self.config.seed]
        fingerprint = self.steps.run("teacher", depends, work, trains=config.sft is not None)
        return FingerprintedModel(
            reference(config, self._uri_of("teacher") if config.sft is not None else None), fingerprint
        )

    @cached_property
    def other_teachers(self) -> tuple[FingerprintedModel, ...]:
        """The further teachers, which are ready-made."""
        return tuple(
            FingerprintedModel(reference(config), fingerprint(_loaded_as(config)))
            for config in self.config.other_teachers
        )

    @property
    def teachers(self) -> tuple[tuple[ModelRef, str], ...]:
        """All teachers, the first one first, each with its fingerprint."""
        return tuple((one.ref, one.fingerprint) for one in (self.teacher, *self.other_teachers))

    @cached_property
    def student(self) -> FingerprintedModel:
        """The student before distillation."""
        config = self.config.student
        teacher = self.teacher if config.num_layers is not None else None
        is_new, seed = config.path is None, self.config.student_seed

        def work(fingerprint: str) -> StepResult:
            outputs = []
            if is_new:
                tokenizer = self.load_tokenizer()
                make_student(config, teacher.ref if teacher else None, tokenizer, seed, self.run_dir)
                outputs.append("models/student_init")
            if config.sft is None:
                return StepResult(outputs, {})
            start = reference(config, self._uri_of("student_init") if is_new else None)
            counts = train_counted(
                sft_task(self.config, "student", start, self.rows, self.run_dir, fingerprint), self.config.scaling
            )
            return StepResult([*outputs, "models/student"], counts)

        depends: list[Any] = [origin_fingerprint(config), self.tokenizer, seed]
        if teacher is not None:
            depends.append(teacher.fingerprint)
        if config.sft is not None:
            depends += [self.rows_fingerprint, sft_dependencies(self.config, "student")]
        fingerprint = self.steps.run("student", depends, work, trains=config.sft is not None)
        name = "student" if config.sft is not None else "student_init" if is_new else None
        return FingerprintedModel(reference(config, self._uri_of(name) if name else None), fingerprint)

    @property
    def own_tokens(self) -> dict[str, OwnTokens]:
        """The teacher's tokenizer and rows, if it has its own tokenizer."""
        if not self._is_bridged:
            return {}
        sets = self.prepared.as_teacher_reads.tests
        return {TEACHER: OwnTokens(TEACHER_TOKENIZER, {name: summary.path for name, summary in sets.items()})}

    def for_tasks(self, name: str, model: FingerprintedModel) -> EvaluatedModel:
        """Return a model with the tokenizer that it reads tasks of lm-eval with; `name` is one of `records`."""
        tokenizer = TEACHER_TOKENIZER if self._is_bridged and name == TEACHER else TOKENIZER
        return EvaluatedModel(model.ref, [model.fingerprint, self.tokenizer], tokenizer)

    @property
    def rows_fingerprint(self) -> list[str]:
        """The fingerprints of all sets."""
        return _fingerprints(self.rows)

    def _uri_of(self, name: str) -> str:
        return self.run_dir.uri_of(f"models/{name}")


def _fingerprints(rows: Rows) -> list[str]:
    return [summary.fingerprint for summary in (*rows, *rows.for_teacher.values())]


def _is_chat(data: DataConfig) -> bool:
    return data.prompt_template == "chat" and data.task != "text"


def _copy_tokenizer(place: str, revision: str | None, trust_remote_code: bool, folder: Path, data: DataConfig) -> None:
    tokenizer = load_tokenizer(place_on_this_node(place), revision, trust_remote_code)
    if _is_chat(data):
        end_as_the_template(tokenizer, data.template_args)
    tokenizer.save_pretrained(folder)


def _loaded_as(config: TeacherConfig) -> list[Any]:
    """The settings that the answers of a ready-made teacher depend on."""
    depends: list[Any] = [origin_fingerprint(config), config.dtype]
    return depends if config.quantization == "none" else [*depends, config.quantization]
