"""Prompts to tiny models of a run: streamed, through the run's own template, and plain for scripts."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pocl_ray.chat import terminal
from pocl_ray.chat.speakers import Speaker, load_speakers
from pocl_ray.config import Config, DataConfig
from pocl_ray.config.root import FinalGenerationConfig
from pocl_ray.errors import ConfigError, StorageError, UserError
from pocl_ray.models.prepare import references_of_run
from pocl_ray.models.saving import save_model
from pocl_ray.run_directory.opening import PastRun
from pocl_ray.run_directory.storage import RunDirectory

NewModel = Callable[..., PreTrainedModel]
NewTokenizer = Callable[[], PreTrainedTokenizerFast]
NAMES = ["teacher", "student_before", "student"]
DATA = {
    "train": {"path": "t.jsonl"},
    "dev": {"path": "d.jsonl"},
    "prompt_template": "w1 {instruction} w2",
    "max_tokens": 20,
    "max_prompt_tokens": 10,
}
DONE = {"distill": {"status": "done"}}


@pytest.fixture
def speaker(new_model: NewModel, new_tokenizer: NewTokenizer) -> Speaker:
    generation = FinalGenerationConfig(max_new_tokens=6, sampling_temperature=0.0)
    return Speaker("student", new_model("gpt2"), new_tokenizer(), DataConfig.model_validate(DATA), generation)


@pytest.fixture
def run(tmp_path: Path, new_model: NewModel, new_tokenizer: NewTokenizer) -> PastRun:
    run_dir, tokenizer = RunDirectory.open(str(tmp_path), "run"), new_tokenizer()
    for seed, place in enumerate(("teacher", "run/models/student_init", "run/student")):
        save_model(new_model("gpt2", seed=seed), tokenizer, tmp_path / place)
    tokenizer.save_pretrained(tmp_path / "run" / "tokenizer")
    tree = {"name": "run", "data": DATA, "teacher": {"path": str(tmp_path / "teacher")}, "student": {"num_layers": 2}}
    return PastRun("run", run_dir, Config.model_validate(tree), DONE)


def test_an_answer_is_streamed_and_is_the_same_as_the_whole_one(speaker: Speaker) -> None:
    shown: list[str] = []
    answer = speaker.answer("w5 w6", None, shown.append)
    assert 1 < len(shown) <= 6 and shown[-1] == answer
    assert all(later.startswith(earlier) for earlier, later in pairwise(shown))
    assert speaker.answer("w5 w6", None, lambda text: None) == answer
    assert speaker.answer("w7 w8 w9", None, lambda text: None) != answer


def test_a_seed_draws_another_answer_and_the_same_one_again(speaker: Speaker) -> None:
    warm = Speaker(
        speaker.name,
        speaker.model,
        speaker.tokenizer,
        speaker.data,
        speaker.generation.model_copy(update={"sampling_temperature": 5.0}),
    )
    answers = [warm.answer("w5", seed, lambda text: None) for seed in (1, 2, 1)]
    assert answers[0] == answers[2] != answers[1]


def test_each_model_of_the_run_answers_and_a_script_reads_it(run: PastRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert [speaker.name for speaker in load_speakers(run, NAMES, 0.0, 4)] == NAMES
    terminal.chat(run, student_alone=False, prompt="w5", temperature=0.0, max_new_tokens=4, seed=0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0::2] == ["[teacher]", "[student before]", "[student]"] and len(set(lines[1::2])) == 3
    terminal.chat(run, student_alone=True, prompt="w5", temperature=0.0, max_new_tokens=4, seed=0)
    assert capsys.readouterr().out.splitlines() == [lines[-1]]


def test_a_prompt_that_is_cut_is_told_once(run: PastRun, capsys: pytest.CaptureFixture[str]) -> None:
    for prompt, notes in (("w5 " * 8, 0), ("w5 " * 12, 1)):  # with the template's two, and of at most ten tokens
        terminal.chat(run, student_alone=False, prompt=prompt, temperature=0.0, max_new_tokens=2, seed=0)
        shown = capsys.readouterr().err
        assert shown.count("tokens of the prompt are not read: the run's models read at most 10") == notes
    assert "the first 4 tokens" in shown


def test_the_places_of_models_are_those_that_the_run_made(run: PastRun) -> None:
    places = references_of_run(run.config, run.run_dir)
    assert places["student_before"].path.endswith("run/models/student_init")
    assert places["student"].path.endswith("run/student") and places["teacher"].path.endswith("teacher")
    tuned = run.config.model_validate({**run.config.model_dump(), "student": {"path": "small", "sft": {}}})
    assert references_of_run(tuned, run.run_dir)["student_before"].path.endswith("models/student")
    adapters = {"path": "small", "lora": {"merge": False}}
    alone = run.config.model_validate({**run.config.model_dump(), "student": adapters})
    student = references_of_run(alone, run.run_dir)["student"]
    assert student.path == "small" and student.adapter is not None and student.adapter.endswith("student/adapter")


def test_the_terminal_asks_until_an_empty_line(
    run: PastRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = iter(["w5", ""])
    monkeypatch.setattr(terminal.console, "input", lambda *_: next(asked))
    terminal.chat(run, student_alone=True, prompt=None, temperature=0.0, max_new_tokens=3, seed=0)
    assert "student" in capsys.readouterr().err


def test_a_refused_prompt_is_told_as_it_is_and_the_next_one_is_answered(
    run: PastRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, refused = iter(["one", "two", ""]), iter([True])

    def answer(*_: object) -> str:
        if next(refused, False):
            raise UserError("chat: the template refuses [red] prompts")
        return "w7"

    monkeypatch.setattr(terminal.console, "input", lambda *_: next(asked))
    monkeypatch.setattr(Speaker, "answer", answer)
    terminal.chat(run, student_alone=True, prompt=None, temperature=0.0, max_new_tokens=3, seed=0)
    shown = capsys.readouterr().err
    assert "error: chat: the template refuses [red] prompts" in shown and "w7" in shown


def test_what_a_model_writes_is_not_read_as_markup() -> None:
    shown = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    shown.print(terminal.panels({"teacher": "[bold]x[/bold]", "student": "y"}, shown))
    text = shown.export_text()
    assert "[bold]x[/bold]" in text and "teacher" in text


def test_an_unfinished_run_an_empty_prompt_and_a_limit_that_is_too_long_are_one_line(
    run: PastRun, speaker: Speaker
) -> None:
    unfinished = PastRun("run", run.run_dir, run.config, {"rows": {"status": "done"}})
    with pytest.raises(StorageError, match="done are rows; missing: distill"):
        list(load_speakers(unfinished, NAMES, 0.0, None))
    with pytest.raises(ConfigError, match="at most 20 tokens"):
        list(load_speakers(run, NAMES, 0.0, 20))
    with pytest.raises(UserError, match="the prompt is not UTF-8"):
        speaker.answer("a \udcff", None, print)
    text = speaker.data.model_copy(update={"task": "text"})
    with pytest.raises(UserError, match="an empty prompt has no tokens"):
        Speaker("student", speaker.model, speaker.tokenizer, text, speaker.generation).answer("", None, print)
