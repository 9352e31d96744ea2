"""Config of the curriculum and of training: stages, loss, optimizer, rollouts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from pocl_ray.config.base import Number, Section, TokenBudget
from pocl_ray.config.race import RACE, RaceConfig
from pocl_ray.config.schedules import LossArg, ScheduleConfig

Beta = Annotated[float, Field(ge=0, lt=1)]
TokenScore = Literal["teacher_entropy", "teacher_certainty", "student_entropy", "divergence", "hellinger", "tip"]
STUDENT_SCORES = ("student_entropy", "divergence", "hellinger", "tip")
"""The scores of tokens that depend on the student."""
FRONTIER = "frontier"
"""The pacing rule that draws rows by their gaps."""


class PlateauConfig(Section):
    """Convergence of a stage that may end early."""

    metric: Literal["rouge_l", "kd_loss", "ce_loss"] = Field(
        default="rouge_l", description="dev figure that is watched"
    )
    patience: int = Field(default=2, ge=1, description="evaluations without a better figure that end the stage")
    min_epochs: int = Field(
        default=1, ge=1, description="minimum epochs of a stage; the maximum is curriculum.interval_epochs"
    )


class FrontierConfig(Section):
    """Pacing `frontier`: rows are drawn by their gap, which is the mean KL(teacher || student) per token."""

    power: float = Field(default=0.5, ge=0, description="exponent: a row's probability grows with (gap + floor)^power")
    floor: float = Field(
        default=0.02, gt=0, description="added to each gap, in nats, so that no row's probability falls to zero"
    )
    saturation: float | None = Field(
        default=None,
        gt=0,
        description="nats; takes the weight (gap + floor) / (gap + saturation) in place of the power, which is "
        "bounded: for rows that the student can never learn, as with noise or a much larger teacher",
    )
    num_stages: int = Field(
        default=8, ge=1, description="number of equal parts of the run; before each, rows are drawn again"
    )
    refresh: Literal["training", "rescore"] = Field(
        default="training",
        description="training: gaps come from the training steps, or from the first scoring for rows not yet seen; "
        "rescore: rows are measured before each stage after the first, which costs a forward pass of each",
    )
    rescore_rows: int | None = Field(
        default=None,
        ge=1,
        description="with refresh rescore: number of rows that are measured, drawn by seed; null: all",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> FrontierConfig:
        if self.saturation is not None and self.saturation <= self.floor:
            raise ValueError(
                f"saturation ({self.saturation:g}) must be above floor ({self.floor:g}), or a larger gap weighs less"
            )
        if self.rescore_rows is not None and self.refresh == "training":
            raise ValueError("rescore_rows are measured between stages; set refresh to rescore, or remove rescore_rows")
        return self


class CurriculumConfig(Section):
    """Buckets, pacing, and the values that change from stage to stage (POCL, section 3.3)."""

    pacing: str = Field(
        default="baby_step",
        description="baby_step, one_pass, competence, anti, random, frontier, none (plain distillation), or a "
        "plug-in's; race: plain distillation and the curricula of `race.arms`, of which the best is handed out; "
        "frontier and race have defaults of their own: optimizer continuous, hand_off last, kd_ratio 1, and "
        "kd_temperature from 1 to 2 by step, for race 1",
    )
    frontier: FrontierConfig = FrontierConfig()
    race: RaceConfig | None = Field(default=None, description="the arms of pacing race; null: the default ones")
    pacing_args: dict[str, Number] = Field(
        default_factory=dict, description="parameters of the rule; competence: root, start, num_stages"
    )
    num_buckets: int = Field(default=4, ge=1, le=10_000)
    interval_epochs: int = Field(
        default=8, ge=1, le=1_000_000, description="epochs of a stage; with advance plateau, the maximum"
    )
    advance: Literal["interval", "plateau"] = Field(
        default="interval", description="a stage ends after interval_epochs, or when the dev figure stops improving"
    )
    plateau: PlateauConfig = PlateauConfig()
    num_steps: int | None = Field(
        default=None,
        ge=1,
        description="optimizer steps of all stages together: the last stage takes what the others leave; "
        "null: each stage has its interval",
    )
    kd_temperature: ScheduleConfig = ScheduleConfig(start=1.0, end=2.0)
    kd_ratio: ScheduleConfig = ScheduleConfig(start=0.7, end=1.0)
    optimizer: Literal["restart", "continuous"] = Field(
        default="restart",
        description="restart: fresh moments and LR schedule in each stage (the paper); continuous: one over all stages",
    )
    hand_off: Literal["best", "last"] = Field(
        default="best", description="checkpoint that the next stage starts from: the best by dev ROUGE-L, or the last"
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_frontier(cls, data: Any) -> Any:
        """Set the defaults that frontier pacing was found to win with; its stages are parts of one run.

        A race has them too, but for the temperature, which is that of plain distillation.
        """
        if not isinstance(data, dict) or data.get("pacing") not in (FRONTIER, RACE):
            return data
        temperature = {"start": 1.0, "end": 2.0, "by": "step"} if data["pacing"] == FRONTIER else 1.0
        return {"optimizer": "continuous", "hand_off": "last", "kd_ratio": 1.0, "kd_temperature": temperature, **data}

    @model_validator(mode="after")
    def _race(self) -> CurriculumConfig:
        if self.pacing == RACE and self.advance == "plateau":
            raise ValueError("advance plateau: the arms of pacing race take equal steps; set it to interval")
        if self.pacing == RACE and self.pacing_args:
            raise ValueError("pacing_args: pacing race takes its parameters under curriculum.race; move them")
        return self

    @model_validator(mode="after")
    def _frontier(self) -> CurriculumConfig:
        if self.pacing != FRONTIER:
            return self
        if self.pacing_args:
            raise ValueError("pacing_args: pacing frontier takes its parameters under curriculum.frontier; move them")
        if self.advance == "plateau":
            raise ValueError("advance plateau: the stages of pacing frontier are of equal length; set it to interval")
        if self.kd_ratio.bounds()[1] == 0:
            raise ValueError(
                "pacing frontier draws rows by how far the student is from the teacher, and with kd_ratio 0 no teacher "
                "is read; set kd_ratio above 0, or pacing to none"
            )
        return self

    @model_validator(mode="after")
    def _interval(self) -> CurriculumConfig:
        if self.advance == "plateau" and self.num_steps is not None:
            raise ValueError("num_steps fixes the length, which advance plateau leaves open; set advance to interval")
        if self.advance == "plateau" and self.plateau.min_epochs > self.interval_epochs:
            raise ValueError(
                f"plateau.min_epochs ({self.plateau.min_epochs}) is above interval_epochs ({self.interval_epochs}), "
                "the most epochs of a stage"
            )
        return self

    @field_validator("kd_temperature")
    @classmethod
    def _positive(cls, schedule: ScheduleConfig) -> ScheduleConfig:
        if schedule.bounds()[0] <= 0:
            raise ValueError("temperatures must be above 0")
        return schedule

    @field_validator("kd_ratio")
    @classmethod
    def _share(cls, schedule: ScheduleConfig) -> ScheduleConfig:
        low, high = schedule.bounds()
        if low < 0 or high > 1:
            raise ValueError("kd_ratio lies between 0 (supervised) and 1 (distillation alone)")
        return schedule


class DistillConfig(Section):
    """The distillation loss, and the source of the teacher's part of it."""

    loss: str = Field(default="forward_kl", description="a divergence of pocl_ray.distill.losses, or a plug-in's")
    loss_args: dict[str, LossArg] = Field(
        default_factory=dict,
        description="parameters of the loss: alpha, lam, beta, k ...; each a number, or a schedule by stage or by step "
        "as kd_temperature has it: {beta: {start: 0, end: 0.5, by: step}}",
    )
    scale_by_t_squared: bool | None = Field(
        default=None, description="multiply by kd_temperature squared; null: as the authors do for this loss"
    )
    token_weight: Literal["none", TokenScore] = Field(
        default="none",
        description="response tokens that count more in kd_loss: those where the teacher is unsure (entropy) or sure "
        "(certainty), where the student is unsure, where the two are far apart (KL or Hellinger), or either (tip); the "
        "mean weight of a step is 1; those of the student cost one more forward pass of a step's rows",
    )
    token_keep: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of a step's response tokens, those with the highest token_weight, that alone count in "
        "kd_loss, all alike; null: all count, by their weight",
    )
    token_weight_strength: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="share of a token's weight that follows token_weight; the rest is equal for all tokens",
    )
    teacher_cache: Literal["none", "hidden", "topk"] = Field(
        default="hidden",
        description="hidden: store the teacher's final hidden states once (exact); topk: its likeliest tokens and the "
        "mass of the others (smaller for wide teachers, a lower bound of the divergence); none: run it live",
    )
    top_k: int = Field(default=64, ge=1, description="tokens that a topk cache keeps of each response token")
    cache_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="dtype of the teacher cache; auto: the teacher's own, or float16 for a topk cache of a "
        "half-precision teacher",
    )
    chunk_mib: int = Field(default=64, ge=1, description="float32 logits held at a time, in MiB")
    kernel: Literal["auto", "torch", "liger"] = Field(
        default="auto",
        description="kernel of the divergence; auto: Liger's on CUDA if it is installed and covers the loss",
    )

    @model_validator(mode="after")
    def _keeps_by_a_score(self) -> DistillConfig:
        if self.token_keep is not None and self.token_weight == "none":
            raise ValueError("token_keep keeps the tokens of the highest token_weight, which is none; set it")
        return self

    @model_validator(mode="after")
    def _cache(self) -> DistillConfig:
        if self.teacher_cache != "topk":
            return self
        if self.loss == "uld":
            raise ValueError(
                "loss uld sorts the teacher's whole distribution, which teacher_cache topk does not keep; set it to "
                "hidden or none"
            )
        if self.cache_dtype == "bfloat16":
            raise ValueError("cache_dtype bfloat16 is too coarse for log-probabilities; set it to float16 or float32")
        if self.loss == "top_k_kl":
            raise ValueError(
                "loss top_k_kl takes the top k of logits, which a topk cache has done already; set loss to forward_kl, "
                "which over such a cache is top_k_kl with k = top_k"
            )
        return self


