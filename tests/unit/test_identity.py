"""What a run directory belongs to: another config is refused, naming what differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pocl_ray.config import Config
from pocl_ray.errors import StorageError
from pocl_ray.identity import NEUTRAL, claim, differences, environment, neutral_free
from pocl_ray.storage import RunDirectory


def config(**keys: Any) -> Config:
    tree: dict[str, Any] = {
        "name": "run",
        "data": {"train": {"path": "a.jsonl"}, "dev": {"path": "b.jsonl"}},
        "teacher": {"path": "teacher"},
        "student": {"path": "student"},
        "train": {"precision": "fp32"},
    }
    for key, value in keys.items():
        node = tree
        *parents, leaf = key.split("__")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return Config.model_validate(tree)


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDirectory:
    return RunDirectory.open(str(tmp_path), "run")


def stored(run_dir: RunDirectory) -> Config:
    return Config.model_validate(yaml.safe_load(run_dir.read_text("config.yaml")))


def test_a_new_directory_is_taken_and_its_config_written(run_dir: RunDirectory) -> None:
    claim(run_dir, config(seed=7), resume_with_changes=False)
    assert stored(run_dir) == config(seed=7)


def test_the_same_config_goes_on(run_dir: RunDirectory) -> None:
    for _ in range(2):
        claim(run_dir, config(), resume_with_changes=False)


def test_another_config_is_refused_and_every_difference_named(run_dir: RunDirectory) -> None:
    claim(run_dir, config(), resume_with_changes=False)
    other = config(train__learning_rate=1e-3, curriculum__kd_ratio=0.5, data__tests={"new": {"path": "c"}})
    with pytest.raises(StorageError) as error:
        claim(run_dir, other, resume_with_changes=False)
    message = str(error.value)
    assert "\n" not in message
    assert "train.learning_rate: 0.0001 -> 0.001" in message
    assert "curriculum.kd_ratio.start: 0.7 -> 0.5" in message
    assert "data.tests.new" in message
    assert "--resume-with-changes" in message and "Choose another name" in message
    assert stored(run_dir) == config(), "nothing was written"


def test_changes_are_taken_where_they_are_asked_for(run_dir: RunDirectory) -> None:
    claim(run_dir, config(), resume_with_changes=False)
    claim(run_dir, config(seed=9), resume_with_changes=True)
    assert stored(run_dir).seed == 9


@pytest.mark.parametrize(
    "keys",
    [
        {"scaling__num_workers": 2},
        {"report__num_examples": 1},
        {"storage_path": "elsewhere"},
        {"distill__chunk_mib": 3},
        {"difficulty__batch_tokens": 99},
        {"train__micro_batch_rows": 2},
        {"train__zero_stage": 3},
        {"train__offload_optimizer": "cpu"},
        {"train__num_checkpoints": 5},
        {"train__checkpoint_every_steps": 5},
        {"train__log_every_steps": 5},
    ],
)
def test_keys_that_do_not_change_the_result_may_differ(run_dir: RunDirectory, keys: dict[str, Any]) -> None:
    claim(run_dir, config(), resume_with_changes=False)
    claim(run_dir, config(**keys), resume_with_changes=False)
    assert stored(run_dir) == config(**keys)


def test_every_neutral_key_is_a_key_of_the_config() -> None:
    tree = config().model_dump(mode="json")
    for key in NEUTRAL:
        node = tree
        for part in key.split("."):
            node = node[part]
    left = neutral_free(config())
    assert "scaling" not in left and "zero_stage" not in left["train"] and "precision" in left["train"]


@pytest.mark.parametrize("text", ["name: run\nold_key: 1\n", "name: [", "- 1", "", "\x00"])
def test_a_config_that_cannot_be_read_belongs_to_another_version(run_dir: RunDirectory, text: str) -> None:
    run_dir.write_text("config.yaml", text)
    with pytest.raises(StorageError) as error:
        claim(run_dir, config(), resume_with_changes=False)
    assert "config.yaml: written by another version" in str(error.value) and "\n" not in str(error.value)


def test_differences_reach_every_depth() -> None:
    before = {"a": {"b": 1, "c": [1]}, "d": None, "e": 1}
    now = {"a": {"b": 2, "c": [1]}, "d": {"f": 1}, "g": 3}
    assert list(differences(before, now)) == ["a.b: 1 -> 2", "d: None -> {'f': 1}", "e: 1 -> None", "g: None -> 3"]
    assert list(differences(before, before)) == []


def test_the_environment_names_versions_without_a_cluster() -> None:
    found = environment()
    assert found["nodes"] == []
    assert {"python", "ray", "torch", "deepspeed", "transformers"} <= set(found["versions"])
    assert found["versions"]["torch"] and found["written_at"].endswith("+00:00")
