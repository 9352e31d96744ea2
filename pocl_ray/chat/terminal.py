"""The terminal side of `pocl-ray chat`: panels next to each other while answers are written, or plain lines."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.text import Text

from pocl_ray.chat.speakers import LABELS, Speaker, load_speakers
from pocl_ray.console import console
from pocl_ray.errors import UserError
from pocl_ray.records import STUDENT
from pocl_ray.run_directory.opening import PastRun

COLOURS = {"teacher": "cyan", "student_before": "yellow", "student": "green"}
NARROWEST = 30  # columns of a panel; in a narrower terminal panels stand below each other


def chat(
    run: PastRun, student_alone: bool, prompt: str | None, temperature: float, max_new_tokens: int | None, seed: int
) -> None:
    """Answer one prompt, or prompts until the user ends it.

    Args:
        run: Run whose models answer.
        student_alone: Whether the student alone answers.
        prompt: Prompt of a script, whose answers go to stdout; None: ask for prompts.
        temperature: Temperature of sampling; 0: greedy.
        max_new_tokens: Limit of an answer; None: the one of the run's evaluation.
        seed: Seed of sampled answers.

    Raises:
        UserError: The run is not finished, a model is gone, or a prompt cannot be answered.
    """
    names = [STUDENT] if student_alone else list(LABELS)
    speakers = list(load_speakers(run, names, temperature, max_new_tokens))
    drawn = seed if temperature > 0 else None
    if prompt is not None:
        _answer_script(speakers, prompt, drawn)
        return
    console.print("Write a prompt; an empty line or Ctrl-D ends. Each prompt is answered without the ones before.")
    while text := _asked():
        try:
            _show(speakers, text, drawn)
        except UserError as error:  # this prompt alone
            console.print(f"[bold red]error:[/] {escape(str(error))}")


def _asked() -> str:
    try:
        return console.input("[bold]prompt>[/] ").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return ""


def _tell_cut(speakers: Sequence[Speaker], text: str) -> None:
    """Say on stderr that the models do not read the whole prompt, if they do not."""
    lost = max(speaker.num_lost(text) for speaker in speakers)
    if lost:
        most = speakers[0].data.max_prompt_tokens
        console.print(
            f"[yellow]note:[/] the first {lost:,} tokens of the prompt are not read: the run's models read at most "
            f"{most:,} (data.max_prompt_tokens)"
        )


def _answer_script(speakers: Sequence[Speaker], prompt: str, seed: int | None) -> None:
    """Print the answers to stdout; one of a student alone is streamed, without its name."""
    _tell_cut(speakers, prompt)
    for speaker in speakers:
        if len(speakers) > 1:
            print(f"[{LABELS[speaker.name]}]")
        shown = ""

        def stream(text: str) -> None:
            nonlocal shown
            if text.startswith(shown) and not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character
                sys.stdout.write(text[len(shown) :])
                sys.stdout.flush()
                shown = text

        answer = speaker.answer(prompt, seed, stream)
        print(answer[len(shown) :] if answer.startswith(shown) else f"\n{answer}")


def _show(speakers: Sequence[Speaker], text: str, seed: int | None) -> None:
    """Show the answers in panels while they are written."""
    _tell_cut(speakers, text)
    answers = dict.fromkeys((speaker.name for speaker in speakers), "")
    with Live(panels(answers, console), console=console, refresh_per_second=12) as live:
        for speaker in speakers:

            def update(so_far: str, name: str = speaker.name) -> None:
                answers[name] = so_far
                live.update(panels(answers, console))

            update(speaker.answer(text, seed, update))


def panels(answers: Mapping[str, str], shown_on: Console) -> Columns:
    """Return the answers as panels; text of a model is shown as it is, without markup."""
    width = shown_on.width // len(answers) - 1
    width = width if width >= NARROWEST else shown_on.width
    boxes = [
        Panel(Text(answer), title=LABELS[name], border_style=COLOURS[name], width=width)
        for name, answer in answers.items()
    ]
    return Columns(boxes)
