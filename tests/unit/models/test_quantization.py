"""8-bit teachers: what is asked of the machine and of the config before anything is loaded."""

from __future__ import annotations

from importlib.machinery import ModuleSpec

import pytest
import torch

from pocl_ray.config import TeacherConfig
from pocl_ray.errors import ResourceError
from pocl_ray.models.loading import load_model
from pocl_ray.models.places import ModelRef
from pocl_ray.models.preparing import reference
from pocl_ray.models.quantization import check_int8, int8_options
from pocl_ray.models.saving import save_model


def install(monkeypatch: pytest.MonkeyPatch, is_there: bool) -> None:
    spec = ModuleSpec("bitsandbytes", None) if is_there else None
    monkeypatch.setattr("pocl_ray.models.quantization.find_spec", lambda name: spec)


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, is_there=False)
    with pytest.raises(ResourceError, match=r"teacher: .* needs bitsandbytes, .*pocl-ray\[int8\]"):
        check_int8("teacher")


def test_without_a_gpu_it_is_refused_where_a_model_would_be_loaded(
    tmp_path, monkeypatch: pytest.MonkeyPatch, new_model, new_tokenizer
) -> None:
    install(monkeypatch, is_there=True)
    place = save_model(new_model("llama_tied"), new_tokenizer(), tmp_path / "teacher")
    with pytest.raises(ResourceError, match="needs a CUDA GPU, and none is used; set quantization to none"):
        load_model(ModelRef(str(place), quantization="int8"))


def test_on_a_gpu_the_weights_go_straight_to_the_device_in_8_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, is_there=True)
    options = int8_options("teacher", torch.device("cuda", 1))
    assert options["quantization_config"].load_in_8bit
    assert options["device_map"] == {"": torch.device("cuda", 1)}


def test_the_config_reaches_the_reference_and_one_of_a_model_made_here_does_not() -> None:
    config = TeacherConfig(path="teacher", quantization="int8")
    assert reference(config).quantization == "int8"
    assert reference(config, "elsewhere").quantization == "none"


@pytest.mark.parametrize("extra", [{"sft": {}}, {"adapter": "a"}, {"sharded": True}])
def test_combinations_that_make_no_sense_are_refused(extra: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="quantization"):
        TeacherConfig.model_validate({"path": "t", "quantization": "int8", **extra})
