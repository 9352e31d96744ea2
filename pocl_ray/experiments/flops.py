"""FLOPs of an arm: training, and everything else that its curriculum needs.

A multiplication and an addition are two FLOPs. A forward pass over T tokens costs 2 W T for the W weights of the
matrices between embedding and head, and 4 L H T S for attention over S tokens in L layers of width H; the head costs
2 V H for each response token, since logits exist nowhere else. A backward pass costs twice its forward pass. Three
parts are counted separately:

    scoring     the student's forward pass, its answers, the teacher's forward pass (which fills the cache)
    refreshing  what is measured again between stages
    training    the student forward and backward; the teacher's head, or all of it where nothing is cached

The count leaves out work that all arms share (supervised fine-tuning, dev evaluations). It counts all experts of a
mixture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pocl_ray.config import Config
from pocl_ray.config.sources import FIXED_SIGNALS
from pocl_ray.config.training import FRONTIER, STUDENT_SCORES
from pocl_ray.difficulty.choice import choose_signals
from pocl_ray.fingerprints import reads_teacher
from pocl_ray.models.heads import split_model
from pocl_ray.models.places import ModelRef, on_this_node
from pocl_ray.models.shapes import ModelSize
from pocl_ray.records import GAP, RowsSummary, Stage


def model_size(ref: ModelRef) -> ModelSize:
    """Return the size of a model, from its config alone."""
    ref = on_this_node(ref)
    config = AutoConfig.from_pretrained(
        str(ref.directory or ref.path), revision=ref.revision, trust_remote_code=ref.trust_remote_code
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=ref.trust_remote_code)
    return size_of(model)


def size_of(model: PreTrainedModel) -> ModelSize:
    """Return the size of a model in memory."""
    parts = split_model(model)
    embedding, head = model.get_input_embeddings().weight, parts.head.weight
    matrices = [p for p in parts.body.parameters() if p.ndim >= 2 and p is not embedding and p is not head]
    config = model.config.get_text_config()
    assert isinstance(head, torch.Tensor)
    width = int(config.num_hidden_layers * config.hidden_size)
    return ModelSize(sum(p.numel() for p in matrices), head.numel(), width)


@dataclass(frozen=True)
class ArmFlops:
    """FLOPs of one training of an arm.

    Attributes:
        scoring: Before the first step.
        refreshing: Between stages.
        training: All steps.
    """

    scoring: float
    refreshing: float
    training: float

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return self.scoring + self.refreshing + self.training


class FlopsCounter:
    """Counts the FLOPs of arms that start from the same rows and models."""

    def __init__(self, student: ModelSize, teacher: ModelSize, rows: RowsSummary) -> None:
        """Take the two models and the training rows."""
        self.student, self.teacher, self.rows = student, teacher, rows
        self.row_tokens = (rows.num_prompt_tokens + rows.num_response_tokens) / rows.num_rows

    def planned(self, config: Config, stages: Sequence[Stage]) -> ArmFlops:
        """Return the FLOPs of a plan, with rows of mean length in each step."""
        num_rows = sum(stage.num_steps for stage in stages) * config.train.global_batch_rows
        return self.measured(config, stages, num_rows, num_rows * self.rows.num_response_tokens / self.rows.num_rows)

    def measured(
        self, config: Config, stages: Sequence[Stage], num_rows: float, num_response_tokens: float
    ) -> ArmFlops:
        """Return the FLOPs of a training that was run.

        Args:
            config: Config of the arm.
            stages: Its plan.
            num_rows: Rows trained on, each as often as it was; their prompts are taken for as long as the mean one.
            num_response_tokens: Response tokens trained on.
        """
        num_tokens = num_rows * self.rows.num_prompt_tokens / self.rows.num_rows + num_response_tokens
        training = 3 * self.student.forward(num_tokens, num_response_tokens, self.row_tokens)
        if reads_teacher(config, stages):
            training += self._teacher_in_steps(config, num_tokens, num_response_tokens)
            if config.distill.token_weight in STUDENT_SCORES:  # the student reads the rows of a step once more
                training += self.student.forward(num_tokens, num_response_tokens, self.row_tokens)
            if config.distill.token_weight != "none" and config.distill.teacher_cache != "topk":
                training += self.teacher.head(num_response_tokens)
        if config.rollout.is_on:
            share = config.rollout.mix_probability if config.rollout.mode == "mixed" else 1.0
            training += share * self.student.forward(num_tokens, num_response_tokens, self.row_tokens)
        return ArmFlops(self._scoring(config, stages), self._refreshing(config, stages), training)

    def _teacher_in_steps(self, config: Config, num_tokens: float, num_response_tokens: float) -> float:
        if config.distill.teacher_cache == "topk":
            return 0.0
        if config.distill.teacher_cache == "hidden":
            return self.teacher.head(num_response_tokens)
        return self.teacher.forward(num_tokens, num_response_tokens, self.row_tokens)

    def _scoring(self, config: Config, stages: Sequence[Stage]) -> float:
        """The FLOPs of the signals, if the order of rows is read, and of the cache, if training reads the teacher."""
        is_ranked = uses_scores(config, stages, self.rows.num_rows)
        caches = reads_teacher(config, stages) and config.distill.teacher_cache != "none"
        reads = choose_signals(config.difficulty).reads_teacher or config.curriculum.pacing == FRONTIER
        asks_teacher = caches or (is_ranked and reads)
        asked = self._one_pass(self.teacher) if asks_teacher else 0.0
        return asked + (self._student_signals(config) if is_ranked else 0.0)

    def _student_signals(self, config: Config) -> float:
        # Frontier pacing draws rows by their gap alone, for which the student reads them once.
        signals = {GAP} if config.curriculum.pacing == FRONTIER else set(config.difficulty.signals)
        is_read = any(name not in FIXED_SIGNALS and name != "rouge_l" for name in signals)
        passes = int(is_read) + int("rouge_l" in signals)  # an answer is about as long as a reference
        return passes * self._one_pass(self.student)

    def _refreshing(self, config: Config, stages: Sequence[Stage]) -> float:
        frontier = config.curriculum.frontier
        if config.curriculum.pacing == FRONTIER:
            if frontier.refresh == "training":
                return 0.0  # the gap falls out of the logits of a step
            share = min(1.0, (frontier.rescore_rows or self.rows.num_rows) / self.rows.num_rows)
            return (len(stages) - 1) * share * (self._one_pass(self.student) + self._teacher_in_a_pass(config))
        num_passes = sum(stage.rescore for stage in stages)
        teacher = self._teacher_in_a_pass(config) if choose_signals(config.difficulty).compares else 0.0
        return num_passes * (self._student_signals(config) + teacher)

    def _teacher_in_a_pass(self, config: Config) -> float:
        num_tokens = self.rows.num_prompt_tokens + self.rows.num_response_tokens
        return self._teacher_in_steps(config, num_tokens, self.rows.num_response_tokens)

    def _one_pass(self, model: ModelSize) -> float:
        num_tokens = self.rows.num_prompt_tokens + self.rows.num_response_tokens
        return model.forward(num_tokens, self.rows.num_response_tokens, self.row_tokens)


def uses_scores(config: Config, stages: Sequence[Stage], num_rows: int) -> bool:
    """Return whether a plan depends on how hard rows are: not where every stage takes all of them, or draws them."""
    if config.curriculum.pacing == FRONTIER:
        return True
    return any(stage.rescore or (stage.order == "rank" and stage.num_rows < num_rows) for stage in stages)


def equal_steps(arm: ArmFlops, baseline: ArmFlops, baseline_steps: int) -> int:
    """Return how many steps the baseline can take for the FLOPs of an arm, at least 1."""
    fixed = baseline.scoring + baseline.refreshing
    return max(1, round((arm.total - fixed) / (baseline.training / baseline_steps)))
