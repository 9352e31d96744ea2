"""POCL in a Hugging Face `Trainer`: the order of rows, stages, temperature and kd_ratio of a curriculum.

`CurriculumMixin` adds ranking and stages to a trainer class that draws training rows with a sampler; it is the first
base class. `DistillationMixin` adds the loss `(1 - kd_ratio) * ce + kd_ratio * kd(kd_temperature)` with the divergences
of pocl-ray. `CurriculumTrainer` is `transformers.Trainer` with both:

    curriculum = Curriculum.from_run("runs", "dolly")
    trainer = CurriculumTrainer(student, args, train_dataset=rows, curriculum=curriculum, teacher_model=teacher)
    trainer.train()

Axes: B rows, T tokens, V vocabulary, N response tokens of a batch in one flat axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_scheduler,
)
from transformers.trainer_utils import get_last_checkpoint

from pocl_ray.config import DistillConfig, RolloutConfig
from pocl_ray.config.loading import describe
from pocl_ray.curriculum.schedule import loss_schedules, with_loss_ramps
from pocl_ray.distill.gaps import plain_kl
from pocl_ray.distill.losses import resolve_loss
from pocl_ray.errors import ConfigError, DataError, UserError
from pocl_ray.integrations.curriculum import Curriculum, Point
from pocl_ray.integrations.frontier import FrontierSampler

_STATE_KEY = "pocl_ray.curriculum"
_FEATURES = ("input_ids", "attention_mask", "position_ids", "token_type_ids")

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object


class CurriculumCallback(TrainerCallback):
    """A callback that resets the moments at stage borders, and refuses to resume with another plan.

    Args:
        curriculum: Plan of the stages.
        on_point: Function that is called with the step's place before each optimizer step, for trainers that read their
            settings from attributes, such as `lambda point: setattr(trainer, "temperature", point.kd_temperature)`.
    """

    def __init__(self, curriculum: Curriculum, on_point: Callable[[Point], None] | None = None) -> None:
        self.curriculum, self.on_point = curriculum, on_point

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a checkpoint of another plan, and store this plan's digest for later checkpoints.

        Raises:
            ConfigError: The checkpoint was not trained with this curriculum.
        """
        stored: Any = state.stateful_callbacks
        before = stored.get(_STATE_KEY, {}).get("attributes", {}).get("digest")
        if state.global_step > 0 and before != self.curriculum.digest:
            found = "without a curriculum" if before is None else "with another curriculum, ranking, batch or seed"
            raise ConfigError(
                f"the checkpoint at step {state.global_step} was trained {found}; resume with the same one, or "
                "start again"
            )
        stored[_STATE_KEY] = {"args": {}, "attributes": {"digest": self.curriculum.digest}}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restart the optimizer if a new stage requires it, and pass on the step's settings."""
        point = self.curriculum.at(state.global_step)
        if point.stage > 0 and point.stage_step == 0 and self.curriculum.stages[point.stage].restart_optimizer:
            kwargs["optimizer"].state.clear()  # torch's optimizers create new moments if there are none
        if self.on_point is not None:
            self.on_point(point)


