from __future__ import annotations

import errno
import json
import os
import pickle
from dataclasses import asdict
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file

from pocl_ray.config import StudentConfig, TeacherConfig
from pocl_ray.errors import ModelError, ResourceError, StorageError
from pocl_ray.models.building import build_model
from pocl_ray.models.loading import check_same_tokenizer, load_model, load_tokenizer, num_parameters
from pocl_ray.models.places import ModelRef, model_fingerprint, read_config
from pocl_ray.models.prepare import make_student, reference
from pocl_ray.models.saving import save_model
from pocl_ray.run_directory.storage import RunDirectory

LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
LLAMA = {**LLAMA, "num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.fixture
def saved(new_model, new_tokenizer, tmp_path) -> Path:
    return save_model(new_model("llama_tied"), new_tokenizer(), tmp_path / "model")


def edit_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def failing_hub(monkeypatch, error: Exception) -> None:
    monkeypatch.setattr("pocl_ray.models.places.hf_hub_download", Mock(side_effect=error))


def hub_error(kind: type[Exception], status: int) -> Exception:
    return kind("no\nmore lines", response=Mock(status_code=status, headers={}))


def assert_refused(ref: ModelRef, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(ref)
    message = str(caught.value)
    assert ref.path in message and "\n" not in message
    for word in words:
        assert word in message


# Models


def test_a_saved_model_loads_as_it_was(family, new_model, new_tokenizer, tmp_path, padded_batch):
    model = new_model(family)
    save_model(model, new_tokenizer(), tmp_path / "model")
    loaded = load_model(ModelRef(str(tmp_path / "model")))
    with torch.no_grad():
        expected = model(input_ids=padded_batch[0], attention_mask=padded_batch[1]).logits
        assert torch.equal(loaded(input_ids=padded_batch[0], attention_mask=padded_batch[1]).logits, expected)
    assert not loaded.training
    assert (loaded.generation_config.eos_token_id, loaded.generation_config.pad_token_id) == (0, 0)
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode & 0o044 == 0o044 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_dtype_attention_and_mode_are_as_asked(saved):
    loaded = load_model(ModelRef(str(saved), dtype="bfloat16", attention="eager"), eval_mode=False)
    assert loaded.dtype == torch.bfloat16
    assert loaded.config._attn_implementation == "eager"
    assert loaded.training
    assert load_model(ModelRef(str(saved), dtype="bfloat16"), dtype=torch.float32).dtype == torch.float32


def test_the_eos_row_is_trained_where_eos_doubles_as_pad(saved):
    edit_config(saved, pad_token_id=0, eos_token_id=0)
    model = load_model(ModelRef(str(saved)), eval_mode=False)
    hidden = model.model(input_ids=torch.tensor([[5, 0, 6]])).last_hidden_state
    hidden.square().sum().backward()
    assert model.get_input_embeddings().weight.grad[0].abs().sum() > 0


def test_a_reference_travels_as_pickle_and_json():
    ref = ModelRef("somewhere", dtype="bfloat16", attention="sdpa")
    assert pickle.loads(pickle.dumps(ref)) == ref
    assert ModelRef(**json.loads(json.dumps(asdict(ref)))) == ref


def test_a_mistyped_path_is_told_from_a_hub_id(tmp_path, monkeypatch):
    hub = Mock(side_effect=LocalEntryNotFoundError("offline"))
    monkeypatch.setattr("pocl_ray.models.places.hf_hub_download", hub)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("./model", "../model", "/no/such/model", "~/no_such_model", "a/b/c", "runs/model"):
        assert_refused(ModelRef(path), "no such model directory")
    hub.assert_not_called()
    for hub_id in ("gpt2", "Qwen/Qwen2.5-0.5B"):
        assert_refused(ModelRef(hub_id), "no such directory here", "Hub cannot be reached")
    assert hub.call_count == 2


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (hub_error(RepositoryNotFoundError, 404), "neither a directory here nor a model on the Hub"),
        (hub_error(RevisionNotFoundError, 404), "no revision 'v9'"),
        (OSError("disk\nfull"), "the Hub failed (disk)"),
    ],
)
def test_what_the_hub_refuses_is_one_line(monkeypatch, error, words):
    failing_hub(monkeypatch, error)
    assert_refused(ModelRef("owner/model", revision="v9"), words)


