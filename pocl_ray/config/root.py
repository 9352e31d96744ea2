"""The whole config of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pocl_ray.config.base import Section, Seeds
from pocl_ray.config.experiments import ExperimentConfig
from pocl_ray.config.race import RACE, RaceConfig
from pocl_ray.config.scaling import ScalingConfig
from pocl_ray.config.sources import (
    DataConfig,
    DifficultyConfig,
    GenerationConfig,
    OtherTeacherConfig,
    StudentConfig,
    TeacherConfig,
    TokenizerConfig,
)
from pocl_ray.config.training import FRONTIER, CurriculumConfig, DistillConfig, RolloutConfig, SftConfig, TrainConfig
from pocl_ray.config.tuning import TuneConfig
from pocl_ray.records import GAP

# The value of `teacher.cross_tokenizer` for two tokenizers: tokens of the two models are paired by position, and
# probabilities by rank alone. Settings that compare token by token, or that give one model the tokens of the other, are
# refused while the config is read: each function below returns the problem with its remedy, or None.
ULD = "uld"
KEY = "teacher.cross_tokenizer"


def with_bridging_loss(data: dict[str, Any]) -> dict[str, Any]:
    """Return the config's tree, with `distill.loss: uld` added if two tokenizers are bridged and no loss is named."""
    teacher, distill = data.get("teacher"), data.get("distill", {})
    if isinstance(teacher, (list, tuple)) and teacher:
        teacher = teacher[0]
    if not isinstance(teacher, dict) or teacher.get("cross_tokenizer") != ULD or not isinstance(distill, dict):
        return data
    return {**data, "distill": {"loss": ULD, **distill}}


def uld_problem(
    distill: DistillConfig, rollout: RolloutConfig, curriculum: CurriculumConfig, control_kd_ratio: float | None
) -> str | None:
    """Return the key that would leave loss `uld` without cross-entropy, with the remedy; None if there is none.

    The loss does not change when tokens are renamed. Only cross-entropy says which token is right.
    """
    on_rollouts = rollout.is_on and (rollout.loss or distill.loss) == ULD
    ratios = {
        "curriculum.kd_ratio": curriculum.kd_ratio.bounds()[1] if distill.loss == ULD else None,
        "control.kd_ratio": control_kd_ratio if distill.loss == ULD else None,
        "rollout.kd_ratio": rollout.kd_ratio if on_rollouts else None,
    }
    for key, ratio in ratios.items():
        if ratio is not None and ratio >= 1:
            remedy = "set it lower, such as 0.6, the paper's weight"
            return f"{key} reaches 1, and loss uld alone does not say which token is right; {remedy}"
    return None


def model_problem(
    teacher: TeacherConfig, others: Sequence[TeacherConfig], student: StudentConfig, tokenizer: TokenizerConfig
) -> str | None:
    """Return why these models cannot be bridged (they share a tokenizer, or have none), or None if they can."""
    if any(other.cross_tokenizer is not None for other in others) or (teacher.cross_tokenizer and others):
        return f"{KEY} {ULD} bridges a teacher that is alone; remove it, or the other teachers"
    if teacher.cross_tokenizer is None:
        return None
    if teacher.path is None:
        return f"{KEY} {ULD}: a teacher made from an architecture has no tokenizer of its own; give teacher.path"
    if student.num_layers is not None:
        return (
            f"{KEY} {ULD}: a student cut from its teacher (student.num_layers) has its tokenizer; give student.path "
            f"or student.architecture, or remove {KEY}"
        )
    if student.path is None and tokenizer == TokenizerConfig():
        return (
            f"{KEY} {ULD}: a student made from an architecture brings no tokenizer; set tokenizer.path or "
            "tokenizer.train_vocab_size"
        )
    return None


def method_problem(distill: DistillConfig, rollout: RolloutConfig, task: str, signals: Iterable[str]) -> str | None:
    """Return the method setting that does not work with two tokenizers, or None if all work."""
    if distill.loss != ULD:
        return (
            f"{KEY} {ULD} takes the place of the divergence, and distill.loss {distill.loss} compares token by token; "
            "leave distill.loss out"
        )
    if distill.token_weight != "none":
        return f"{KEY} {ULD}: distill.token_weight weighs tokens that the two do not share; set it to none"
    if rollout.is_on:
        return f"{KEY} {ULD}: rollouts are the student's tokens, which the teacher cannot read; set rollout.mode to off"
    if task == "text":
        return f"{KEY} {ULD}: rows of plain text are cut by tokens, elsewhere for each model; set another data.task"
    if "teacher_student_kl" in signals:
        return (
            f"{KEY} {ULD}: teacher_student_kl has no meaning over two vocabularies; give difficulty.signals others, "
            "such as ce_loss or teacher_ce_loss, each on its model's own tokens"
        )
    return None


