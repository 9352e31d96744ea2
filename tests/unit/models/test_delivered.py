"""A saved student, loaded by transformers alone, does what evaluation saw; and what cannot work is refused at first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from pocl_ray.answers.decode import GenerationSettings, generate
from pocl_ray.config import StudentConfig, TeacherConfig
from pocl_ray.errors import ModelError
from pocl_ray.models.loading import load_model, load_tokenizer
from pocl_ray.models.lora import save_student
from pocl_ray.models.places import ModelRef
from pocl_ray.models.prepare import check_models, check_other_teacher
from pocl_ray.models.saving import save_model, try_saving

PROMPTS = ["w3 w4", "w5", "w6 w7 w8", "w9 w2 w2 w1"]
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16}


def test_the_pipeline_of_transformers_gives_the_answers_of_evaluation_token_for_token(
    new_model: Any, new_tokenizer: Any, tmp_path: Path
) -> None:
    model, tokenizer = new_model("llama_untied"), new_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "w1"})
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    # As chat models are published: an end of their own, and settings that change greedy answers.
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=[5, 6], repetition_penalty=3.0, do_sample=False, temperature=0.6, min_new_tokens=9
    )
    folder = tmp_path / "student"
    save_student(model, tokenizer, torch.float32, folder, None, "base", loaded_as="bfloat16")
    ours, loaded = load_model(ModelRef(str(folder), dtype="bfloat16")), load_tokenizer(str(folder))
    prompts = [np.array(loaded(prompt)["input_ids"]) for prompt in PROMPTS]
    settings = GenerationSettings(sampling_temperature=0, max_new_tokens=20)
    (answers,) = generate(ours, loaded, prompts, settings, [None])
    assert min(map(len, answers)) < 20, "some stop"

    pipe = transformers.pipeline("text-generation", model=str(folder), device="cpu")
    assert pipe.model.dtype == ours.dtype == torch.bfloat16
    assert pipe.model.generation_config.eos_token_id == [0, 5, 6]
    assert pipe.model.generation_config.pad_token_id == pipe.tokenizer.pad_token_id == 1
    assert pipe.tokenizer.chat_template == tokenizer.chat_template
    for text, prompt, answer in zip(PROMPTS, prompts, answers, strict=True):
        (found,) = pipe(text, max_new_tokens=20, do_sample=False, return_tensors=True)
        theirs = found["generated_token_ids"][len(prompt) :]
        assert list(theirs[: len(answer)]) == answer
        assert len(theirs) == 20 if len(answer) == 20 else theirs[len(answer)] in (0, 5, 6)
        assert len(theirs) <= len(answer) + 1


def test_a_generation_config_that_transformers_refuses_is_no_matter(
    new_model: Any, new_tokenizer: Any, tmp_path: Path
) -> None:
    model = new_model("llama_tied")
    model.generation_config.temperature = 0.6
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path / "by_transformers")
    try_saving(model, new_tokenizer(), "base")
    save_model(model, new_tokenizer(), tmp_path / "ours")


def test_what_saving_needs_is_tried_before_training(
    new_model: Any, new_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_model("gpt2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try_saving(model, new_tokenizer(), "base")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    monkeypatch.setattr(model.config, "odd", {object()}, raising=False)
    with pytest.raises(ModelError, match="base: after training it could not be saved"):
        try_saving(model, new_tokenizer(), "base")


def test_ids_beyond_the_embedding_and_rows_beyond_the_positions_are_told_with_both_numbers(
    new_model: Any, new_tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer = new_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    short = str(save_model(new_model("llama_tied"), tokenizer, tmp_path / "short"))
    longer = new_tokenizer(num_tokens=len(tokenizer) + 5)
    made = StudentConfig(architecture=GPT2)
    assert check_models(TeacherConfig(path=short), made, tokenizer, max_tokens=16) is None
    with pytest.raises(ModelError, match=r"teacher: the tokenizer has ids up to 64, .* embeddings for 60 of them"):
        check_models(TeacherConfig(path=short), made, longer)
    with pytest.raises(ModelError, match=r"student: data.max_tokens is 17, and the model has 16 positions"):
        check_models(TeacherConfig(path=short), made, tokenizer, max_tokens=17)
    gpt2 = str(save_model(new_model("gpt2"), tokenizer, tmp_path / "gpt2"))
    check_other_teacher(TeacherConfig(path=gpt2), tokenizer, max_tokens=64)
    with pytest.raises(ModelError, match="max_tokens is 65, and the model has 64 positions"):
        check_other_teacher(TeacherConfig(path=gpt2), tokenizer, max_tokens=65)
    both_ways = StudentConfig(architecture={"model_type": "bert", "num_hidden_layers": 1})
    with pytest.raises(ModelError, match="student: bert reads in both directions"):
        check_models(TeacherConfig(path=short), both_ways, tokenizer)