def test_a_directory_without_config_or_weights_is_refused(saved):
    weights = saved / "model.safetensors"
    weights.rename(saved / "elsewhere")
    assert_refused(ModelRef(str(saved)), "has no weights (*.safetensors)")
    (saved / "pytorch_model.bin").write_bytes(b"pickle")
    assert_refused(ModelRef(str(saved)), "only safetensors are read, and it holds pytorch_model.bin; convert with")
    (saved / "config.json").unlink()
    assert_refused(ModelRef(str(saved)), "has no config.json")
    (saved / "elsewhere").rename(weights)
    assert_refused(ModelRef(str(saved)), "has no config.json")


def test_a_config_that_may_not_be_read_is_refused(saved, monkeypatch):
    error = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(Path, "read_text", Mock(side_effect=error))  # the tests may run as root, who may read all
    with pytest.raises(ModelError, match=r"config\.json: cannot be read \(Permission denied\)"):
        read_config(ModelRef(str(saved)))


def test_damaged_files_are_refused(saved):
    ref = ModelRef(str(saved))
    config = (saved / "config.json").read_text()
    (saved / "config.json").write_text("{")
    assert_refused(ref, "is not JSON")
    (saved / "config.json").write_text("[" * 100_000)
    assert_refused(ref, "is not JSON")
    (saved / "config.json").write_text("[]")
    assert_refused(ref, "is not a JSON object")
    (saved / "config.json").write_text(config)
    generation = (saved / "generation_config.json").read_text()
    (saved / "generation_config.json").write_text("[]")
    assert_refused(ref, "cannot be loaded")
    (saved / "generation_config.json").write_text(generation)
    content = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(content[:-100])
    assert_refused(ref, "cannot be loaded")


