"""The DeepSpeed engine: its configuration, and an optimizer step over the micro-batches of a global batch.

Torch and DeepSpeed only, no Ray: the same engine runs under `torch.multiprocessing` in the tests.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from pocl_ray.config import TrainConfig
from pocl_ray.data.batching import MicroBatch
from pocl_ray.distill.collectives import from_all_ranks
from pocl_ray.distill.deepspeed_import import check_precision, import_deepspeed, without_dynamo
from pocl_ray.distill.gaps import RowGaps
from pocl_ray.distill.step import DistillationModule, StepSettings
from pocl_ray.distill.token_weights import ScoreMeter, no_divergence
from pocl_ray.errors import ConfigError
from pocl_ray.heartbeat import beat
from pocl_ray.models.lora import adapters_of_parameters, add_same_adapters
from pocl_ray.records import Stage

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PIECE = 1 << 20  # entries of a gradient whose squares are summed in float32


@dataclass(frozen=True)
class StepLosses:
    """Means over the response tokens of one optimizer step, over all workers.

    Attributes:
        loss: Loss that was minimised.
        ce_loss: Cross-entropy on the reference response, in nats per token.
        kd_loss: Distillation loss; 0 if the teacher is not used.
        grad_norm: Norm of the gradient before clipping.
        num_response_tokens: Number of tokens that the means are taken over.
        is_skipped: Whether the step changed nothing because its loss or gradient is not finite. A step that fp16's loss
            scaler skips while it looks for its scale does not count.
    """

    loss: float
    ce_loss: float
    kd_loss: float
    grad_norm: float
    num_response_tokens: int
    is_skipped: bool = False


def accumulation_steps(train: TrainConfig, world_size: int, responses_per_row: int = 1) -> int:
    """Return the micro-batches that each worker runs for one optimizer step; 1 with a token budget, where they vary."""
    if train.micro_batch_tokens is not None:
        return 1
    # The last micro-batch of a worker may be short: every response token counts once, however rows are cut.
    return responses_per_row * math.ceil(train.global_batch_rows / world_size / train.rows_at_once)


def deepspeed_config(train: TrainConfig, world_size: int, responses_per_row: int = 1) -> dict[str, Any]:
    """Return the DeepSpeed configuration, merged with the user's own.

    Args:
        train: Section of the config.
        world_size: Number of workers.
        responses_per_row: Number of responses to each row that a step trains on; 2 with rollouts next to the data.

    Raises:
        ConfigError: The user's config sets a key that `train` decides to another value.
    """
    ours: dict[str, Any] = {
        # DeepSpeed counts rows, for its logs alone; with a token budget a micro-batch is one of them.
        "train_micro_batch_size_per_gpu": 1 if train.micro_batch_tokens is not None else train.rows_at_once,
        "gradient_accumulation_steps": accumulation_steps(train, world_size, responses_per_row),
        "gradient_clipping": train.max_grad_norm,
        "zero_optimization": {"stage": train.zero_stage},
        "bf16": {"enabled": train.precision == "bf16"},
        "fp16": {"enabled": train.precision == "fp16"},
        # DeepSpeed's own Adam is compiled at first use, which needs a compiler on every node; torch's is ready.
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,  # never: the loop logs each step
    }
    if train.offload_optimizer == "cpu":
        ours["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        ours["zero_force_ds_cpu_optimizer"] = False  # torch's fused CPU AdamW needs no compiler
    return _merged(ours, _users_config(train.deepspeed), "train.deepspeed")


def _users_config(given: dict[str, Any] | str | None) -> dict[str, Any]:
    if given is None or isinstance(given, dict):
        return given or {}
    try:
        loaded = json.loads(Path(given).read_text())
    except FileNotFoundError:
        raise ConfigError(f"train.deepspeed: no such file: {given}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"train.deepspeed: {given} is not readable JSON ({error})") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"train.deepspeed: {given} holds no JSON object")
    return loaded


def _merged(ours: dict[str, Any], theirs: dict[str, Any], place: str) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        where = f"{place}.{key}"
        # A second optimizer or schedule would act next to ours, and `train_batch_size` would contradict the curriculum.
        if key in ("optimizer", "scheduler", "train_batch_size"):
            raise ConfigError(f"{where}: the optimizer, its schedule and the batch are set by `train`; remove the key")
        if value == "auto" or ours.get(key) == value:  # "auto" is how Hugging Face's configs leave a value to us
            continue
        if isinstance(value, dict) and isinstance(ours.get(key, {}), dict):
            merged[key] = _merged(ours.get(key, {}), value, where)
        elif key in ours:
            raise ConfigError(f"{where} is {value!r}, but the keys of `train` say {ours[key]!r}; change one of them")
        else:
            merged[key] = value
    return merged


def _without_norm(config: dict[str, Any]) -> dict[str, Any] | None:
    """Return the configuration with which DeepSpeed neither measures nor clips the gradient; None where it must.

    Its norm casts each gradient to float64 (0.12 of 1.76 s of a step of six layers of SmolLM2-135M on a CPU), and its
    clipping writes all of them at every step. Under ZeRO 1 and 2 the step guard reads the flat gradient once instead.
    """
    zero = config["zero_optimization"]
    must = {"offload_optimizer", "zenflow", "compute_grad_norm"} & set(zero) or "data_types" in config
    if zero["stage"] not in (1, 2) or must:
        return None
    return {**config, "gradient_clipping": 0.0, "zero_optimization": {**zero, "compute_grad_norm": False}}


def learning_rate(train: TrainConfig, stage: Stage, step: int) -> float:
    """Return the learning rate of a step of a stage, a pure function of its arguments.

    It rises over `warmup_ratio` of the schedule's steps, then falls by the schedule to `min_lr_ratio` of the peak. With
    `wsd` (warm-up, stable, decay) it stays at the peak and falls in a straight line over the last `decay_ratio` of the
    steps: what a curriculum admits late is then still trained on at the full rate (arXiv 2511.18903).

    Args:
        train: Peak, shape and warm-up.
        stage: Stage, with its place in the schedule.
        step: Optimizer step within the stage, from 0.
    """
    # A schedule over all stages starts before this one and ends after it; one for each stage starts at 0.
    position, total = stage.lr_first_step + step, stage.lr_num_steps
    warmup = math.ceil(round(train.warmup_ratio * total, 6))  # 0.07 * 100 is a little more than 7 in floating point
    if position < warmup:
        return train.learning_rate * (position + 1) / warmup  # + 1: a first step at rate 0 would change nothing
    if train.lr_schedule == "wsd":  # where the two overlap, the warm-up is taken off the decay
        warmup = max(warmup, math.floor(round((1 - train.decay_ratio) * total, 6)))
    done = max(0, position - warmup) / max(1, total - warmup)
    shapes = {"constant": 1.0, "linear": 1 - done, "wsd": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    shape = shapes[train.lr_schedule]
    return train.learning_rate * (train.min_lr_ratio + (1 - train.min_lr_ratio) * shape)


class Engine:
    """A DistillationModule inside a DeepSpeed engine."""

    def __init__(
        self,
        module: DistillationModule,
        train: TrainConfig,
        device: torch.device,
        timeout_s: float,
        responses_per_row: int = 1,
    ) -> None:
        """Wrap the module; collective, so every worker calls it.

        Args:
            module: The student with its loss, on the CPU.
            train: Precision, ZeRO stage, batch and optimizer.
            device: Device of this worker.
            timeout_s: Seconds after which a collective operation with a dead peer fails.
            responses_per_row: Number of responses to each row that a step trains on.
        """
        deepspeed = import_deepspeed(device)
        check_precision(train.precision, deepspeed.get_accelerator())
        self.train = train
        self.device = device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        # Under bf16 and fp16 DeepSpeed keeps float32 copies of the weights, which Adam changes.
        module.to(dtype=DTYPES[train.precision], device=device)
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained,
            weight_decay=train.weight_decay,
            lr=train.learning_rate,
            betas=train.betas,
            eps=train.eps,
            fused=True,
        )
        config = deepspeed_config(train, self.world_size, responses_per_row)
        without_norm = _without_norm(config)
        if train.zero_stage == 3:
            for adapted in adapters_of_parameters(module):  # they read their own weights before any layer runs
                deepspeed.utils.set_z3_leaf_module(adapted, True)
        # The process group stands already: Ray Train or the tests made it, and a second one would find no peers.
        with without_dynamo():  # it imports an optimizer of its own, which is compiled and which nobody uses
            self.deepspeed, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=without_norm or config, dist_init_required=False
            )
        zero = self.deepspeed.optimizer if train.zero_stage > 0 else None
        self.guard = _StepGuard(optimizer, zero, None if without_norm is None else train.max_grad_norm)
        self.accumulation = accumulation_steps(train, self.world_size, responses_per_row)
        _set_timeout_of_all_groups(timeout_s)

    @property
    def module(self) -> DistillationModule:
        """The wrapped module."""
        return self.deepspeed.module

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        settings: StepSettings,
        lr: float,
        num_response_tokens: int,
        gaps: RowGaps | None = None,
    ) -> StepLosses:
        """Run one optimizer step.

        The gradient is that of the summed loss over the global number of response tokens: neither accumulation nor
        the number of workers changes it. DeepSpeed averages over workers and micro-batches, which is undone here.

        If loss or gradient is not finite, weights and moments stay as they are, on all workers.

        Args:
            micro_batches: This worker's share of the global batch, equally many on every worker.
            settings: Temperature, ratio and divergence.
            lr: Learning rate of the step.
            num_response_tokens: Number of response tokens of the whole global batch.
            gaps: Gaps of the rows, which receive the gaps of this step; None: no gaps are measured.
        """
        self._accumulate(len(micro_batches))
        # Set and not scheduled: the rate is a function of the step, so a resumed run needs no state of a scheduler.
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        settings = self._with_token_weights(micro_batches, settings)
        self.deepspeed.train()
        # What is wanted is sum(loss) / num_response_tokens over all workers and micro-batches. DeepSpeed divides each
        # loss by the micro-batches and the summed gradient by the workers, so both are multiplied back in. A mean of
        # means would weigh a token by how few others share its micro-batch, and training would depend on the cut.
        scale = self.world_size * self.accumulation / num_response_tokens
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # a sum over many tokens keeps its digits
        for place, batch in enumerate(micro_batches, 1):
            beat("training")
            self.deepspeed.set_gradient_accumulation_boundary(place == len(micro_batches))
            measured = settings if gaps is None else replace(settings, gap_meter=gaps.meter(batch, self.device))
            losses = self.deepspeed(batch.to(self.device), measured)
            # Through DeepSpeed and not loss.backward(): fp16's loss scale and ZeRO's reductions hang on it.
            self.deepspeed.backward(losses[0] * scale)
            sums += torch.stack([loss.detach().double() for loss in losses])
            if self.deepspeed.is_gradient_accumulation_boundary():  # true for the last micro-batch alone
                if self.world_size > 1:
                    dist.all_reduce(sums)  # before the step: all workers must know whether the loss is finite
                self.guard.begin(float(sums[0]), self._plain_grad_norm())
            self.deepspeed.step()  # called for every micro-batch; weights change at the boundary
        # The same divisor as that of the gradient, so the logged loss is the one that was minimised.
        loss, ce_loss, kd_loss = (sums / num_response_tokens).tolist()
        grad_norm = self.guard.grad_norm()
        # fp16's loss scaler skips steps whose gradient overflows until it has found its scale: that is no divergence.
        is_skipped = not math.isfinite(loss) or (self.train.precision != "fp16" and not math.isfinite(grad_norm))
        return StepLosses(loss, ce_loss, kd_loss, grad_norm, num_response_tokens, is_skipped)

    def _accumulate(self, num_micro_batches: int) -> None:
        """Tell DeepSpeed the number of micro-batches of this step, which is equal on all workers."""
        if num_micro_batches == self.accumulation:
            return
        self.accumulation = num_micro_batches
        rows = self.deepspeed.train_micro_batch_size_per_gpu()
        self.deepspeed.set_train_batch_size(num_micro_batches * rows * self.world_size)
        if self.train.zero_stage > 0:  # which has read it once; with it an offloaded gradient's norm is that of all
            self.deepspeed.optimizer.gradient_accumulation_steps = num_micro_batches

    def _with_token_weights(self, micro_batches: Sequence[MicroBatch], settings: StepSettings) -> StepSettings:
        """Fit the weights of tokens to the scores of the whole step, over all workers; collective where there are any.

        The teacher's head runs once more for it, and for a score of the student all of the student, without a gradient
        and without dropout: the scores of the step must be known before its first gradient.
        """
        weight = settings.token_weight
        if weight is None:
            return settings
        used = [batch for batch in micro_batches if settings.of(batch).kd_ratio > 0.0]
        scores = self._student_scores if weight.needs_student else self.module.teacher_scores
        own = [torch.empty(0, weight.num_parts, device=self.device)]
        own += [scores(batch.to(self.device), settings) for batch in used]
        parts_MP = from_all_ranks(torch.cat(own))  # values of one worker would depend on the number of workers
        return replace(settings, token_weight=weight.fitted(parts_MP)) if len(parts_MP) else settings

    @torch.no_grad()
    def _student_scores(self, batch: MicroBatch, settings: StepSettings) -> torch.Tensor:
        """The parts of the student's scores of a micro-batch's tokens, shape (N, P)."""
        weight = settings.token_weight
        assert weight is not None
        parts_NP = torch.empty(batch.num_response_tokens, weight.num_parts, device=self.device)
        alone = StepSettings(1.0, 1.0, no_divergence, gap_meter=ScoreMeter(weight, parts_NP))
        self.evaluate(batch, alone)
        return parts_NP

    def _plain_grad_norm(self) -> float | None:
        """Return the norm of the gradient under ZeRO-0, where DeepSpeed does not report it; call it before the step."""
        if self.train.zero_stage > 0:
            return None
        # `backward` has averaged these over the workers, so each worker computes the same norm.
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def rehearse(self, batch: MicroBatch, settings: StepSettings) -> None:
        """Run a step that changes neither weights nor moments, to see what it takes; collective."""
        self._accumulate(1)
        self.deepspeed.train()
        self.deepspeed.set_gradient_accumulation_boundary(True)
        self.deepspeed.backward(self.deepspeed(batch.to(self.device), settings)[0] / batch.num_response_tokens)
        self.guard.begin(math.inf, None)  # a step with such a loss is skipped
        self.deepspeed.step()

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch, settings: StepSettings) -> torch.Tensor:
        """Return the sums (loss, ce, kd) of a micro-batch, float64, not reduced over workers."""
        beat("evaluating")
        self.deepspeed.eval()
        losses = self.deepspeed(batch.to(self.device), settings)
        return torch.stack([loss.detach().double() for loss in losses])


class _StepGuard:
    """Keeps Adam from a step whose loss or gradient is not finite, and clips the gradient where DeepSpeed does not.

    It stands between DeepSpeed and Adam. DeepSpeed then ends the step in its own way, whatever the ZeRO stage: it
    clears the gradients, and copies float32 weights, which have not changed, to those of the model.
    """

    def __init__(self, adam: torch.optim.AdamW, zero: Any | None, max_norm: float | None) -> None:
        """Take Adam's place at its method `step`.

        Args:
            adam: Optimizer that DeepSpeed calls.
            zero: DeepSpeed's optimizer around it; None under ZeRO-0.
            max_norm: Norm to which the gradient is clipped here, 0 for no clipping; None: DeepSpeed measures and clips.
        """
        self._adam, self._zero, self._step, self._max_norm = adam, zero, adam.step, max_norm
        self._loss_sum, self._norm = 0.0, 0.0
        adam.step = self._guarded_step  # type: ignore[method-assign, assignment]  # torch's LR schedulers do the same

    def begin(self, loss_sum: float, plain_norm: float | None) -> None:
        """Take the loss of all workers, and under ZeRO-0 the norm of the gradient, before a step."""
        # fp16's loss scaler may end a step before Adam is called, because the gradient is not finite.
        self._loss_sum, self._norm = loss_sum, math.inf if plain_norm is None else plain_norm

    def grad_norm(self) -> float:
        """Return the norm over all workers before clipping. If it is not finite, it is infinite or not a number."""
        if self._zero is None or self._max_norm is not None:
            return self._norm
        norm = float(self._zero._global_grad_norm)  # -1 or an older norm if it is not finite
        return math.inf if norm < 0 or self._zero.overflow else norm

    def _guarded_step(self, closure: Any = None) -> Any:
        if self._max_norm is not None:
            self._norm = self._clip(self._max_norm)
        # Both are the same on all workers, so all of them step or none does.
        if math.isfinite(self._loss_sum) and math.isfinite(self.grad_norm()):
            return self._step(closure)
        return None

    def _clip(self, max_norm: float) -> float:
        """Clip this worker's part of the flat gradient, float32, by the norm of all parts, which is returned."""
        parameters = [parameter for group in self._adam.param_groups for parameter in group["params"]]
        flat = [parameter.grad.view(-1) for parameter in parameters if parameter.grad is not None]
        pieces = [torch.linalg.vector_norm(piece) for grad in flat for piece in grad.split(_PIECE)]
        square = torch.stack(pieces).double().square().sum()  # float32 would lose digits over so many pieces
        if dist.get_world_size() > 1:
            dist.all_reduce(square)
        norm = float(square.sqrt())
        if 0.0 < max_norm < norm < math.inf:
            torch._foreach_mul_(flat, max_norm / (norm + 1e-6))  # as DeepSpeed has it
        return norm