class ControlConfig(Section):
    """Plain distillation with the same number of optimizer steps: the control that the curriculum is compared with."""

    kd_temperature: float = Field(default=1.0, gt=0)
    kd_ratio: float = Field(default=1.0, ge=0, le=1)
    seeds: tuple[int, ...] = Field(
        default=(),
        description="further seeds of training: the curriculum and the control are trained again on each, in pairs, "
        "which gives the report's comparison an interval; at least two, or none",
    )

    @model_validator(mode="after")
    def _has_pairs(self) -> ControlConfig:
        if len(self.seeds) == 1:
            raise ValueError("seeds: one pair gives no interval; name two seeds or more, or none")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds, default=0) < 0:
            raise ValueError("seeds must be different whole numbers from 0 on")
        return self


class FinalGenerationConfig(GenerationConfig):
    """Generation of answers in the final evaluation: sampled, as in the authors' code."""

    no_repeat_ngram_size: int = Field(default=6, ge=0, description="0: repetition is allowed")


class DevGenerationConfig(GenerationConfig):
    """Generation of dev answers during training: greedy."""

    sampling_temperature: float = Field(default=0.0, ge=0, description="0: greedy")


class EvaluationTaskConfig(Section):
    """A task of EleutherAI's lm-evaluation-harness; its name alone stands for `{name: ...}`."""

    name: str = Field(min_length=1, description="task, group or tag that lm-eval knows, or that `path` defines")
    path: str | None = Field(
        default=None, description="folder with task YAMLs of your own; their data files are relative to it"
    )
    num_fewshot: int | None = Field(
        default=None, ge=0, description="examples before each question; default: the number that the task sets"
    )
    limit: int | None = Field(default=None, ge=1, description="only the first rows of each task; default: all")