def test_missing_tensors_and_other_shapes_are_refused_not_drawn_at_random(saved):
    tensors = load_file(saved / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    assert_refused(ModelRef(str(saved)), "lack model.norm.weight", "1 tensors")
    save_file({**tensors, "model.norm.weight": norm[:-1].clone()}, saved / "model.safetensors", {"format": "pt"})
    assert_refused(ModelRef(str(saved)))


def test_unknown_architectures_and_foreign_code_are_refused(saved):
    edit_config(saved, model_type="lama")
    assert_refused(ModelRef(str(saved)), "no model_type 'lama'", "did you mean 'llama'?")
    edit_config(saved, auto_map={"AutoModelForCausalLM": "modeling.Lama"})
    assert_refused(ModelRef(str(saved)), "its own Python code", "trust_remote_code: true")


def test_a_model_that_is_no_language_model_is_refused(saved):
    edit_config(saved, model_type="vit", architectures=["ViTModel"])
    assert_refused(ModelRef(str(saved)), "cannot be loaded")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_where_there_is_none_is_refused(saved):
    with pytest.raises(ResourceError, match="no usable GPU"):
        load_model(ModelRef(str(saved)), device="cuda")


# Fingerprints and saving


def test_a_fingerprint_follows_the_weights_and_not_the_place(saved, new_model, new_tokenizer, tmp_path):
    original = model_fingerprint(ModelRef(str(saved)))
    copy = save_model(new_model("llama_tied"), new_tokenizer(num_tokens=30), tmp_path / "copy")
    assert model_fingerprint(ModelRef(str(copy))) == original
    save_model(new_model("llama_tied", seed=1), new_tokenizer(), copy)
    assert model_fingerprint(ModelRef(str(copy))) != original
    edit_config(saved, rms_norm_eps=0.5)
    assert model_fingerprint(ModelRef(str(saved))) != original


def test_a_hub_models_fingerprint_is_its_commit(monkeypatch):
    cached = "/cache/models--owner--model/snapshots/0123abc/config.json"
    monkeypatch.setattr("pocl_ray.models.places.hf_hub_download", lambda *_, **__: cached)
    assert model_fingerprint(ModelRef("owner/model")) == "hub:owner/model@0123abc"


def test_saving_replaces_a_directory_as_a_whole_or_not_at_all(saved, new_model, new_tokenizer, monkeypatch):
    (saved / "left_over.txt").write_text("old")
    before = model_fingerprint(ModelRef(str(saved)))
    broken = new_tokenizer()
    monkeypatch.setattr(broken, "save_pretrained", Mock(side_effect=RuntimeError("killed")))
    with pytest.raises(RuntimeError, match="killed"):
        save_model(new_model("gpt2"), broken, saved)
    assert model_fingerprint(ModelRef(str(saved))) == before
    save_model(new_model("gpt2"), new_tokenizer(), saved)
    assert model_fingerprint(ModelRef(str(saved))) != before
    assert not (saved / "left_over.txt").exists()
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_saving_where_it_cannot_be_is_refused(new_model, new_tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        save_model(new_model("gpt2"), new_tokenizer(), tmp_path / "file" / "model")


# Tokenizers


def test_a_tokenizer_pads_with_eos_where_it_has_no_pad(new_tokenizer, tmp_path):
    new_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<eos>", "<eos>")


def test_a_tokenizer_without_eos_or_none_at_all_is_refused(new_tokenizer, tmp_path):
    new_tokenizer(eos=None).save_pretrained(tmp_path / "no_eos")
    with pytest.raises(ModelError, match="has no eos token"):
        load_tokenizer(str(tmp_path / "no_eos"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="has no tokenizer that can be loaded"):
        load_tokenizer(str(tmp_path / "empty"))


def test_tokenizers_are_compared_by_what_ids_mean(new_tokenizer):
    check_same_tokenizer(new_tokenizer(), new_tokenizer())
    with pytest.raises(ModelError, match="token 'w50' is id 50 for the teacher and absent for the student"):
        check_same_tokenizer(new_tokenizer(), new_tokenizer(num_tokens=50))
    with pytest.raises(ModelError, match="token 'v1' is absent for the teacher and id 1 for the student"):
        check_same_tokenizer(new_tokenizer(), new_tokenizer(word="v"))


# Models from a config


def test_a_built_model_depends_on_the_seed_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (build_model(LLAMA, 40, 0, None, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert (first.dtype, first.config.vocab_size, first.config.eos_token_id) == (torch.float32, 40, 0)
    assert first.get_input_embeddings().padding_idx is None


def test_parameters_are_counted_once_when_tied():
    untied = num_parameters(build_model(LLAMA, 40, 0, None, 0))
    tied = num_parameters(build_model({**LLAMA, "tie_word_embeddings": True}, 40, 0, None, 0))
    assert untied - tied == 40 * 16


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "lama"}, "unknown 'lama'; did you mean 'llama'?"),
        ({"model_type": None}, "names no model_type"),
        ({"model_type": "vit"}, "'vit' is not a causal language model"),
        ({"hidden_szie": 8}, "architecture.hidden_szie: 'llama' has no such key; did you mean 'hidden_size'?"),
        ({"vocab_size": 8}, "comes from the tokenizer"),
        ({"hidden_size": "wide"}, "expected int, got str"),
        ({"num_attention_heads": 3}, "not a multiple"),
        ({"num_attention_heads": 0}, "zero"),
        ({"hidden_act": "swiglu"}, "'swiglu' is no value that it knows"),
        ({"rope_parameters": {"rope_type": "yarm", "rope_theta": 1e4}}, "'yarm' is no value that it knows"),
    ],
)
def test_an_architecture_that_cannot_be_is_refused(changes, words):
    with pytest.raises(ModelError) as caught:
        build_model({**LLAMA, **changes}, 40, 0, None, 0)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_names_that_families_share_are_understood():
    architecture = {"model_type": "gpt2", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    assert build_model(architecture, 40, 0, None, 0).config.n_layer == 2
    model = build_model({**LLAMA, "rope_theta": 5e5, "head_dim": 4}, 40, 0, None, 0)
    assert model.config.rope_parameters["rope_theta"] == 5e5
    assert model.model.layers[0].self_attn.q_proj.weight.shape[0] == 8


def test_a_model_directory_is_found_from_any_working_directory(tmp_path, monkeypatch):
    (tmp_path / "models/small").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    ref = reference(TeacherConfig(path="models/small"))
    monkeypatch.chdir("/")
    assert ref.directory == tmp_path / "models/small"
    assert reference(TeacherConfig(path="owner/small")).path == "owner/small"


@pytest.mark.parametrize(("model_type", "name"), [("llama", "num_hidden_layers"), ("gpt2", "n_layer")])
def test_an_architecture_without_layers_is_refused(model_type, name):
    with pytest.raises(ModelError, match=rf"^architecture\.{name}: 0 layers make no '{model_type}' model; set it to 1"):
        build_model({"model_type": model_type, name: 0}, 40, 0, None, 0)


def test_a_student_that_fails_on_its_first_tokens_is_refused_when_it_is_made(new_tokenizer, tmp_path):
    student = StudentConfig(architecture={**LLAMA, "num_key_value_heads": 3})
    with pytest.raises(ModelError, match=r"^architecture: the model fails on its first tokens: ") as caught:
        make_student(student, None, new_tokenizer(), 0, RunDirectory.open(str(tmp_path), "run"))
    assert "\n" not in str(caught.value)