def _set_timeout_of_all_groups(timeout_s: float) -> None:
    """Give every process group our timeout; DeepSpeed's own groups otherwise wait for 30 minutes."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


class InferenceStudent:
    """The engine's student for generation: the model itself, or under ZeRO-3 a complete copy of it.

    Dev answers and rollouts share one object, since it may hold a copy.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._copy: PreTrainedModel | None = None

    def current(self) -> PreTrainedModel:
        """Return a model with the current weights, in eval mode; collective under ZeRO-3.

        A partitioned student would gather every weight for every token; the copy is filled once a call.
        """
        student = self.engine.module.student
        if self.engine.train.zero_stage < 3:
            student.eval()
            return student
        import deepspeed

        if self._copy is None:
            with torch.device(self.engine.device):
                self._copy = type(student)._from_config(student.config, dtype=next(student.parameters()).dtype)
            _untie_as(self._copy, student)
            add_same_adapters(self._copy, student)
            nn.Module.to(self._copy, self.engine.device, next(student.parameters()).dtype)
            self._copy.eval()
        targets: dict[str, Any] = dict(self._copy.named_parameters())
        for name, parameter in student.named_parameters():
            # One at a time: a worker then needs memory for one whole parameter next to the copy.
            with deepspeed.zero.GatheredParameters([parameter]), torch.no_grad():
                targets[name].copy_(parameter)
        return self._copy


def _untie_as(copy: PreTrainedModel, model: PreTrainedModel) -> None:
    """Give a copy an LM head of its own where the model has one, whatever its config says of tied embeddings."""
    theirs: list[Any] = [model.get_output_embeddings(), model.get_input_embeddings()]
    own: list[Any] = [copy.get_output_embeddings(), copy.get_input_embeddings()]
    if theirs[0].weight is not theirs[1].weight and own[0].weight is own[1].weight:
        own[0].weight = nn.Parameter(own[1].weight.detach().clone())