DEFAULT_MICRO_BATCH_ROWS = 8


class TrainConfig(Section):
    """Optimizer, batch and precision, for distillation and for supervised fine-tuning."""

    global_batch_rows: int = Field(default=64, ge=1, description="rows of an optimizer step, over all workers")
    micro_batch_rows: int | None = Field(
        default=None, ge=1, description="rows of one forward pass on one worker; null: 8, without micro_batch_tokens"
    )
    micro_batch_tokens: TokenBudget | None = Field(
        default=None,
        description="tokens of one forward pass on one worker, in place of micro_batch_rows: as many rows as they hold,"
        " equally much for each worker; auto: what fills a GPU; null: rows are counted",
    )
    packing: Literal["auto", "off"] = Field(
        default="auto",
        description="auto: rows follow each other without padding where the model family can read them so exactly; "
        "off: rows are padded to the longest of a micro-batch",
    )
    learning_rate: float = Field(default=1e-4, gt=0)
    lr_schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1, description="share of the steps during which the LR rises")
    decay_ratio: float = Field(
        default=0.4,
        gt=0,
        le=1,
        description="with lr_schedule wsd: last share of the whole run's steps, in which the LR falls",
    )
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1, description="LR at the end, relative to the peak")
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=1.0, ge=0, description="0: no clipping")
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload_optimizer: Literal["none", "cpu"] = "none"
    deepspeed: dict[str, Any] | str | None = Field(
        default=None, description="your own DeepSpeed config (mapping or JSON file), merged; a conflict is an error"
    )
    eval_every_epochs: int = Field(default=1, ge=1, description="dev loss and dev ROUGE-L after every k epochs")
    checkpoint_every_steps: int | None = Field(
        default=None,
        ge=1,
        description="steps between checkpoints, in addition to one at each evaluation; null: at each evaluation only",
    )
    num_checkpoints: int = Field(default=2, ge=1, description="newest checkpoints that are kept")
    checkpoint_buffer_gib: float = Field(
        default=4.0,
        ge=0,
        description="memory of the first worker's node that holds a checkpoint while training goes on and the "
        "checkpoint is written; if a checkpoint is larger, training waits until the rest is written; 0: training "
        "waits for all of it",
    )
    log_every_steps: int = Field(default=1, ge=1)
    average: Literal["none", "ema", "last_k"] = Field(
        default="none",
        description="weights that dev figures and the trained student are of; ema: their exponential average over the "
        "steps; last_k: the mean of those at the last evaluations; none: the weights of the last step; not for "
        "supervised fine-tuning",
    )
    average_decay: float = Field(
        default=0.999,
        gt=0,
        lt=1,
        description="with average ema: decay of a step, which rises to this as (1 + t) / (10 + t)",
    )
    average_last: int = Field(
        default=4, ge=2, description="with average last_k: number of evaluations (see eval_every_epochs)"
    )
    max_nonfinite_steps: int = Field(
        default=3,
        ge=1,
        description="consecutive steps with a loss or gradient that is not finite, after which training stops; each of "
        "them changes no weight",
    )
    seed: int | None = Field(
        default=None, ge=0, description="seed of the order of rows and of dropout in distillation; null: the run's seed"
    )

    @model_validator(mode="after")
    def _one_size(self) -> TrainConfig:
        if self.micro_batch_rows is not None and self.micro_batch_tokens is not None:
            raise ValueError(
                f"micro_batch_tokens ({self.micro_batch_tokens}) stands in place of micro_batch_rows "
                f"({self.micro_batch_rows}); remove one of them, or set it to null"
            )
        return self

    @property
    def rows_at_once(self) -> int:
        """The rows of one forward pass where there is no token budget."""
        return self.micro_batch_rows or DEFAULT_MICRO_BATCH_ROWS