class EvaluationConfig(Section):
    """Comparison of the distilled student with the untuned student and the teacher (POCL, section 4.1)."""

    seeds: Seeds = Field(default=(10, 20, 30, 40, 50), min_length=1, description="one sampled answer each")
    greedy: bool = Field(default=True, description="greedy answers as well")
    generation: FinalGenerationConfig = FinalGenerationConfig()
    dev_generation: DevGenerationConfig = DevGenerationConfig()
    max_dev_rows: int | None = Field(default=None, ge=1, description="rows of the dev ROUGE-L during training")
    teacher: bool = Field(default=True, description="evaluate the teacher as well")
    student_before: bool = Field(default=True, description="evaluate the student before distillation as well")
    tasks: tuple[EvaluationTaskConfig, ...] = Field(
        default=(),
        description="tasks of lm-eval on which the same models are evaluated, such as `[arc_easy, hellaswag]`; they "
        "need the extra `lm-eval` (docs/guides/lm_eval.md)",
    )

    @field_validator("tasks", mode="before")
    @classmethod
    def _named_alone(cls, tasks: Any) -> Any:
        if not isinstance(tasks, (list, tuple)):
            return tasks
        return [{"name": task} if isinstance(task, str) else task for task in tasks]

    @field_validator("tasks")
    @classmethod
    def _names_differ(cls, tasks: tuple[EvaluationTaskConfig, ...]) -> tuple[EvaluationTaskConfig, ...]:
        names = [task.name for task in tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{twice[0]} stands twice; name each task once")
        return tasks


class ReportConfig(Section):
    """Contents of the report other than figures."""

    num_examples: int = Field(
        default=5, ge=0, description="number of easiest rows, and of hardest rows, that are shown"
    )


class HubConfig(Section):
    """The repository on the Hugging Face Hub that `pocl-ray run` pushes the student to at its end."""

    repo: str = Field(description="owner/name; it is made if it is missing")
    private: bool = Field(default=False, description="whether a repository that is made is private")


TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class Config(Section):
    """All settings of a run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the run's directory under storage_path")
    storage_path: str = Field(default="runs", description="a local directory or s3://, gs://, hdfs://")
    seed: int = Field(default=42, ge=0)
    data: DataConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    teacher: TeacherConfig
    other_teachers: tuple[OtherTeacherConfig, ...] = Field(
        default=(),
        description="further teachers, by `weight` or by `stages`; a list under `teacher` puts all but the first here",
    )
    student: StudentConfig
    difficulty: DifficultyConfig = DifficultyConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    distill: DistillConfig = DistillConfig()
    rollout: RolloutConfig = RolloutConfig()
    train: TrainConfig = TrainConfig()
    control: ControlConfig | None = Field(default=None, description="also train plain KD, as a control")
    scaling: ScalingConfig = ScalingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    report: ReportConfig = ReportConfig()
    tracking: tuple[TrackerName, ...] = Field(
        default=("tensorboard",), description="trackers that receive metrics and results (docs/tracking.md)"
    )
    hub: HubConfig | None = Field(default=None, description="push the student when the run is done (docs/hub.md)")
    tune: TuneConfig | None = Field(default=None, description="the search of `pocl-ray tune`")
    experiment: ExperimentConfig | None = Field(default=None, description="the comparison of `pocl-ray experiment`")

    @model_validator(mode="before")
    @classmethod
    def _list_of_teachers(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("teacher"), (list, tuple)):
            return data
        teachers = data["teacher"]
        if not teachers or data.get("other_teachers"):
            raise ValueError("teacher is a list of at least one, and other_teachers is then left out")
        return {**data, "teacher": teachers[0], "other_teachers": teachers[1:]}

    @model_validator(mode="before")
    @classmethod
    def _loss_over_two_tokenizers(cls, data: Any) -> Any:
        return with_bridging_loss(data) if isinstance(data, dict) else data

    @model_validator(mode="before")
    @classmethod
    def _signal_of_frontier(cls, data: Any) -> Any:
        """Rank rows by the gap if frontier pacing draws by it and no signal is named, since nothing else is read.

        In a race an arm may draw by it; over two tokenizers none can.
        """
        curriculum = data.get("curriculum") if isinstance(data, dict) else None
        if not isinstance(curriculum, dict) or curriculum.get("pacing") not in (FRONTIER, RACE):
            return data
        teacher = data.get("teacher")
        if curriculum["pacing"] == RACE and isinstance(teacher, dict) and teacher.get("cross_tokenizer") is not None:
            return data
        difficulty = data.get("difficulty", {})
        return {**data, "difficulty": {"signals": [GAP], **difficulty}} if isinstance(difficulty, dict) else data

    @field_validator("tracking")
    @classmethod
    def _names_each_tracker_once(cls, names: tuple[TrackerName, ...]) -> tuple[TrackerName, ...]:
        if len(set(names)) < len(names):
            raise ValueError("tracking names a tracker twice")
        return names

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if self.distill.teacher_cache != "none" and any(one.sharded for one in (self.teacher, *self.other_teachers)):
            raise ValueError(
                "teacher.sharded splits a teacher that runs live, and distill.teacher_cache is "
                f"{self.distill.teacher_cache}, where training loads no teacher; set one of them to false or none"
            )
        if self.teacher.stages is not None and not self.other_teachers:
            raise ValueError("teacher.stages leaves the other stages without a teacher; add other_teachers for them")
        if self.teacher.architecture is not None and self.tokenizer == TokenizerConfig():
            raise ValueError("a teacher made from an architecture brings no tokenizer: set tokenizer.train_vocab_size")
        if self.curriculum.pacing == FRONTIER:
            self._check_frontier()
        if self.curriculum.pacing == RACE:
            self._check_race()
        self._check_tokenizers()
        if self.data.task == "text":
            self._check_text()
        self._check_training("train", self.train)
        if self.control is not None and self.control.seeds and self.curriculum.advance == "plateau":
            raise ValueError(
                "control.seeds needs sides with equally many steps, which curriculum.advance plateau leaves open: "
                "remove the seeds, or set advance to interval"
            )
        if self.train.lr_schedule == "wsd" and self.curriculum.advance == "plateau":
            raise ValueError(
                "train.lr_schedule wsd falls over the end of the run, and with curriculum.advance plateau nobody knows "
                "when that is; set lr_schedule to another, or advance to interval"
            )
        for role, model in (("teacher", self.teacher), ("student", self.student)):
            if model.sft is not None:
                self._check_training(f"{role}.sft.train", self.sft_train(model.sft))
        if self.rollout.is_on:
            self._check_rollouts()
        return self

    @property
    def _measured(self) -> tuple[str, ...]:
        """The signals that the config names."""
        return (*self.difficulty.signals, *self.difficulty.also_measure)

    @property
    def student_seed(self) -> int:
        """The seed of a student's weights and of its fine-tuning."""
        return self.seed if self.student.seed is None else self.student.seed

    def _check_frontier(self) -> None:
        if self.teacher.cross_tokenizer is not None:
            raise ValueError(
                "curriculum.pacing frontier draws rows by KL(teacher || student), which has no meaning over two "
                "tokenizers (teacher.cross_tokenizer); set pacing to another"
            )
        sees_no_data = self.rollout.mode == "on" and not self.rollout.beside_data
        if sees_no_data and self.curriculum.frontier.refresh == "training":
            raise ValueError(
                "curriculum.frontier.refresh training: with rollout.mode on no step reads a response of the data, so "
                "no gap would ever be measured; set refresh to rescore, or rollout.beside_data to true"
            )

    def _check_race(self) -> None:
        for section in ("tune", "experiment"):
            if getattr(self, section) is not None:
                raise ValueError(
                    f"curriculum.pacing race trains several arms itself, and so does {section}; remove {section}, or "
                    "set curriculum.pacing to another"
                )
        if self.control is not None and self.control.seeds:
            raise ValueError(
                "control.seeds trains the curriculum again, and which that is only the race decides; remove the seeds, "
                "or compare its arms with pocl-ray experiment"
            )
        race = self.curriculum.race or RaceConfig()
        if race.figure == "kl" and self.teacher.cross_tokenizer is not None:
            raise ValueError(
                "curriculum.race.figure kl has no meaning over two tokenizers (teacher.cross_tokenizer); set it to "
                "ce_loss"
            )

    def _check_tokenizers(self) -> None:
        problem = model_problem(self.teacher, self.other_teachers, self.student, self.tokenizer)
        if problem is None and self.teacher.cross_tokenizer is not None:
            problem = method_problem(self.distill, self.rollout, self.data.task, self._measured)
        control = None if self.control is None else self.control.kd_ratio
        if problem := problem or uld_problem(self.distill, self.rollout, self.curriculum, control):
            raise ValueError(problem)

    def _check_rollouts(self) -> None:
        if self.distill.teacher_cache != "none":
            raise ValueError(
                f"rollout.mode {self.rollout.mode} writes responses that no teacher cache can hold; set "
                "distill.teacher_cache to none, which runs the teacher live"
            )
        if self.rollout.mode == "adaptive" and self.rollout.buffer_rows < self.train.global_batch_rows:
            raise ValueError(
                f"rollout.buffer_rows ({self.rollout.buffer_rows}) must be at least train.global_batch_rows "
                f"({self.train.global_batch_rows}): a step is drawn from the buffer as a whole"
            )
        if self.rollout.backend == "vllm" and self.scaling.use_gpu is False:
            raise ValueError("rollout.backend vllm runs on GPUs; set it to transformers, or scaling.use_gpu to true")
        if self.rollout.backend == "vllm" and self.student.lora is not None:
            raise ValueError("rollout.backend vllm takes no adapters; set it to transformers, or remove student.lora")

    def _check_text(self) -> None:
        """Refuse settings that need answers to prompts when rows are plain text."""
        no_prompts = "data.task text has no prompts to answer"
        if self.data.responses == "teacher":
            raise ValueError(f"data.responses: {no_prompts}, which the teacher could write to; set it to reference")
        if self.rollout.mode != "off":
            raise ValueError(f"rollout.mode: {no_prompts}, which the student could write to; set it to off")
        for signal in ("rouge_l", "num_prompt_tokens"):
            if signal in self._measured:
                key = "signals" if signal in self.difficulty.signals else "also_measure"
                raise ValueError(
                    f"difficulty.{key}: {no_prompts}, so there is no {signal}; "
                    "give others, such as [ce_loss, teacher_ce_loss]"
                )
        if self.rollout.is_on:
            raise ValueError(f"rollout.mode: {no_prompts}; set it to off")
        if self.curriculum.advance == "plateau" and self.curriculum.plateau.metric == "rouge_l":
            raise ValueError(f"curriculum.plateau.metric: {no_prompts}; set it to kd_loss or ce_loss")
        for objective in () if self.tune is None else self.tune.objectives:
            if objective.metric in ("rouge_l", "exact_match"):
                raise ValueError(f"tune.objectives: {no_prompts}, so there is no {objective.metric}; give kd_loss")

    def _check_training(self, key: str, train: TrainConfig) -> None:
        for count in (self.scaling.min_workers, self.scaling.max_workers):
            if train.global_batch_rows % count:
                raise ValueError(
                    f"{key}.global_batch_rows ({train.global_batch_rows}) must be a multiple of "
                    f"scaling.num_workers ({count})"
                )
        if train.zero_stage == 0 and train.precision != "fp32":
            raise ValueError(
                f"{key}.zero_stage 0 works with {key}.precision fp32 alone, since DeepSpeed keeps no exact master "
                "weights there; set it to 1"
            )

    def sft_train(self, sft: SftConfig) -> TrainConfig:
        """Return `train` with the keys that `sft.train` sets."""
        own = sft.train.model_dump(exclude_none=True)
        merged: dict[str, Any] = {**self.train.model_dump(), **own}
        sizes = ("micro_batch_rows", "micro_batch_tokens")
        if any(key in own for key in sizes):  # the one takes the place of the other
            merged.update({key: own.get(key) for key in sizes})
        merged["average"] = "none"
        return TrainConfig.model_validate(merged)
