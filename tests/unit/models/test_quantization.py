"""8-bit teachers: what is asked of the machine and of the config before anything is loaded."""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from torch import nn

from pocl_ray.config import TeacherConfig
from pocl_ray.errors import ResourceError
from pocl_ray.models.heads import response_hidden, split_model
from pocl_ray.models.loading import check_int8, int8_options, load_model
from pocl_ray.models.places import ModelRef
from pocl_ray.models.prepare import reference
from pocl_ray.models.saving import save_model


def install(monkeypatch: pytest.MonkeyPatch, is_there: bool) -> None:
    spec = ModuleSpec("bitsandbytes", None) if is_there else None
    monkeypatch.setattr("pocl_ray.models.loading.find_spec", lambda name: spec)


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, is_there=False)
    with pytest.raises(ResourceError, match=r"teacher: .* needs bitsandbytes, .*pocl-ray\[int8\]"):
        check_int8("teacher")


def test_the_layers_of_the_body_are_in_8_bit_and_say_nearly_the_same(
    tmp_path: Path, new_model, new_tokenizer, padded_batch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes, of the extra `int8`, is not installed")
    made = new_model("llama_untied")
    place = save_model(made, new_tokenizer(), tmp_path / "teacher")
    loaded = load_model(ModelRef(str(place), quantization="int8"))
    linear = {name: module for name, module in loaded.named_modules() if isinstance(module, nn.Linear)}
    assert {module.weight.dtype for name, module in linear.items() if name != "lm_head"} == {torch.int8}
    assert torch.equal(split_model(loaded).head.weight, made.lm_head.weight)
    assert torch.equal(loaded.get_input_embeddings().weight, made.get_input_embeddings().weight)
    products = watched_products(loaded, names := [name for name in linear if name != "lm_head"])
    with torch.no_grad():
        exact_NH, got_NH = (response_hidden(model, *padded_batch).float() for model in (made, loaded))
    assert set(products) == set(names)
    for name, (x_NI, y_NO) in products.items():
        weight_OI = made.get_submodule(name).weight
        error_NO = (y_NO - x_NI @ weight_OI.T).abs()
        assert bool((error_NO <= rounding_of_int8(x_NI, weight_OI)).all()), name
    assert not torch.equal(got_NH, exact_NH)
    assert not caplog.records, "a line for every product"


def watched_products(model: nn.Module, names: list[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Have linear layers without a bias note what they multiply next, (N, I), and what comes of it, (N, O)."""
    products: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def note(name: str, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> None:
        products[name] = given[0].float().flatten(0, -2), made.float().flatten(0, -2)

    for name in names:
        layer = model.get_submodule(name)
        assert layer.bias is None
        layer.register_forward_hook(lambda _, given, made, name=name: note(name, given, made))
    return products


def rounding_of_int8(x_NI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """The most that LLM.int8() may be off: each row of both is rounded to its largest entry / 127, shape (N, O).

    So an entry moves by half of that, and the product by the sum of what both move; inputs and result are in float16.
    """
    half_x_N1 = x_NI.abs().amax(1, keepdim=True) / 254
    half_w_1O = weight_OI.abs().amax(1)[None] / 254
    moved_NO = x_NI.abs().sum(1, keepdim=True) * half_w_1O + half_x_N1 * weight_OI.abs().sum(1)[None]
    in_half_precision_NO = 4 * 2.0**-11 * (x_NI.abs() @ weight_OI.abs().T)
    return moved_NO + half_x_N1 * half_w_1O * x_NI.shape[1] + in_half_precision_NO


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