class TrainOverrides(Section):
    """Keys of `train` that differ during supervised fine-tuning; keys left out are as in `train`."""

    global_batch_rows: int | None = Field(default=None, ge=1)
    micro_batch_rows: int | None = Field(default=None, ge=1)
    micro_batch_tokens: TokenBudget | None = None
    learning_rate: float | None = Field(default=None, gt=0)
    lr_schedule: Literal["cosine", "linear", "constant", "wsd"] | None = None
    warmup_ratio: float | None = Field(default=None, ge=0, lt=1)
    decay_ratio: float | None = Field(default=None, gt=0, le=1)
    min_lr_ratio: float | None = Field(default=None, ge=0, le=1)
    weight_decay: float | None = Field(default=None, ge=0)
    betas: tuple[Beta, Beta] | None = None
    max_grad_norm: float | None = Field(default=None, ge=0)
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    zero_stage: Literal[0, 1, 2, 3] | None = None
    eval_every_epochs: int | None = Field(default=None, ge=1)
    checkpoint_every_steps: int | None = Field(default=None, ge=1)


class SftConfig(Section):
    """Supervised fine-tuning: the same training loop with one stage, all rows and kd_ratio 0."""

    num_epochs: int = Field(default=1, ge=1)
    max_steps: int | None = Field(default=None, ge=1, description="stop after this many optimizer steps")
    hand_off: Literal["best", "last"] = Field(default="last", description="which checkpoint is the result")
    train: TrainOverrides = TrainOverrides()


