"""One distillation step in two ways on the same rows, for `step_speed.py` and `step_memory.py`.

`FullLogitsStep` is the common way, and that of POCL's authors: every row padded to 512 tokens, logits of student and
teacher at every position, the teacher run live. `OurStep` is `pocl_ray.distill.step`: padded to the longest row, hidden
states of response positions through the head in chunks, the teacher's hidden states cached.

Legend: B batch, T tokens, N response tokens in one flat axis, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pocl_ray.data.batching import MicroBatch, TeacherOutput
from pocl_ray.distill.losses import resolve_loss
from pocl_ray.distill.step import DistillationModule, StepSettings
from pocl_ray.models.heads import head_of, response_hidden

PADDED_LENGTH = 512
SETTINGS = StepSettings(kd_temperature=2.0, kd_ratio=0.8, kd=resolve_loss("forward_kl"))


@dataclass(frozen=True)
class Row:
    """Token ids of a row and how many of them are the prompt."""

    ids_T: Tensor
    num_prompt_tokens: int


def smollm2_shape(num_layers: int, vocabulary: int = 49152, hidden: int = 576) -> LlamaConfig:
    """The config of SmolLM2-135M (30 layers there), for weights drawn at random."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 192),
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )


def random_model(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """Weights drawn at random, the logits spread about as a trained model's."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.model.embed_tokens.weight.data.mul_(4.0)
    return model


def student_of(teacher: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """A copy of the teacher with evenly spaced layers of it, in float32."""
    config = type(teacher.config)(**teacher.config.to_diff_dict() | {"num_hidden_layers": num_layers})
    config.layer_types = None
    student = type(teacher)(config)
    state = teacher.state_dict()
    depth = teacher.config.num_hidden_layers
    for new in range(num_layers):
        old = round(new * (depth - 1) / max(1, num_layers - 1))
        prefix = f"model.layers.{old}."
        layer = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        student.model.layers[new].load_state_dict(layer)
    student.get_input_embeddings().load_state_dict(teacher.get_input_embeddings().state_dict())
    student.model.norm.load_state_dict(teacher.model.norm.state_dict())
    return student


def random_rows(num_rows: int, vocabulary: int, seed: int) -> list[Row]:
    """Rows with lengths like those of Dolly: medians of 60 prompt and 55 response tokens, long tails."""
    generator = torch.Generator().manual_seed(seed)

    def length(median: float, low: int, high: int) -> int:
        return int((median * torch.randn((), generator=generator).mul(0.8).exp()).clamp(low, high))

    rows = []
    for _ in range(num_rows):
        prompt, response = length(60, 20, 256), length(55, 5, 256)
        rows.append(Row(torch.randint(3, vocabulary, (prompt + response,), generator=generator), prompt))
    return rows


def collate(rows: list[Row], length: int | None = None) -> MicroBatch:
    """Pad on the right to `length`, or to the longest row."""
    length = length or max(len(row.ids_T) for row in rows)
    ids_BT, mask_BT = torch.zeros(2, len(rows), length, dtype=torch.long)
    index: list[int] = []
    for place, row in enumerate(rows):
        ids_BT[place, : len(row.ids_T)], mask_BT[place, : len(row.ids_T)] = row.ids_T, 1
        index += range(place * length + row.num_prompt_tokens - 1, place * length + len(row.ids_T) - 1)
    index_N = torch.tensor(index)
    return MicroBatch(ids_BT, mask_BT, index_N, ids_BT.flatten()[index_N + 1])


class FullLogitsStep:
    """Logits at every position of rows padded to 512, masked afterwards; the teacher live."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, settings: StepSettings = SETTINGS) -> None:
        self.student, self.teacher, self.settings = student, teacher, settings

    def num_positions(self, rows: list[Row]) -> int:
        """The number of positions that the models read, padding included."""
        return len(rows) * PADDED_LENGTH

    def loss(self, rows: list[Row]) -> Tensor:
        """The mean over response tokens of (1 - kd_ratio) ce + kd_ratio kd."""
        batch = collate(rows, PADDED_LENGTH).to(self.student.device)
        mask_N = torch.zeros(batch.input_ids_BT.numel(), device=self.student.device)
        mask_N[batch.response_index_N] = 1.0
        labels_N = torch.full_like(mask_N, -100, dtype=torch.long)
        labels_N[batch.response_index_N] = batch.targets_N
        with torch.no_grad():
            teacher_logits_BTV = self.teacher(batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
        logits_BTV = self.student(batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
        temperature, kd_ratio = self.settings.kd_temperature, self.settings.kd_ratio
        ce = F.cross_entropy(logits_BTV.float().flatten(0, 1), labels_N, reduction="sum")
        teacher_BTV = torch.softmax(teacher_logits_BTV.float() / temperature, -1)
        log_ratio_BTV = teacher_BTV.log() - torch.log_softmax(logits_BTV.float() / temperature, -1)
        kd = ((teacher_BTV * log_ratio_BTV).sum(-1).flatten() * mask_N).sum() * temperature**2
        return ((1 - kd_ratio) * ce + kd_ratio * kd) / len(batch.targets_N)


class OurStep:
    """`DistillationModule` on rows padded to the longest, the teacher's hidden states computed beforehand."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        self.module, self.teacher = DistillationModule(student), teacher
        self.module.attach_teacher_heads(head_of(teacher))
        self.cache: dict[int, Tensor] = {}

    def prepare(self, rows: list[Row]) -> None:
        """Fill the cache for a batch; what the scoring pass does once for all epochs and stages."""
        batch = collate(rows)
        with torch.no_grad():
            self.cache[id(rows)] = response_hidden(
                self.teacher, batch.input_ids_BT, batch.attention_mask_BT, batch.response_index_N
            )

    def loss(self, rows: list[Row]) -> Tensor:
        """The mean over response tokens of (1 - kd_ratio) ce + kd_ratio kd."""
        batch = dataclasses.replace(collate(rows), teacher_outputs=(TeacherOutput(self.cache[id(rows)]),))
        return self.module(batch, SETTINGS)[0] / len(batch.targets_N)