class FrontierCallback(TrainerCallback):
    """A callback that writes the gaps of rows, and the rows drawn by them, into each checkpoint."""

    def __init__(self, trainer: CurriculumMixin) -> None:
        self.trainer = trainer

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write them; every process takes part."""
        sampler = self.trainer.frontier_sampler
        assert sampler is not None and args.output_dir is not None, "rows are drawn before a step can be saved"
        sampler.write(Path(args.output_dir) / f"checkpoint-{state.global_step}", args.should_save)


class CurriculumMixin(_Trainer):
    """A mixin that trains through the stages of a curriculum; it comes before the trainer class.

    `class MyTrainer(CurriculumMixin, TheirTrainer)` takes all arguments of their trainer, and the curriculum.
    `max_steps` becomes the length of the plan. The plan is one epoch for the trainer, so set evaluation, saving and
    logging by steps. A loss of your own reads the settings of the step from `self.point`.

    Args:
        curriculum: Plan of the stages.

    Raises:
        UserError: Data set, batch or arguments do not fit the plan.
    """

    def __init__(self, *args: Any, curriculum: Curriculum, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.curriculum = curriculum
        _check_arguments(self, curriculum)
        if self.args.max_steps < 0:
            self.args.max_steps = curriculum.num_steps
        self.add_callback(CurriculumCallback(curriculum))
        self.frontier_sampler: FrontierSampler | None = None
        self._resumed_from: str | None = None
        if curriculum.frontier is not None:
            self.add_callback(FrontierCallback(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the trainer does, from a checkpoint with the gaps that are in it.

        Args:
            resume_from_checkpoint: Directory of a checkpoint; True: the newest one.
            args: Further arguments of the trainer.
            kwargs: Further arguments of the trainer.
        """
        place = resume_from_checkpoint
        if place is True:
            place = get_last_checkpoint(str(self.args.output_dir))
        self._resumed_from = place or None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    @property
    def point(self) -> Point:
        """The place of the current optimizer step in the curriculum."""
        return self.curriculum.at(self.state.global_step)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if not hasattr(dataset, "__len__"):
            raise DataError("a curriculum needs a data set whose rows have numbers; a streamed one has not")
        self.curriculum.check(len(dataset), self.get_total_train_batch_size(self.args))
        if self.curriculum.frontier is None:
            return self.curriculum.sampler()
        if getattr(self, "teacher_model", None) is None or not isinstance(self, DistillationMixin):
            raise ConfigError(
                "curriculum.pacing frontier draws rows by KL(teacher || student), and the loss of "
                f"{type(self).__name__} reads no teacher (the cross-entropy of a row is no "
                "substitute); give teacher_model, or another pacing"
            )
        self.frontier_sampler = FrontierSampler(self.curriculum, self.args.device)
        if self._resumed_from is not None:
            state = TrainerState.load_from_json(str(Path(self._resumed_from) / "trainer_state.json"))
            self.frontier_sampler.restore(Path(self._resumed_from), state.global_step)
        return self.frontier_sampler

    def get_train_dataloader(self) -> DataLoader:
        """Return the trainer's own data loader over the rows of the curriculum.

        Raises:
            UserError: Data set or batch do not fit, or the trainer does not draw its rows with a sampler.
        """
        if isinstance(self.train_dataset, torch.utils.data.IterableDataset):
            raise DataError("a curriculum needs a data set whose rows have numbers; a streamed one has not")
        loader = super().get_train_dataloader()
        if len(loader) != self.curriculum.num_steps * self.args.gradient_accumulation_steps:
            raise ConfigError(
                f"{type(self).__name__} cuts the rows of the curriculum into {len(loader)} batches a process instead "
                f"of {self.curriculum.num_steps * self.args.gradient_accumulation_steps}; it has a sampling of its own"
            )
        return loader

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Return the LR schedule of the arguments, once for each stage if stages restart the optimizer.

        Raises:
            ConfigError: This kind of schedule cannot be restarted.
        """
        if not self.curriculum.restarts or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        found = self.optimizer if optimizer is None else optimizer
        assert found is not None, "the trainer makes its optimizer first"
        self.lr_scheduler = _restarting_schedule(self.curriculum, self.args, found)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the losses of training together with the stage of the last step."""
        if "loss" in logs:
            logs = {**logs, **self._curriculum_logs(self.curriculum.at(self.state.global_step - 1))}
        super().log(logs, start_time)

    def _curriculum_logs(self, point: Point) -> dict[str, float]:
        return {"curriculum/stage": point.stage}


