from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from pocl_ray.errors import ModelError
from pocl_ray.models.loading import load_model
from pocl_ray.models.places import ModelRef
from pocl_ray.models.prepare import cut_layers, evenly_spaced
from pocl_ray.models.saving import save_model


def layers_of(model):
    base = model.base_model
    return getattr(base, "decoder", base).layers if not hasattr(base, "h") else base.h


def test_layers_are_evenly_spaced_from_first_to_last():
    assert evenly_spaced(6, 30) == (0, 6, 12, 17, 23, 29)
    assert evenly_spaced(2, 12) == (0, 11)
    assert evenly_spaced(1, 12) == (0,)
    for teacher_layers in range(1, 30):
        assert evenly_spaced(teacher_layers, teacher_layers) == tuple(range(teacher_layers))
        for count in range(2, teacher_layers + 1):
            kept = evenly_spaced(count, teacher_layers)
            assert (kept[0], kept[-1]) == (0, teacher_layers - 1)
            assert len(set(kept)) == count
            gaps = {b - a for a, b in pairwise(kept)}
            assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("num_layers", [0, 5])
def test_a_depth_that_the_teacher_does_not_have_is_refused(new_model, num_layers):
    with pytest.raises(ModelError, match="a teacher with 4 layers"):
        cut_layers(new_model("gpt2"), num_layers)


def test_a_student_of_all_layers_is_its_teacher(family, new_model, padded_batch):
    teacher = new_model(family)
    student = cut_layers(teacher, 4).eval()
    with torch.no_grad():
        expected = teacher(input_ids=padded_batch[0], attention_mask=padded_batch[1]).logits
        found = student(input_ids=padded_batch[0], attention_mask=padded_batch[1]).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_a_student_has_its_teachers_layers_and_generates(family, new_model, num_layers):
    teacher = new_model(family)
    student = cut_layers(teacher, num_layers)
    assert student.config.num_hidden_layers == num_layers == len(layers_of(student))
    for kept, layer in zip(evenly_spaced(num_layers, 4), layers_of(student), strict=True):
        for name, tensor in layers_of(teacher)[kept].state_dict().items():
            assert torch.equal(layer.state_dict()[name], tensor)
    assert layers_of(teacher)[0].state_dict().keys() and len(layers_of(teacher)) == 4
    prompt_BT = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt_BT)}
    student.eval()
    cached = student.generate(prompt_BT, use_cache=True, **options)
    assert torch.equal(cached, student.generate(prompt_BT, use_cache=False, **options))


def test_a_student_shares_no_memory_with_its_teacher(new_model):
    teacher = new_model("llama_tied")
    before = teacher.get_input_embeddings().weight.clone()
    student = cut_layers(teacher, 2)
    with torch.no_grad():
        student.get_input_embeddings().weight.zero_()
    assert torch.equal(teacher.get_input_embeddings().weight, before)
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight


def test_a_student_keeps_dtype_and_kinds_of_layers_through_a_directory(new_model, new_tokenizer, tmp_path):
    teacher = new_model("qwen2").to(torch.bfloat16)
    teacher.config.layer_types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    student = cut_layers(teacher, 2)
    assert student.config.layer_types == ["full_attention", "sliding_attention"]
    save_model(student, new_tokenizer(), tmp_path / "student")
    loaded = load_model(ModelRef(str(tmp_path / "student")))
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.num_hidden_layers == 2
