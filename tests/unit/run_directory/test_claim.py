"""The owner of a run directory: another config is refused, and the message names the differences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pocl_ray.config import Config
from pocl_ray.config.neutral import NEUTRAL, neutral_free
from pocl_ray.errors import StorageError
from pocl_ray.run_directory.claim import COSTLY, Claim, differences, environment, places_on_hub
from pocl_ray.run_directory.storage import RunDirectory


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


Made = Callable[..., Config]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """Returns configs whose runs lie in a directory of this test."""
    return lambda **keys: config(**{"storage_path": str(tmp_path / "runs"), **keys})


def claimed(config: Config, resume_with_changes: bool = False, works: bool = True) -> RunDirectory:
    """Claim a directory; `works`: and do something costly in it."""
    run_dir = Claim(config, resume_with_changes).run_dir
    if works:
        run_dir.write_text(f"{COSTLY[0]}/something", "")
    return run_dir


def stored(run_dir: RunDirectory) -> Config:
    return Config.model_validate(yaml.safe_load(run_dir.read_text("config.yaml")))


def test_a_new_directory_is_taken_and_its_config_written(made: Made) -> None:
    assert stored(claimed(made(seed=7))) == made(seed=7)


def test_the_same_config_goes_on(made: Made) -> None:
    for _ in range(2):
        claimed(made())


def test_another_config_is_refused_and_every_difference_named(made: Made) -> None:
    run_dir = claimed(made())
    other = made(train__learning_rate=1e-3, curriculum__kd_ratio=0.5, data__tests={"new": {"path": "c"}})
    with pytest.raises(StorageError) as error:
        claimed(other)
    message = str(error.value)
    assert "\n" not in message
    assert "train.learning_rate: 0.0001 -> 0.001" in message
    assert "curriculum.kd_ratio.start: 0.7 -> 0.5" in message
    assert "data.tests.new" in message
    assert "--resume-with-changes" in message and "Choose another name" in message
    assert stored(run_dir) == made(), "nothing was written"


def test_changes_are_taken_where_they_are_asked_for(made: Made) -> None:
    claimed(made())
    assert stored(claimed(made(seed=9), resume_with_changes=True)).seed == 9


def test_a_directory_in_which_nothing_costly_was_begun_is_free(made: Made) -> None:
    claimed(made(), works=False)
    assert stored(claimed(made(seed=9))).seed == 9


def test_a_claim_is_undone_without_a_trace(made: Made, tmp_path: Path) -> None:
    claim = Claim(made(), False)
    claim.run_dir.write_text("rows/a", "half done")
    claim.undo(keep_config=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("keep_config", "seed"), [(False, 42), (True, 9)])
def test_an_undone_claim_of_an_old_directory_keeps_its_files(made: Made, keep_config: bool, seed: int) -> None:
    run_dir = claimed(made())
    Claim(made(seed=9), True).undo(keep_config)
    assert stored(run_dir).seed == seed
    assert run_dir.exists(f"{COSTLY[0]}/something")


@pytest.mark.parametrize(
    "keys",
    [
        {"scaling__num_workers": 2},
        {"scaling__num_workers": [1, 2]},
        {"report__num_examples": 1},
        {"distill__chunk_mib": 3},
        {"difficulty__batch_tokens": 99},
        {"train__micro_batch_rows": 2},
        {"train__micro_batch_rows": None, "train__micro_batch_tokens": 512},
        {"train__packing": "off"},
        {"train__zero_stage": 3},
        {"train__offload_optimizer": "cpu"},
        {"train__num_checkpoints": 5},
        {"train__checkpoint_every_steps": 5},
        {"train__log_every_steps": 5},
    ],
)
def test_keys_that_do_not_change_the_result_may_differ(made: Made, keys: dict[str, Any]) -> None:
    claimed(made())
    assert stored(claimed(made(**keys))) == made(**keys)


def test_every_neutral_key_is_a_key_of_the_config() -> None:
    tree = config().model_dump(mode="json")
    for key in NEUTRAL:
        node = tree
        for part in key.split("."):
            node = node[part]
    left = neutral_free(config())
    assert "scaling" not in left and "zero_stage" not in left["train"] and "precision" in left["train"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"name: run\nold_key: 1\n", "written by another version of pocl-ray (config.yaml has other keys)"),
        *((content, "it is damaged (") for content in (b"name: [", b"- 1", b"", b"\0", b"\xff", b"[" * 5000)),
    ],
)
def test_a_config_that_cannot_be_read_is_told_from_one_of_another_version(
    made: Made, content: bytes, says: str
) -> None:
    run_dir = claimed(made())
    run_dir.write_bytes("config.yaml", content)
    with pytest.raises(StorageError) as error:
        claimed(made())
    assert "config.yaml: " in str(error.value) and says in str(error.value) and "\n" not in str(error.value)
    assert run_dir.read_bytes("config.yaml") == content and not run_dir.exists("lease.json")


def test_another_order_of_signals_is_a_difference_and_of_other_keys_none() -> None:
    before, now = {"ce_loss": 1.0, "rouge_l": 1.0}, {"rouge_l": 1.0, "ce_loss": 1.0}
    assert list(differences({"difficulty": {"signals": before}}, {"difficulty": {"signals": now}})) == [
        "difficulty.signals: ce_loss, rouge_l -> rouge_l, ce_loss (the order)"
    ]
    assert list(differences({"loss_args": before}, {"loss_args": now})) == []


def test_differences_reach_every_depth() -> None:
    before = {"a": {"b": 1, "c": [1]}, "d": None, "e": 1}
    now = {"a": {"b": 2, "c": [1]}, "d": {"f": 1}, "g": 3}
    assert list(differences(before, now)) == ["a.b: 1 -> 2", "d: None -> {'f': 1}", "e: 1 -> None", "g: None -> 3"]
    assert list(differences(before, before)) == []


def test_the_environment_names_versions_without_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # the tests of Ray may have left their cluster standing
    found = environment()
    assert found["nodes"] == []
    assert {"python", "ray", "torch", "deepspeed", "transformers"} <= set(found["versions"])
    assert found["versions"]["torch"] and found["written_at"].endswith("+00:00")


def test_what_is_here_is_not_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models/big").mkdir(parents=True)
    Path("rows.jsonl").touch()
    here = {"data__train": {"path": "rows.jsonl"}, "data__dev": {"path": "owner/rows"}}
    mixed = config(**here, teacher={"path": "models/big"}, student={"path": "gpt2"})
    assert places_on_hub(mixed) == ["gpt2", "owner/rows"]
    assert environment(places_on_hub(mixed))["on_hub"] == ["gpt2", "owner/rows"]