class RolloutConfig(Section):
    """On-policy training: the steps in which the student writes the responses, and how it is trained on them."""

    # `lambda` is the name in the paper and in the file, but a reserved word in Python.
    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    mode: Literal["off", "on", "mixed", "adaptive"] = Field(
        default="off",
        description="on: the student writes all responses; mixed: in each step with probability lambda (GKD); "
        "adaptive: by DistiLLM's schedule, with a replay buffer",
    )
    mix_probability: float = Field(
        default=0.5, ge=0, le=1, alias="lambda", description="probability that a step trains on rollouts, in mode mixed"
    )
    beside_data: bool = Field(
        default=False,
        description="train on the rows' own responses in the same optimizer step (DistiLLM-2); in mode on",
    )
    loss: str | None = Field(default=None, description="divergence on rollouts; null: distill.loss, with its loss_args")
    loss_args: dict[str, LossArg] = Field(
        default_factory=dict, description="parameters of rollout.loss, numbers or schedules"
    )
    kd_ratio: float | None = Field(
        default=1.0,
        ge=0,
        le=1,
        description="kd_ratio on rollouts, which are not references to imitate; null: the curriculum's, with "
        "cross-entropy on the student's own words",
    )
    sampling_temperature: float = Field(default=1.0, ge=0, description="0: greedy")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="sample from the likeliest tokens that together have this probability"
    )
    max_new_tokens: int | None = Field(default=None, ge=1, description="default: data.max_tokens less the prompt")
    batch_rows: int = Field(default=64, ge=1, description="rows that a worker generates at once")
    backend: Literal["transformers", "vllm"] = Field(
        default="transformers", description="vllm: on GPUs, where vLLM is installed"
    )
    vllm_gpu_share: float = Field(
        default=0.3, gt=0, lt=1, description="share of a GPU's memory that vllm takes while it generates"
    )
    buffer_rows: int = Field(default=1000, ge=1, description="rollouts that the replay buffer holds, in mode adaptive")
    threshold_start: float = Field(default=0.0, ge=0, le=1, description="phi at the start, in mode adaptive")
    threshold_rise: float = Field(default=0.1, gt=0, le=1, description="amount by which phi rises, up to 1")
    loss_rise: float = Field(
        default=0.1,
        ge=0,
        description="phi rises when the dev cross-entropy is this much above its value at the last rise",
    )

    @field_validator("mode", mode="before")
    @classmethod
    def _words_that_yaml_reads_as_booleans(cls, mode: Any) -> Any:
        return {True: "on", False: "off"}[mode] if isinstance(mode, bool) else mode

    @model_validator(mode="after")
    def _fits_together(self) -> RolloutConfig:
        if self.beside_data and self.mode != "on":
            raise ValueError("beside_data needs rollouts in every step: set mode to on, or beside_data to false")
        if self.loss is None and self.loss_args:
            raise ValueError("loss_args are parameters of rollout.loss, which is not given; set it, or remove them")
        if self.backend == "vllm" and self.mode == "off":
            raise ValueError("backend vllm has nothing to write in mode off; set mode, or remove backend")
        return self

    @property
    def is_on(self) -> bool:
        """Return whether any step trains on rollouts."""
        return self.mode != "off"

    @property
    def uses_teacher(self) -> bool:
        """Return whether the loss on rollouts needs the teacher, independent of the curriculum's `kd_ratio`."""
        return self.is_on and self.kd_ratio is not None and self.kd_ratio > 0