class DistillationMixin(CurriculumMixin):
    """A mixin with pocl-ray's distillation loss at the step's temperature and kd_ratio; it needs `self.teacher_model`.

    The loss is a sum over response tokens (labels other than -100), divided by their number in the optimizer step over
    all processes. In evaluation it is the divergence alone at temperature 1, so that stages can be compared.

    Args:
        loss: Divergence of `pocl_ray.distill.losses`, or of a plug-in.
        loss_args: Parameters of the loss; each a number, or a schedule as a config has it, such as
            `{"beta": {"start": 0, "end": 0.5, "by": "step"}}`, over the stages and steps of the curriculum. Evaluation
            takes a schedule's last value.
        scale_by_t_squared: Whether to multiply by the temperature squared; None: as the authors of the loss do.

    Raises:
        UserError: The loss is unknown; or as in `CurriculumMixin`.
    """

    teacher_model: Any

    def __init__(
        self,
        *args: Any,
        loss: str = "forward_kl",
        loss_args: Mapping[str, Any] | None = None,
        scale_by_t_squared: bool | None = None,
        **kwargs: Any,
    ) -> None:
        settings = _distill_config(loss, loss_args)
        self.divergence = resolve_loss(loss, settings.loss_args, scale_by_t_squared)
        self._batch_of_step = (-1, 0)
        self._labels_of_data: Tensor | None = None
        super().__init__(*args, **kwargs)
        self._stages = with_loss_ramps(self.curriculum.stages, loss_schedules(settings, RolloutConfig()))
        if self.compute_loss_func is not None or self.args.label_smoothing_factor:
            raise ConfigError("compute_loss_func and label_smoothing_factor do not go with the distillation loss")
        self.model_accepts_loss_kwargs = True  # otherwise the trainer would not count the response tokens of a step

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Train on a batch; its place among the batches of the step tells which rows it holds."""
        step, place = self._batch_of_step
        self._batch_of_step = (self.state.global_step, place + 1 if step == self.state.global_step else 0)
        # A trainer may replace the responses by answers of the student; the gap is that of the data's.
        self._labels_of_data = inputs.get("labels")
        return super().training_step(model, inputs, *args, **kwargs)

    @torch.no_grad()
    def _measure_gaps(self, labels_BT: Tensor, student_NV: Tensor, teacher_NV: Tensor) -> None:
        sampler, of_data_BT = self.frontier_sampler, self._labels_of_data
        if sampler is None or of_data_BT is None:
            return
        if of_data_BT.shape != labels_BT.shape or not torch.equal(of_data_BT.to(labels_BT.device), labels_BT):
            return
        step, batch = self._batch_of_step
        place = batch * self.accelerator.num_processes + self.accelerator.process_index
        lengths_B = (labels_BT[:, 1:] != -100).sum(1).cpu().numpy()
        sampler.visit(step, place, lengths_B, plain_kl(student_NV, teacher_NV))

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a batch, and the student's outputs if they are requested."""
        if self.teacher_model is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if "labels" not in inputs:
            raise DataError("a batch has no labels, -100 outside the response; let the collator make them")
        features = {name: inputs[name] for name in _FEATURES if name in inputs}
        outputs = model(**features)
        is_response_BT = inputs["labels"][:, 1:] != -100
        targets_N = inputs["labels"][:, 1:][is_response_BT]
        student_NV = outputs.logits[:, :-1][is_response_BT]
        self.teacher_model.eval()
        with torch.no_grad():
            teacher_NV = self.teacher_model(**features).logits[:, :-1][is_response_BT]
        if model.training:
            self._measure_gaps(inputs["labels"], student_NV.detach(), teacher_NV)
        point = self.point if model.training else Point(0, 0, kd_temperature=1.0, kd_ratio=1.0)
        loss = self._summed_loss(point, student_NV, teacher_NV, targets_N, model.training)
        loss = loss / self._normaliser(num_items_in_batch, targets_N)
        return (loss, outputs) if return_outputs else loss

    def _loss_args(self, point: Point) -> dict[str, float]:
        return self._stages[point.stage].loss_args_at(point.stage_step, "distill")

    def _summed_loss(
        self, point: Point, student_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor, is_training: bool
    ) -> Tensor:
        """(1 - kd_ratio) * ce + kd_ratio * kd, summed over tokens; vocabularies are cut to the shared part for kd."""
        shared = min(student_NV.shape[-1], teacher_NV.shape[-1])
        divergence = self.divergence.at(self._loss_args(point) if is_training else {})
        kd_N = divergence(student_NV[:, :shared], teacher_NV[:, :shared], point.kd_temperature)
        if point.kd_ratio == 1.0:
            return kd_N.sum()
        ce_N = F.cross_entropy(student_NV.float(), targets_N, reduction="none")
        return ((1 - point.kd_ratio) * ce_N + point.kd_ratio * kd_N).sum()

    def _normaliser(self, num_items_in_batch: Tensor | int | None, targets_N: Tensor) -> Tensor | float:
        """The divisor of the sum. It undoes the average of gradients over processes."""
        if num_items_in_batch is None:
            return max(1, targets_N.numel())
        spread = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return num_items_in_batch / spread

    def _curriculum_logs(self, point: Point) -> dict[str, float]:
        logs = super()._curriculum_logs(point)
        if self.teacher_model is None:
            return logs
        settings = {"curriculum/kd_temperature": point.kd_temperature, "curriculum/kd_ratio": point.kd_ratio}
        return {**logs, **settings, **{f"distill/loss_args/{k}": v for k, v in self._loss_args(point).items()}}


