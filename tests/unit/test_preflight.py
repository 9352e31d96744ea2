"""Configs that are refused before anything is done, although each key by itself is right."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

from pocl_ray import preflight
from pocl_ray.config import Config
from pocl_ray.difficulty.choice import Choice
from pocl_ray.errors import ConfigError, ResourceError
from pocl_ray.models.loading import check_attention
from pocl_ray.preflight import (
    check_bridging,
    check_budgets,
    check_rescoring,
    check_whole_gpus,
    check_without_gpus,
    warn_of_one_tokenizer,
)

TREE: dict[str, Any] = {
    "name": "run",
    "data": {"train": {"path": "rows.jsonl"}, "holdout_rows": 8},
    "teacher": {"path": "teacher"},
    "student": {"path": "student"},
    "difficulty": {"rescore": "each_stage", "signals": ["ce_loss", "teacher_student_kl"]},
}
ALONE: dict[str, Any] = {"difficulty": {"rescore": "each_stage", "signals": ["ce_loss"]}}
TOP_K: dict[str, Any] = {"distill": {"teacher_cache": "topk"}}
SHARDED: dict[str, Any] = {
    "distill": {"teacher_cache": "none"},
    "teacher": {"path": "teacher", "sharded": True},
    "evaluation": {"teacher": False},
}


@pytest.mark.parametrize(
    ("changes", "says"), [(TOP_K, "topk does not keep"), (SHARDED, "set teacher.sharded to false")]
)
def test_rescoring_by_the_teacher_needs_all_of_it_on_each_worker(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_rescoring(Config.model_validate({**TREE, **changes}))
    check_rescoring(Config.model_validate({**TREE, **changes, **ALONE}))


def test_rescoring_over_a_cache_of_hidden_states_is_no_mistake() -> None:
    check_rescoring(Config.model_validate(TREE))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"distill": {"kernel": "liger"}}, "distill.kernel: liger runs on CUDA.* set auto"),
        (
            {"distill": {"teacher_cache": "none"}, "rollout": {"mode": "on", "backend": "vllm"}},
            "rollout.backend: vllm runs on GPUs.* set it to transformers",
        ),
        (
            {"train": {"micro_batch_tokens": "auto"}},
            r"^train\.micro_batch_tokens: auto measures a GPU's memory, and the workers have none; set a number",
        ),
        (
            {"student": {"path": "student", "sft": {"train": {"micro_batch_tokens": "auto"}}}},
            r"^student\.sft\.train\.micro_batch_tokens: auto measures",
        ),
    ],
)
def test_what_only_gpus_can_do_is_refused_on_a_cluster_without_them(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_without_gpus(Config.model_validate({**TREE, **changes}))
    check_without_gpus(Config.model_validate(TREE))


def test_a_gpu_that_workers_share_is_not_filled_by_one_of_them() -> None:
    shared = {**TREE, "scaling": {"resources_per_worker": {"GPU": 0.5}}}
    with pytest.raises(ConfigError, match=r"^train\.micro_batch_tokens: auto fills a whole GPU, .* a worker 0\.5; set"):
        check_whole_gpus(Config.model_validate({**shared, "train": {"micro_batch_tokens": "auto"}}))
    check_whole_gpus(Config.model_validate({**shared, "train": {"micro_batch_tokens": 512}}))
    check_whole_gpus(Config.model_validate({**TREE, "train": {"micro_batch_tokens": "auto"}}))


BRIDGED: dict[str, Any] = {
    **TREE,
    "teacher": {"path": "teacher", "cross_tokenizer": "uld"},
    "curriculum": {"kd_ratio": 0.6},
    "difficulty": {"signals": ["ce_loss"]},
}


def test_a_plug_in_cannot_compare_models_of_two_vocabularies(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config.model_validate(BRIDGED)
    check_bridging(config)
    monkeypatch.setattr(preflight, "choose_signals", lambda difficulty: Choice({}, ("margin",), ()))
    with pytest.raises(ConfigError, match=r"difficulty\.signals: margin compares the two models' logits.*leave it out"):
        check_bridging(config)
    check_bridging(Config.model_validate({**BRIDGED, "teacher": {"path": "teacher"}}))


class Vocabulary:
    """The part of a tokenizer that is compared."""

    def __init__(self, *words: str) -> None:
        self.words = {word: number for number, word in enumerate(words)}

    def get_vocab(self) -> dict[str, int]:
        return self.words


def test_bridging_one_tokenizer_to_itself_is_done_and_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    here: Any = Vocabulary("a", "b")
    there: Any = Vocabulary("b", "a")
    for teachers in (None, there):
        warn_of_one_tokenizer(here, teachers)
        assert not capsys.readouterr().err
    warn_of_one_tokenizer(here, Vocabulary("a", "b"))  # type: ignore[arg-type]
    told = " ".join(capsys.readouterr().err.split())
    assert "the same tokenizer" in told and "remove teacher.cross_tokenizer" in told


class Store:
    """Rows of which only the lengths are read."""

    prompt_lengths, response_lengths = np.array([3, 30]), np.array([40, 31])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"train": {"micro_batch_tokens": 61}}, None),
        ({"train": {"micro_batch_tokens": 60}}, "train.micro_batch_tokens is 60, and the longest row has 61 tokens"),
        (
            {"train": {"micro_batch_tokens": 61}, "rollout": {"mode": "on"}, "distill": {"teacher_cache": "none"}},
            "the longest row has 512 tokens",
        ),
        (
            {"student": {"path": "student", "sft": {"train": {"micro_batch_tokens": 8}}}},
            "student.sft.train.micro_batch_tokens is 8",
        ),
    ],
)
def test_a_token_budget_must_hold_the_longest_row(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], says: str | None
) -> None:
    monkeypatch.setattr(preflight.RowStore, "open", lambda path: Store())
    anything: Any = MagicMock()
    config = Config.model_validate({**TREE, "difficulty": {}, **changes})
    if says is None:
        check_budgets(config, anything, anything)
        return
    with pytest.raises(ConfigError) as error:
        check_budgets(config, anything, anything)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_attention_that_is_not_installed_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: set[str] = set()
    monkeypatch.setattr("pocl_ray.models.loading.find_spec", lambda name: name if name in installed else None)
    check_attention("student", "sdpa")
    with pytest.raises(ResourceError, match=r"^student\.attention: flash_attention_2 needs flash-attn, .*pip install"):
        check_attention("student", "flash_attention_2")
    installed.add("flash_attn")
    check_attention("student", "flash_attention_2")


def test_flash_attention_is_refused_where_workers_have_no_gpus() -> None:
    teacher = {"path": "teacher", "attention": "flash_attention_2"}
    with pytest.raises(ConfigError, match=r"^teacher\.attention: flash_attention_2 runs on GPUs.*set it to auto"):
        check_without_gpus(Config.model_validate({**TREE, "teacher": teacher}))
