"""The models of a run that answer a prompt, with the run's own template, tokens and decoding loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl_ray.answers.decode import GenerationSettings, generate
from pocl_ray.config import DataConfig, GenerationConfig
from pocl_ray.data.columns import SUMMARIZE, Request, UnusableRowError
from pocl_ray.data.prompts import PromptTemplate
from pocl_ray.data.rows import row_tokenizer
from pocl_ray.errors import ConfigError, UserError
from pocl_ray.models.loading import load_model, load_tokenizer
from pocl_ray.models.places import on_this_node
from pocl_ray.models.prepare import references_of_run
from pocl_ray.records import STUDENT, STUDENT_BEFORE, TEACHER
from pocl_ray.run_directory.opening import PastRun

LABELS = {TEACHER: "teacher", STUDENT_BEFORE: "student before", STUDENT: "student"}
"""The models that may answer, in the order in which they are shown, with what a user calls them."""

OnText = Callable[[str], object]


@dataclass(frozen=True)
class Speaker:
    """One model that answers.

    Attributes:
        name: Name of the model in evaluation.json.
        model: Model, on its device.
        tokenizer: Tokenizer of the model.
        data: Template and lengths of the run's rows.
        generation: Settings of answers.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: DataConfig
    generation: GenerationConfig

    def answer(self, text: str, seed: int | None, on_text: OnText) -> str:
        """Return the answer to a text.

        Args:
            text: Instruction; with `data.task` summarization the document, with text the beginning of a text.
            seed: Seed of a sampled answer; None: greedy.
            on_text: Function that is called with the answer so far, a few tokens at a time.

        Raises:
            UserError: The text is empty or not UTF-8, or the tokenizer's chat template refuses it.
        """
        encoded, _ = row_tokenizer(self.data, self.tokenizer).encode([self._prompt(text)], [""])
        prompts = [np.array(tokens, dtype=np.int32) for tokens in encoded]
        if not prompts[0].size:
            raise UserError("chat: an empty prompt has no tokens; write a few words")
        settings = GenerationSettings.of(self.generation, self.data.max_tokens, prompts)
        written: list[int] = []

        def on_tokens(token_B: Tensor) -> None:
            written.append(int(token_B[0]))
            on_text(self._decoded(written))

        ((answer,),) = generate(self.model, self.tokenizer, prompts, settings, [seed], on_tokens=on_tokens)
        return self._decoded(answer)

    def num_lost(self, text: str) -> int:
        """Return how many tokens of a text's beginning the model does not read: its run cuts prompts to a length.

        Raises:
            UserError: The text is not UTF-8, or the tokenizer's chat template refuses it.
        """
        encoder = row_tokenizer(self.data, self.tokenizer)
        encoder.encode([self._prompt(text)], [""])
        return encoder.counts.num_lost_tokens

    def _prompt(self, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError:  # of bytes that the terminal's encoding does not know
            raise UserError("chat: the prompt is not UTF-8; write it in UTF-8") from None
        if self.data.task == "text":
            return text
        is_document = self.data.task == "summarization"
        instruction, document = (SUMMARIZE, text) if is_document else (text, "")
        request = Request(instruction, document, system="", history=(), references=(), topic=None)
        template = PromptTemplate(self.data.prompt_template, self.tokenizer, self.data.template_args)
        try:
            return template.render(request)
        except UnusableRowError as error:
            raise UserError(f"chat: {error}") from None

    def _decoded(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))


def load_speakers(
    run: PastRun, names: Sequence[str], temperature: float, max_new_tokens: int | None
) -> Iterator[Speaker]:
    """Load models of a run, one after the other.

    Args:
        run: Run whose student is distilled.
        names: Names of the models.
        temperature: Temperature of sampling; 0: greedy.
        max_new_tokens: Limit of an answer; None: the one of the run's evaluation.

    Raises:
        UserError: The run is not finished, or a model is not there any more.
    """
    run.require(["distill"])
    config, references = run.config, references_of_run(run.config, run.run_dir)
    changes: dict[str, object] = {"sampling_temperature": temperature}
    if max_new_tokens is not None:
        if max_new_tokens >= config.data.max_tokens:
            limit = config.data.max_tokens
            raise ConfigError(f"--max-new-tokens: the run's models read at most {limit} tokens; give fewer")
        changes["max_new_tokens"] = max_new_tokens
    generation = config.evaluation.generation.model_copy(update=changes)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in names:
        is_bridged = name == TEACHER and config.teacher.cross_tokenizer is not None
        place = "teacher_tokenizer" if is_bridged else "tokenizer"
        tokenizer = load_tokenizer(str(run.run_dir.local(place)))
        yield Speaker(name, load_model(on_this_node(references[name]), device), tokenizer, config.data, generation)
