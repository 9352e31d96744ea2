"""The data flow, one way:

    rows -> teacher, student -> scores + teacher cache -> ranking -> plan -> distilled student -> evaluation -> report

If the teacher writes the responses (SeqKD), it does so before any other step uses a row. Each step is a property.
Reading it runs the step, after the steps that it depends on. A step that is done according to the manifest is not run
again. Ray is connected before the first step that needs it. `STEPS` in `records.py` is the table of all steps: its
work, the steps that it depends on, the files that it writes, and whether it needs Ray. The steps before scoring are in
`inputs.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

from pocl_ray.arms import Arm, Race, plan_race
from pocl_ray.config import Config
from pocl_ray.config.race import RACE
from pocl_ray.console import console
from pocl_ray.curriculum.schedule import bucket_ends, plan_control, plan_stages
from pocl_ray.data.row_store import RowStore
from pocl_ray.difficulty.choice import origins_of, rank_table
from pocl_ray.difficulty.job import CacheTask, ScoringInputs, cache_teacher, score_rows
from pocl_ray.difficulty.measured import at_least, passes_of
from pocl_ray.difficulty.ranking import constant_signals, weak_teacher
from pocl_ray.difficulty.scoring_cost import FLOPS, scoring_flops
from pocl_ray.distill.task import TrainTask, cache_folder, curriculum_task
from pocl_ray.evaluation.benchmarks import EVALUATION, evaluate_items, plan_items
from pocl_ray.evaluation.evaluate import evaluate_rows
from pocl_ray.fingerprints import any_training_reads_teacher, distill_dependencies, ranking_dependencies, reads_teacher
from pocl_ray.inputs import TOKENIZER, FingerprintedModel, Inputs
from pocl_ray.models.places import ModelRef
from pocl_ray.models.prepare import trained_reference
from pocl_ray.preflight import check_budgets, check_disk, check_inputs, check_nodes, check_room, check_settings
from pocl_ray.preview import frontier_notes
from pocl_ray.ray_train.background import Trainings
from pocl_ray.records import STUDENT, STUDENT_BEFORE, STUDENT_KD, TEACHER, Stage
from pocl_ray.report.build import build_report
from pocl_ray.report.model_card import write_model_card
from pocl_ray.run_directory.claim import Claim, places_on_hub
from pocl_ray.run_directory.lease import refusal
from pocl_ray.run_directory.manifest import StepResult, Steps, step_fingerprint
from pocl_ray.teacher_cache.writer import FORMAT_VERSION
from pocl_ray.tracking.stream import send_results
from pocl_ray.trainings.heats import run_race
from pocl_ray.trainings.judge import judge_task
from pocl_ray.trainings.pairs import compare_pairs, print_pairs, train_pairs
from pocl_ray.trainings.process import Job

SIGNALS, SCORES, PLAN, CACHE = "scores/signals.parquet", "scores.parquet", "plan.json", "teacher_cache"
PAIRS, RACED, CONTROL = "pairs.json", "race.json", "control/student"


class Pipeline:
    """One run in its directory, from scoring to the report; the steps before are in `inputs`."""

    def __init__(
        self,
        config: Config,
        resume_with_changes: bool = False,
        connect: Callable[[], object] = lambda: None,
        teacher: FingerprintedModel | None = None,
    ) -> None:
        """Open the run directory.

        Args:
            config: Config of the run.
            resume_with_changes: Whether to go on in a directory whose config differs; affected steps run again.
            connect: Function that connects to Ray; without it, Ray must be connected already.
            teacher: Teacher that another run of the same rows has made; None: this run makes its own.

        Raises:
            UserError: An input is missing or does not fit, or the directory belongs to another config.
        """
        self._adapted = check_inputs(config)  # before anything is written
        self.config = config
        self._claim = Claim(config, resume_with_changes)
        self.run_dir = self._claim.run_dir

        def connect_and_check() -> None:
            connect()
            check_room(config)
            check_nodes()

        self.steps = Steps(self.run_dir, connect_and_check, places_on_hub(config))
        self.inputs = Inputs(config, self.steps, teacher)
        self.trainings, self._compares = Trainings(config.scaling), False

    def close(self) -> None:
        """Release the run directory for other runs.

        Raises:
            StorageError: Another run has taken the directory meanwhile.
        """
        self._claim.lease.release()
        if self._claim.lease.lost_to is not None:
            raise refusal(self.run_dir, self._claim.lease.lost_to)

    def withdraw(self) -> None:
        """Undo the claim of the run directory after a user's mistake, unless useful work was done since."""
        if not self.steps.has_cluster:
            self._claim.undo(keep_config=self.steps.num_done > 0)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the curriculum, which are written to `plan.json`. Other steps read them early, as a check."""
        config, num_prepared = self.config, self.inputs.prepared.train.num_rows
        # Checked before a teacher is trained to write responses, some of which may be empty.
        plan_stages(config, num_prepared)
        if config.curriculum.pacing == RACE:
            plan_race(config, num_prepared)
        check_settings(config, num_prepared, self.inputs.load_tokenizer(), self.inputs.load_teacher_tokenizer())
        check_budgets(config, self.run_dir, self.inputs.prepared)
        num_rows = self.inputs.rows.train.num_rows
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
            for note in frontier_notes(config, stages):
                console.print(f"[yellow]note:[/] {note}")
            return StepResult([PLAN], {})

        self.steps.run("plan", content, work)
        return stages

    @cached_property
    def signals(self) -> str:
        """The fingerprint of the signals of all training rows, and of the teacher cache from the same pass."""
        config, inputs = self.config, self.inputs
        distils = any_training_reads_teacher(config, self.stages)
        folder = CACHE if distils and config.distill.teacher_cache != "none" else None
        races = () if self.race is None else self.race.arms.values()
        passes = passes_of(config, folder is not None, [arm.config for arm in races])
        teacher = inputs.teacher if distils or passes.teacher else None
        student = inputs.student

        def work(_: str) -> StepResult:
            check_disk(config, self.run_dir, inputs.rows)
            rows = {"train": inputs.rows.train, "dev": inputs.rows.dev}
            scoring = ScoringInputs(
                rows=inputs.rows.train,
                dev_rows=inputs.rows.dev,
                run_dir=self.run_dir,
                tokenizer=TOKENIZER,
                student=student.ref,
                teacher=teacher.ref if teacher is not None and passes.teacher else None,
                cache=self._cache_task(folder, teacher.fingerprint) if folder and teacher else None,
                difficulty=config.difficulty,
                max_tokens=config.data.max_tokens,
                seed=config.seed,
                compare=passes.compares,
                plugins=passes.plugins,
                teacher_rows=inputs.rows.for_teacher,
                answers=passes.answers,
                reads_student=passes.student,
            )
            table, counts = score_rows(scoring, config.scaling)
            flops = scoring_flops(config, passes, rows, folder is not None)
            counts |= {} if flops is None else {FLOPS: int(flops.total)}
            self.run_dir.write_table(SIGNALS, table)
            caches = self._cache_other_teachers(student.ref) if distils else []
            return StepResult([SIGNALS, *([folder] if folder else []), *caches], counts)

        settings = config.difficulty.model_dump(mode="json", include={"generation", "shard_rows"})
        kept = None if folder is None else [FORMAT_VERSION, self._top_k]
        models = [student.fingerprint, teacher and teacher.fingerprint, kept, config.distill.cache_dtype]
        models += [other.fingerprint for other in inputs.other_teachers] if distils else []
        depends = [inputs.rows_fingerprint, models, settings, config.seed, *origins_of(passes.plugins)]
        # A scoring that is done already may have measured more; it is not made again for less.
        enough = [[*depends, *left_out] for left_out in at_least(passes.left_out)]
        return self.steps.run("scores", self.steps.manifest.chosen("scores", enough), work)

    @cached_property
    def ranking(self) -> str:
        """The fingerprint of `scores.parquet`, which holds the signals and the rank of each row."""
        difficulty, seed = self.config.difficulty, self.config.seed

        def work(_: str) -> StepResult:
            rows = RowStore.open(self.run_dir.local(self.inputs.rows.train.path))
            table = rank_table(self.run_dir.read_table(SIGNALS), rows, difficulty, seed)
            for name in constant_signals({name: table[name].to_numpy() for name in difficulty.signals}):
                console.print(
                    f"[yellow]warning:[/] difficulty.signals: {name} is {table[name][0].as_py():g} in every row, so it "
                    "ranks no row before another and is left out"
                )
            if warning := weak_teacher({name: table[name].to_numpy() for name in table.column_names}):
                console.print(f"[yellow]warning:[/] {warning}")
            self.run_dir.write_table(SCORES, table)
            return StepResult([SCORES], {"num_rows": table.num_rows})

        return self.steps.run("ranking", ranking_dependencies(self.config, self.signals), work)

    @cached_property
    def race(self) -> Race | None:
        """The arms and rungs of a race; None for another pacing. It is read early, as a check."""
        config = self.config
        return plan_race(config, self.inputs.rows.train.num_rows) if config.curriculum.pacing == RACE else None

    @cached_property
    def raced(self) -> tuple[TrainTask, list[Any]] | None:
        """The training of the arm that a race hands out, and what it depends on; None for another pacing."""
        race, config = self.race, self.config
        if race is None:
            return None
        inputs, ranking = self.inputs, self.ranking
        depends = {
            name: distill_dependencies(arm.config, ranking, inputs.student.fingerprint, arm.stages)
            for name, arm in race.arms.items()
        }
        tasks = {name: self._race_task(arm, [depends[name], race.plan.steps]) for name, arm in race.arms.items()}

        def work(_: str) -> StepResult:
            content = run_race(self.run_dir, tasks, race.plan, race.figure, config.scaling)
            content["stages"] = [stage.to_json() for stage in race.arms[content["winner"]].stages]
            self.run_dir.write_json(RACED, content)
            return StepResult([RACED], {"num_steps": content["num_steps"]})

        fingerprint = self.steps.run("race", [depends, race.plan.to_json(), race.figure], work)
        winner = self.run_dir.read_json(RACED)["winner"]
        return tasks[winner], [fingerprint, depends[winner]]

    @cached_property
    def distilled(self) -> FingerprintedModel:
        """The student after the whole curriculum; after a race, of the arm that it hands out."""
        if self.raced is None:
            return self._distill("distill", self.stages, "student")
        paused, depends = self.raced
        task = replace(paused, output="student", metrics="metrics.jsonl")  # goes on from its last checkpoint
        return self._trained("distill", depends, lambda _: task)

    @cached_property
    def control(self) -> FingerprintedModel | None:
        """The student after plain distillation, with the same number of optimizer steps."""
        if self.config.control is None:
            return None
        if self.config.curriculum.advance == "plateau":  # the number of steps is known only after they are done
            _ = self.distilled
        return self._distill("control", self._control_stages, CONTROL)

    @property
    def _control_stages(self) -> tuple[Stage, ...]:
        num_steps = sum(stage.num_steps for stage in self.stages)
        if self.config.curriculum.advance == "plateau":
            num_steps = self.steps.manifest.steps["distill"]["counts"]["num_steps"]
        return plan_control(self.config, self.inputs.rows.train.num_rows, num_steps)

    def _early_control(self) -> TrainTask | None:
        """The training of the control, if it may begin with that of the curriculum and is not done."""
        config = self.config
        asks = self._compares and config.scaling.parallel_control and config.curriculum.advance != "plateau"
        if not asks or config.control is None:
            return None
        stages = self._control_stages
        depends = distill_dependencies(config, self.ranking, self.inputs.student.fingerprint, stages)
        fingerprint = step_fingerprint("control", depends)
        is_done = self.steps.manifest.is_done("control", fingerprint)
        return None if is_done else self._distill_task("control", fingerprint, stages, CONTROL)

    @cached_property
    def pairs(self) -> str | None:
        """The fingerprint of `pairs.json`: curriculum less control on further seeds; None if the config names none."""
        config = self.config
        seeds = config.control.seeds if config.control is not None else ()
        if not seeds:
            return None
        plans = {STUDENT: self.stages, STUDENT_KD: self._control_stages}
        keys = [(side, seed) for seed in seeds for side in plans]
        depends = {key: self._pair_depends(plans[key[0]], key[1]) for key in keys}

        def work(_: str) -> StepResult:
            jobs = {key: self._pair_job(key, plans[key[0]], depends[key]) for key in keys}
            content = compare_pairs(train_pairs(self.run_dir, jobs, config.scaling), seeds)
            self.run_dir.write_json(PAIRS, content)
            print_pairs(content)
            return StepResult([PAIRS], {"num_steps": sum(job.task.num_steps for job in jobs.values())})

        return self.steps.run("pairs", list(depends.values()), work)

    @cached_property
    def evaluated(self) -> dict[str, FingerprintedModel]:
        """The models that are compared, by their names in `evaluation.json`."""
        self._compares = True  # before the student is distilled, so that its control may be trained meanwhile
        config, models = self.config.evaluation, {STUDENT: self.distilled}
        if config.student_before:
            models[STUDENT_BEFORE] = self.inputs.student
        if self.control is not None:
            models[STUDENT_KD] = self.control
        if config.teacher:
            models[TEACHER] = self.inputs.teacher
        return models

    @cached_property
    def evaluation(self) -> str:
        """The fingerprint of `evaluation.json`, which compares the student with the untuned student and the teacher."""
        config, inputs = self.config, self.inputs

        def work(_: str) -> StepResult:
            read = ({name: model.ref for name, model in self.evaluated.items()}, inputs.rows.tests)
            result, counts, written = evaluate_rows(config, *read, self.run_dir, TOKENIZER, inputs.own_tokens)
            self.run_dir.write_json(EVALUATION, result)
            self.steps.forget("tasks")  # their figures are in that file too
            return StepResult([EVALUATION, *written], counts)

        settings = config.evaluation.model_dump(mode="json", include={"seeds", "greedy", "generation"})
        fingerprints = {name: model.fingerprint for name, model in self.evaluated.items()}
        return self.steps.run("evaluation", [inputs.rows_fingerprint, fingerprints, settings], work)

    @cached_property
    def tasks(self) -> str:
        """The fingerprint of `evaluation.json` with the tasks of lm-eval; of the evaluation if there are none."""
        config, inputs, evaluation = self.config, self.inputs, self.evaluation
        if not config.evaluation.tasks:
            return evaluation
        items = plan_items(config, {name: inputs.for_tasks(name, model) for name, model in self.evaluated.items()})
        written = [EVALUATION, *(item.path for item in items)]

        def work(_: str) -> StepResult:
            return StepResult(written, evaluate_items(items, config, self.run_dir))

        return self.steps.run("tasks", [evaluation, written], work)

    @cached_property
    def report(self) -> str:
        """The fingerprint of the report and the model card, which are written from the run directory."""

        def work(_: str) -> StepResult:
            build_report(self.run_dir)
            write_model_card(self.run_dir)
            self._track_results()
            return StepResult(["report.html", "report.md"], {})

        depends = [self.tasks, self.config.report.model_dump(mode="json")]
        depends += [self.pairs] if self.pairs is not None else []
        return self.steps.run("report", depends, work)

    def _track_results(self) -> None:
        if self.config.tracking:
            step = self.steps.manifest.steps["distill"]["counts"]["num_steps"]
            trained = ("distill", self.distilled.fingerprint) if self.raced is None else self.raced[0].identity
            send_results(self.config, self.run_dir, trained, step, self.inputs.rows.tests)

    @property
    def _top_k(self) -> int | None:
        distill = self.config.distill
        return distill.top_k if distill.teacher_cache == "topk" else None

    def _cache_task(self, folder: str, fingerprint: str) -> CacheTask:
        return CacheTask(folder, self.config.distill.cache_dtype, self._top_k, fingerprint)

    def _cache_other_teachers(self, student: ModelRef) -> list[str]:
        """Fill the caches of the further teachers, and return their directories; empty if teachers run live."""
        config, rows, written = self.config, self.inputs.rows, []
        for place, other in enumerate(self.inputs.other_teachers, start=1):
            folder = cache_folder(config, place)
            if folder is None:
                continue
            cache_teacher(
                sets=[rows.train, rows.dev],
                run_dir=self.run_dir,
                student=student,
                teacher=other.ref,
                cache=self._cache_task(folder, other.fingerprint),
                difficulty=config.difficulty,
                scaling=config.scaling,
            )
            written.append(folder)
        return written

    def _distill(self, name: str, stages: tuple[Stage, ...], output: str) -> FingerprintedModel:
        depends = distill_dependencies(self.config, self.ranking, self.inputs.student.fingerprint, stages)
        return self._trained(name, depends, lambda fingerprint: self._distill_task(name, fingerprint, stages, output))

    def _distill_task(self, name: str, fingerprint: str, stages: tuple[Stage, ...], output: str) -> TrainTask:
        teachers = self.inputs.teachers if reads_teacher(self.config, stages) else ()
        return self._task(self.config, name, fingerprint, stages, teachers, output)

    def _trained(self, name: str, depends: Any, task_of: Callable[[str], TrainTask]) -> FingerprintedModel:
        """Run a step that trains a student, by the task of its fingerprint."""
        output = task_of("").output

        def work(fingerprint: str) -> StepResult:
            task = task_of(fingerprint)
            counts = self.trainings.run(task, self._early_control() if name == "distill" else None)
            adapted = {} if self._adapted is None else self._adapted.counts()
            return StepResult([task.output, task.metrics], counts | adapted)

        fingerprint = self.steps.run(name, depends, work)
        ref = trained_reference(self.config.student, self.inputs.student.ref, self.run_dir.uri_of(output))
        return FingerprintedModel(ref, fingerprint)

    def _race_task(self, arm: Arm, depends: list[Any]) -> TrainTask:
        fingerprint = step_fingerprint("race", depends)
        output = f"race/{arm.name}-{fingerprint[:8]}/student"
        return self._task(arm.config, f"race_{arm.name}", fingerprint, arm.stages, self.inputs.teachers, output)

    def _task(
        self, config: Config, name: str, fingerprint: str, stages: tuple[Stage, ...], teachers: Any, output: str
    ) -> TrainTask:
        return curriculum_task(
            config,
            name=name,
            fingerprint=fingerprint,
            run_dir=self.run_dir,
            stages=stages,
            student=self.inputs.student.ref,
            teachers=teachers,
            rows=self.inputs.rows,
            output=output,
        )

    def _pair_depends(self, stages: tuple[Stage, ...], seed: int) -> list[Any]:
        """Return everything that one training of a pair depends on."""
        config = self._with_training_seed(seed)
        evaluation = config.evaluation.model_dump(mode="json", include={"seeds", "generation"})
        trained = distill_dependencies(config, self.ranking, self.inputs.student.fingerprint, stages)
        return [trained, self.inputs.rows_fingerprint, self.inputs.teacher.fingerprint, evaluation]

    def _pair_job(self, key: tuple[str, int], stages: tuple[Stage, ...], depends: list[Any]) -> Job:
        (side, seed), inputs = key, self.inputs
        config, fingerprint = self._with_training_seed(seed), step_fingerprint("pairs", depends)
        name = f"{side}-seed-{seed}-{fingerprint[:8]}"
        task = curriculum_task(
            config,
            name=name,
            fingerprint=fingerprint,
            run_dir=self.run_dir,
            stages=stages,
            student=inputs.student.ref,
            teachers=inputs.teachers if reads_teacher(config, stages) else (),
            rows=inputs.rows,
            output=f"pairs/students/{name}/student",
        )
        judged = judge_task(config, self.run_dir, inputs.rows.tests, inputs.teacher.ref)
        return Job(name, task.without_unread_answers(), judged)

    def _with_training_seed(self, seed: int) -> Config:
        return self.config.model_copy(update={"train": self.config.train.model_copy(update={"seed": seed})})
