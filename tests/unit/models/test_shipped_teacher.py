"""The teacher that the package ships: small, whole, with the quickstart's tokenizer, and as good as is said of it."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import quickstart_teacher as script
from pocl_ray.config import StudentConfig, TeacherConfig, load_config
from pocl_ray.data.prepare import training_texts
from pocl_ray.data.tokenization import train_tokenizer
from pocl_ray.errors import ModelError
from pocl_ray.models import shipped
from pocl_ray.models.loading import load_model, load_tokenizer, num_parameters
from pocl_ray.models.places import ModelRef, model_fingerprint, on_this_node, place_on_this_node
from pocl_ray.models.prepare import check_student_tokenizer, check_teacher_tokenizer, origin_fingerprint

ROOT = Path(__file__).resolve().parents[3]
PLACE = "samples://quickstart-teacher"
FOLDER = shipped.FOLDER / "quickstart-teacher"
FIGURES = json.loads((FOLDER / "figures.json").read_text(encoding="utf-8"))


def test_it_is_small_and_the_one_that_the_figures_are_of() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 2_000_000
    digest = hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()
    assert digest == FIGURES["model"]["sha256"]  # a change of the teacher changes every figure of the quickstart


def test_a_wheel_holds_all_of_its_files() -> None:
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    patterns = re.findall(r'"([^"]+)"', re.findall(r"package-data\]\npocl_ray = \[(.*)\]", settings)[0])
    told = {path for pattern in patterns for path in (ROOT / "pocl_ray").glob(pattern)}
    assert set(FOLDER.iterdir()) <= told


def test_its_place_is_read_from_the_package_on_every_node() -> None:
    config = TeacherConfig(path=PLACE)
    assert origin_fingerprint(config) == model_fingerprint(ModelRef(str(FOLDER)))
    model = load_model(on_this_node(ModelRef(PLACE)))
    assert model.dtype == torch.bfloat16
    assert num_parameters(model) == FIGURES["model"]["num_parameters"]


def test_another_name_is_refused_with_the_one_there_is() -> None:
    with pytest.raises(ModelError, match=r"samples://big: no such model .* there is samples://quickstart-teacher"):
        place_on_this_node("samples://big")


def test_its_tokenizer_is_the_one_that_the_quickstart_would_train(tmp_path: Path) -> None:
    config = load_config(ROOT / "configs" / "quickstart.yaml")
    train_tokenizer(training_texts(config.data), script.VOCABULARY, tmp_path)
    own = load_tokenizer(str(tmp_path))
    check_teacher_tokenizer(TeacherConfig(path=PLACE), own)
    check_student_tokenizer(StudentConfig(path=PLACE), own)


def test_its_answers_are_as_good_as_its_figures_say() -> None:
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(str(FOLDER))
    model = load_model(ModelRef(str(FOLDER)), dtype=torch.float32)
    found, told = script.measure(model, tokenizer, "test", seeds=(10,)), FIGURES["test"]
    assert found["greedy_rouge_l"] == pytest.approx(told["greedy_rouge_l"], abs=0.5)
    assert found["sampled_rouge_l"] == pytest.approx(told["sampled_rouge_l"], abs=2.0)  # one draw in place of five
    assert found["cross_entropy"] == pytest.approx(told["cross_entropy"], abs=1e-3)
    assert told["greedy_rouge_l"] > 90
    assert told["sampled_rouge_l"] > 87