def _distill_config(loss: str, loss_args: Mapping[str, Any] | None) -> DistillConfig:
    try:
        return DistillConfig(loss=loss, loss_args=dict(loss_args or {}))
    except ValidationError as error:
        raise ConfigError(describe(error)) from None


class CurriculumTrainer(DistillationMixin, Trainer):
    """A `transformers.Trainer` that distils with a curriculum, or trains on the references if there is no teacher.

    Args:
        teacher_model: Frozen teacher, complete on every process. Without one the loss is the model's own, and
            temperature and kd_ratio of the curriculum do not apply.
    """

    def __init__(self, *args: Any, teacher_model: PreTrainedModel | None = None, **kwargs: Any) -> None:
        self.teacher_model = None
        super().__init__(*args, **kwargs)
        if teacher_model is not None:
            self.teacher_model = teacher_model.requires_grad_(False).eval().to(self.args.device)


def _check_arguments(trainer: Trainer, curriculum: Curriculum) -> None:
    """Refuse arguments with which the trainer would silently use other rows or another plan."""
    args = trainer.args
    num_steps = curriculum.num_steps
    wrong: UserError | None = None
    if args.max_steps > num_steps:
        wrong = ConfigError(f"max_steps {args.max_steps} is beyond the curriculum's {num_steps} steps; leave it out")
    elif args.ignore_data_skip:
        wrong = ConfigError("ignore_data_skip would start the curriculum again after a resume; leave it out")
    elif curriculum.frontier is not None and args.dataloader_num_workers > 0:
        wrong = ConfigError(
            "dataloader_num_workers reads rows ahead, and curriculum.pacing frontier draws them by what training has "
            "seen until then; set it to 0"
        )
    elif getattr(args.accelerator_config, "split_batches", False):
        wrong = ConfigError("accelerator_config.split_batches changes the rows of a step; leave it out")
    elif args.n_gpu > 1:
        wrong = ConfigError("several GPUs in one process are not supported; start with torchrun or accelerate launch")
    elif curriculum.restarts and trainer.is_deepspeed_enabled:
        wrong = ConfigError("curriculum.optimizer restart does not work with DeepSpeed here; set it to continuous")
    if wrong is not None:
        raise wrong


def _restarting_schedule(
    curriculum: Curriculum, args: TrainingArguments, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule that repeats the arguments' schedule in every stage."""
    factors: list[Callable[[int], float]] = []
    for stage in curriculum.stages:
        dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
        schedule = get_scheduler(
            args.lr_scheduler_type,
            optimizer=dummy,
            num_warmup_steps=args.get_warmup_steps(stage.num_steps),
            num_training_steps=stage.num_steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,  # type: ignore[arg-type]
        )
        if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            raise ConfigError(
                f"lr_scheduler_type {args.lr_scheduler_type!s} cannot be restarted by stage; set curriculum.optimizer "
                "to continuous, or choose cosine, linear or constant"
            )
        factors.append(schedule.lr_lambdas[0])

    def factor(step: int) -> float:
        point = curriculum.at(step)
        return factors[point.stage](point.stage_step)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
