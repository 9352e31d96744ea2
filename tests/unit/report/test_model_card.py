"""The student's README.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from fake_run import CONFIG, LocalFiles, make_run

from pocl_ray.report.model_card import write_model_card


def _front_matter(card: str) -> dict[str, object]:
    _, matter, _ = card.split("---\n", 2)
    loaded = yaml.safe_load(matter)
    assert isinstance(loaded, dict)
    return loaded


def _write_config(files: LocalFiles, *, teacher: str, student: str, extra: str = "{}") -> None:
    config = yaml.safe_load(CONFIG)
    config |= {"teacher": yaml.safe_load(teacher), "student": yaml.safe_load(student)} | yaml.safe_load(extra)
    files.write_text("config.yaml", yaml.safe_dump(config))


def test_card_has_figures_stages_and_how_to_load(tmp_path: Path) -> None:
    files = make_run(tmp_path, num_rows=64)
    files.write_json(
        "manifest.json", {"version": 1, "steps": {}}
    )  # the card is written before its step is marked as done
    card = write_model_card(files)
    assert files.read_bytes("student/README.md").decode() == card
    assert _front_matter(card)["tags"] == ["distillation", "pocl", "pocl-ray"]
    assert "license" not in _front_matter(card)
    assert "was distilled from its teacher" in card
    assert "**this model**" in card and "| 3 | 0, 1, 2, 3 |" in card
    assert "AutoModelForCausalLM.from_pretrained" in card


def test_base_model_is_where_the_students_weights_come_from(tmp_path: Path) -> None:
    files = make_run(tmp_path, num_rows=64)
    _write_config(files, teacher="{path: HuggingFaceTB/SmolLM2-135M-Instruct}", student="{num_layers: 6}")
    assert _front_matter(write_model_card(files))["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    _write_config(files, teacher="{path: gpt2-xl}", student="{path: gpt2}")
    assert _front_matter(write_model_card(files))["base_model"] == "gpt2"


def test_folders_of_this_machine_stay_out_of_the_card(tmp_path: Path) -> None:
    files = make_run(tmp_path, num_rows=64)
    _write_config(files, teacher="{path: /home/someone/secret/big}", student="{path: s3://bucket/secret/small}")
    card = write_model_card(files)
    assert "base_model" not in _front_matter(card)
    assert "secret" not in card and "big" in card and "small" in card


def test_relative_places_are_no_hub_ids_wherever_the_card_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = make_run(tmp_path, num_rows=64)
    extra = "data: {train: {path: my_rows.jsonl}, dev: {path: owner/rows}}"
    _write_config(files, teacher="{path: models/big}", student="{num_layers: 2}", extra=extra)
    files.write_json("environment.json", {"on_hub": ["owner/rows"]})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # from where models/big looks like an id
    matter = _front_matter(write_model_card(files))
    assert "base_model" not in matter and "datasets" not in matter
    assert "models/big" not in write_model_card(files)


def test_foreign_text_cannot_break_out_of_the_card(tmp_path: Path) -> None:
    files = make_run(tmp_path, num_rows=64)
    template = '"{instruction}\\n```\\n---\\n<script>"'
    extra = f"data: {{train: {{path: a.jsonl}}, dev: {{path: b.jsonl}}, prompt_template: {template}}}"
    _write_config(files, teacher="{path: 'big'}", student="{path: 'small\": [evil'}", extra=extra)
    files.write_json("evaluation.json", {"sets": {"a|b<script>": {"student": {"greedy": {"rouge_l": 1.0}}}}})
    card = write_model_card(files)
    assert "base_model" not in _front_matter(card)
    outside = [line for line in card.splitlines() if not line.startswith("    ")]
    assert not any("<script>" in line for line in outside)
    assert r"a\|b&lt;script&gt;" in card


def test_card_of_a_run_without_config_or_evaluation_still_says_how_to_load(tmp_path: Path) -> None:
    card = write_model_card(LocalFiles(tmp_path))
    assert "How to use it" in card and "Figures" not in card


@pytest.mark.parametrize(
    ("data", "asks"),
    [
        ({"prompt_template": "chat", "template_args": {"enable_thinking": False}}, "enable_thinking=False,\n)"),
        ({"prompt_template": "alpaca"}, "### Instruction:\\nName the capital of France."),
        ({"prompt_template": "plain", "task": "summarization"}, "A long text."),
        ({"task": "text"}, "Once upon a time"),
    ],
)
def test_the_card_asks_the_student_as_its_rows_did(tmp_path: Path, data: dict[str, object], asks: str) -> None:
    files = make_run(tmp_path, num_rows=64)
    config = {"data": {**yaml.safe_load(CONFIG)["data"], **data}, "difficulty": {"signals": ["ce_loss"]}}
    extra = yaml.safe_dump(config)
    _write_config(files, teacher="{path: big}", student="{path: small}", extra=extra)
    (code,) = re.findall(r"```python\n(.*?)```", write_model_card(files), re.DOTALL)
    compile(code, "card", "exec")
    assert asks in code and "model.generate(**asked, max_new_tokens=" in code


def test_a_student_of_adapters_alone_is_loaded_with_peft(tmp_path: Path) -> None:
    files = make_run(tmp_path, num_rows=64)
    _write_config(files, teacher="{path: big, adapter: own}", student="{path: small, lora: {rank: 4, merge: false}}")
    card = write_model_card(files)
    assert 'AutoPeftModelForCausalLM.from_pretrained(f"{folder}/adapter")' in card
    assert "small, adapters of rank 4" in card and "big with its adapter" in card
    _write_config(files, teacher="{path: big}", student="{path: small, lora: {}}")
    assert "AutoPeft" not in write_model_card(files)
