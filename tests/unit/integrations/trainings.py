"""Tiny trainings in trainers of others: models, rows that batches name, what is recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from pocl_ray.config import CurriculumConfig, ScheduleConfig
from pocl_ray.integrations.curriculum import Curriculum

NUM_ROWS, BATCH_ROWS, VOCAB = 12, 4, 258
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def plan(**changes: Any) -> Curriculum:
    """Two stages of 6 and 12 rows, two epochs each: 2 and 6 steps of 4 rows."""
    settings: dict[str, Any] = {
        "num_buckets": 2,
        "interval_epochs": 2,
        "kd_temperature": ScheduleConfig(start=1.0, end=2.0),
        "kd_ratio": ScheduleConfig(start=0.5, end=1.0),
        **changes,
    }
    rank = np.random.default_rng(5).permutation(NUM_ROWS) + 1
    return Curriculum.from_ranks(rank, CurriculumConfig(**settings), BATCH_ROWS, seed=7)


def tiny_model(seed: int, width: int = 16, vocab: int = VOCAB) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def token_rows() -> list[dict[str, list[int]]]:
    """Rows of tokens of different lengths, with the row's number next to them."""
    rng = np.random.default_rng(3)
    rows = []
    for number in range(NUM_ROWS):
        ids = rng.integers(2, VOCAB, 5 + number % 4).tolist()
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]], "row": [number]})
    return rows


def collate_rows(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    numbers = torch.tensor([row["row"][0] for row in rows])
    return {
        "input_ids": padded("input_ids", 0),
        "attention_mask": mask,
        "labels": padded("labels", -100),
        "row": numbers,
    }


class StopAt(TrainerCallback):
    """Interrupts a training, as a lost machine would, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step >= self.step
        return control


class Recording:
    """A mixin for trainer classes that records the rows and the settings of every forward pass in training."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seen: list[tuple[int, list[int]]] = []
        self.settings: list[tuple[int, float, float]] = []
        super().__init__(*args, **kwargs)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        step = self.state.global_step  # type: ignore[attr-defined]
        self.seen.append((step, inputs["row"].tolist()))
        return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]

    def _summed_loss(self, point: Any, *tensors: torch.Tensor) -> torch.Tensor:
        self.settings.append((point.stage, point.kd_temperature, point.kd_ratio))
        return super()._summed_loss(point, *tensors)  # type: ignore[misc]

    def rows_by_step(self) -> list[list[int]]:
        """The rows of each optimizer step, over its micro-batches."""
        steps = sorted({step for step, _ in self.seen})
        return [[row for at, rows in self.seen if at == step for row in rows] for step in steps]


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    """Arguments of a training on the CPU that shows and keeps every step."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "seed": 11,
        **changes,
    }
