"""Config of the inputs: rows, tokenizer, models and difficulty signals."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from pocl_ray.config.base import Section
from pocl_ray.config.training import SftConfig
from pocl_ray.records import COLUMN

ModuleName = Annotated[str, StringConstraints(min_length=1)]


class LoraConfig(Section):
    """Low-rank adapters (LoRA, arXiv 2106.09685): only the adapters are trained."""

    rank: int = Field(default=16, ge=1, description="rank of each adapter's two matrices")
    alpha: float = Field(default=32.0, gt=0, description="an adapter's output is multiplied by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout of an adapter's input, during training")
    target_modules: tuple[ModuleName, ...] | None = Field(
        default=None,
        description="linear layers that get an adapter, by their name or its end: [q_proj, v_proj]; "
        "null: all but the LM head",
    )
    target_parameters: tuple[ModuleName, ...] | None = Field(
        default=None,
        description="weights that are no layer of their own and get an adapter, as fused experts are, by their name or "
        "its end: [experts.gate_up_proj, experts.down_proj]; null: all fused experts, unless target_modules is given",
    )
    merge: bool = Field(
        default=True,
        description="write the adapters, and next to them a plain model with the adapters merged; false: the adapters "
        "alone",
    )

    @model_validator(mode="after")
    def _check_targets(self) -> LoraConfig:
        if self.target_modules == () and not self.target_parameters:
            raise ValueError("target_modules is [], and target_parameters names nothing either; name what is adapted")
        return self


FIXED_SIGNALS = ("teacher_ce_loss", "teacher_entropy", "num_prompt_tokens", "num_response_tokens")
MeasuredSignal = Literal[
    "rouge_l", "ce_loss", "student_confidence", "teacher_ce_loss", "teacher_entropy", "teacher_student_kl"
]
"""The signals that a pass of a model measures."""
SIGNAL_ALIASES = {"response_tokens": "num_response_tokens", "prompt_tokens": "num_prompt_tokens"}

ColumnRole = Literal[
    "prompt", "instruction", "input", "output", "messages", "document", "summary", "text", "system", "topic"
]
Task = Literal["instruction", "summarization", "text"]


class SourceConfig(Section):
    """A source of rows, and the meaning of its columns."""

    path: str = Field(
        description="file, glob, saved `datasets` directory, Hub id, s3:// URL, or samples://instructions"
    )
    format: Literal["auto", "jsonl", "parquet", "csv", "dataset", "hub", "samples"] = Field(
        default="auto", description="auto: known by the path's ending"
    )
    split: str | None = Field(default=None, description="split of a Hub data set, a DatasetDict or the samples")
    subset: str | None = Field(default=None, description="configuration name of a Hub data set")
    revision: str | None = Field(default=None, description="commit of a Hub data set")
    columns: dict[ColumnRole, str] = Field(
        default_factory=dict,
        description="role -> column of the file; a role that is not given is looked up under its own name",
    )
    max_rows: int | None = Field(default=None, ge=1, description="use only the first rows")


class DataConfig(Section):
    """Rows for training, development and test, and how they become prompts and tokens."""

    train: SourceConfig
    dev: SourceConfig | None = Field(
        default=None, description="dev set; without it, `holdout_rows` are taken from train"
    )
    holdout_rows: int = Field(default=0, ge=0, description="rows drawn from train (by seed) as dev set")
    tests: dict[str, SourceConfig] = Field(default_factory=dict, description="name -> evaluation set; dev if none")
    responses: Literal["reference", "teacher"] = Field(
        default="reference",
        description="responses that the student is scored and trained on: the rows' own (reference), or those that "
        "the teacher writes to their prompts (SeqKD); dev and tests keep their own",
    )
    task: Task = Field(
        default="instruction",
        description="kind of rows: instruction (and chats), summarization (a document and its summary), or text, "
        "which has no prompt and of which every token but the first is learnt",
    )
    prompt_template: str = Field(
        default="alpaca",
        description="alpaca (the papers' text), chat (the tokenizer's chat template), plain (the prompt alone), "
        "or a text of your own with {instruction} and {input}, or {document} for summaries; plain text has no prompt",
    )
    template_args: dict[str, bool | int | float | str] = Field(
        default_factory=dict,
        description="further arguments of the chat template, such as {enable_thinking: false}",
    )
    max_prompt_tokens: int = Field(
        default=256,
        ge=1,
        le=10_000_000,
        description="limit of the prompt; a longer prompt loses its beginning, a chat its oldest turns, a document to "
        "be summarised its end",
    )
    max_tokens: int = Field(
        default=512,
        ge=2,
        le=10_000_000,
        description="limit of prompt and response together; a longer response is cut, plain text goes on in the next "
        "row",
    )
    special_tokens: Literal["text", "keep"] = Field(
        default="text",
        description="special tokens written in the data, such as <|endoftext|>: text reads them as text, keep as the "
        "tokens; those of a template are tokens either way",
    )
    max_reject_share: float = Field(default=0.05, ge=0, le=1, description="share of unusable rows that stops the run")

    @model_validator(mode="after")
    def _lengths(self) -> DataConfig:
        if self.task != "summarization" and "{document}" in self.prompt_template:
            raise ValueError(f"prompt_template has {{document}}, which data.task {self.task} has not")
        if self.template_args and (self.task == "text" or self.prompt_template != "chat"):
            raise ValueError("template_args are for the tokenizer's chat template; set prompt_template: chat")
        own = {"messages", "tokenize", "add_generation_prompt", "chat_template", "continue_final_message", "tools"}
        if taken := sorted(own & {*self.template_args}):
            raise ValueError(f"template_args cannot hold {', '.join(taken)}, which the rows decide")
        if self.task != "text" and self.max_prompt_tokens >= self.max_tokens:
            raise ValueError("max_prompt_tokens must be smaller than max_tokens, or no room is left for a response")
        if self.dev is not None and self.holdout_rows:
            raise ValueError("give either dev or holdout_rows, not both")
        if self.dev is None and not self.holdout_rows:
            raise ValueError("a dev set is needed: give data.dev, or data.holdout_rows to take it from train")
        return self

    @field_validator("tests")
    @classmethod
    def _set_names(cls, tests: dict[str, SourceConfig]) -> dict[str, SourceConfig]:
        for name in tests:
            if name in ("train", "dev"):
                raise ValueError(f"a test set cannot be called {name!r}, which is a set already")
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f"set name {name!r} may hold letters, digits, '-' and '_' only")
        return tests


class TokenizerConfig(Section):
    """The tokenizer, if it is not the teacher's."""

    path: str | None = Field(default=None, min_length=1, description="directory or Hub id; default: the teacher's")
    train_vocab_size: int | None = Field(
        default=None, ge=300, description="train a byte-level BPE of this size on the training rows instead"
    )

    @model_validator(mode="after")
    def _one_source(self) -> TokenizerConfig:
        if self.path is not None and self.train_vocab_size is not None:
            raise ValueError("give either path or train_vocab_size, not both")
        return self


class ModelConfig(Section):
    """A causal language model: a Hub id or a directory of safetensors, or an architecture to initialise."""

    path: str | None = Field(
        default=None, min_length=1, description="Hub id, local directory, or samples://quickstart-teacher"
    )
    revision: str | None = Field(default=None, description="commit, tag or branch of a Hub model")
    architecture: dict[str, Any] | None = Field(
        default=None, description="model_type and sizes of a model to initialise at random"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="dtype of inference; auto: the dtype that the weights were saved in"
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    trust_remote_code: bool = Field(default=False, description="run code that comes with the model")
    sft: SftConfig | None = Field(default=None, description="supervised fine-tuning before anything else")


class GenerationConfig(Section):
    """Generation of a response."""

    sampling_temperature: float = Field(default=1.0, ge=0, description="0: greedy")
    top_p: float = Field(default=1.0, gt=0, le=1)
    no_repeat_ngram_size: int = Field(default=0, ge=0, description="0: repetition is allowed")
    max_new_tokens: int | None = Field(default=None, ge=1, description="default: data.max_tokens less the prompt")
    batch_rows: int = Field(default=64, ge=1, description="rows generated at once")


class TeacherGenerationConfig(GenerationConfig):
    """Generation of the teacher's responses: greedy, which is nearest to SeqKD's beam search."""

    sampling_temperature: float = Field(default=0.0, ge=0, description="0: greedy")


class TeacherConfig(ModelConfig):
    """The teacher: a large, frozen model."""

    weight: float = Field(
        default=1.0,
        gt=0,
        description="weight of this teacher's divergence if there are `other_teachers`; the weights of a stage are "
        "normalised to sum 1",
    )
    stages: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None,
        min_length=1,
        description="stages, from 0, that use this teacher if there are `other_teachers`; null: all",
    )
    adapter: str | None = Field(
        default=None,
        min_length=1,
        description="LoRA adapter (peft), a directory or a Hub id, that is merged into the weights",
    )
    adapter_revision: str | None = Field(default=None, description="commit, tag or branch of a Hub adapter")
    generation: TeacherGenerationConfig = Field(
        default=TeacherGenerationConfig(),
        description="generation of the teacher's responses, for data.responses: teacher",
    )
    cross_tokenizer: Literal["uld"] | None = Field(
        default=None,
        description="uld: the teacher keeps its own tokenizer, the run uses the student's, and the loss compares "
        "sorted probabilities (distill.loss uld); null: both use one tokenizer",
    )
    quantization: Literal["none", "int8"] = Field(
        default="none", description="int8: linear layers in 8 bit, by bitsandbytes (extra `int8`)"
    )
    sharded: bool = Field(
        default=False,
        description="split the live teacher over the training workers (ZeRO-3); scoring and evaluation load it whole "
        "if they need it",
    )

    @model_validator(mode="after")
    def _one_source(self) -> TeacherConfig:
        if (self.path is None) == (self.architecture is None):
            raise ValueError("give exactly one of path and architecture")
        if self.adapter is not None and self.path is None:
            raise ValueError("an adapter belongs to the weights that it was trained on: give their path as well")
        if self.adapter_revision is not None and self.adapter is None:
            raise ValueError("adapter_revision says nothing without adapter")
        if self.quantization != "none" and (self.path is None or self.sft is not None or self.adapter is not None):
            raise ValueError("quantization takes a ready-made teacher: give path, and neither sft nor adapter")
        if self.quantization != "none" and self.sharded:
            raise ValueError("quantization and sharded cannot both be: ZeRO-3 does not split 8-bit weights")
        if self.adapter is not None and self.sharded:
            raise ValueError("a sharded teacher is never whole to be merged: merge the adapter into a directory first")
        if self.architecture is not None and self.sft is None:
            raise ValueError("a teacher made from an architecture knows nothing yet: give teacher.sft as well")
        return self

    def stages_of(self, num_stages: int) -> tuple[int, ...] | None:
        """Return the stages that use this teacher; None for all, as in a plan of one stage (the control)."""
        return None if num_stages == 1 else self.stages


class OtherTeacherConfig(TeacherConfig):
    """A further teacher: frozen, ready-made, with the same tokenizer, and used for the loss alone."""

    @model_validator(mode="after")
    def _ready_made(self) -> OtherTeacherConfig:
        if self.path is None or self.sft is not None:
            raise ValueError(
                "a further teacher is ready-made: give path; only `teacher` can be made or fine-tuned here"
            )
        return self


class StudentConfig(ModelConfig):
    """The student, which is trained: a checkpoint, an architecture, or some layers of the teacher."""

    num_layers: int | None = Field(default=None, ge=1, description="cut from the teacher: evenly spaced layers")
    seed: int | None = Field(
        default=None, ge=0, description="of the weights of an architecture and of fine-tuning; null: the run's seed"
    )
    gradient_checkpointing: bool = Field(default=False, description="less memory, about a third more time")
    lora: LoraConfig | None = Field(
        default=None, description="train low-rank adapters in place of the weights; {}: with the default values below"
    )

    @model_validator(mode="after")
    def _one_source(self) -> StudentConfig:
        if sum(x is not None for x in (self.path, self.architecture, self.num_layers)) != 1:
            raise ValueError("give exactly one of path, architecture and num_layers (layers cut from the teacher)")
        if self.lora is not None and self.architecture is not None:
            raise ValueError(
                "lora adapts weights that know something, and those of a new architecture do not; remove it"
            )
        return self


class ScoringGenerationConfig(GenerationConfig):
    """Generation of the student's answers while difficulty is scored: nearly greedy, as in the authors' code."""

    sampling_temperature: float = Field(default=0.01, ge=0, description="0: greedy")
    no_repeat_ngram_size: int = Field(default=6, ge=0, description="0: repetition is allowed")


class DifficultyConfig(Section):
    """Signals that measure how hard a row is, and how they are fused (POCL, section 3.2)."""

    signals: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={"rouge_l": 1.0, "ce_loss": 1.0},
        min_length=1,
        description="signal -> weight, in fusion order, or a list of them; `column:NAME` is a column of the rows",
    )
    columns: dict[str, Literal["high", "low"]] = Field(
        default_factory=dict,
        description="NAME of each `column:NAME` -> whether its high or its low values mean an easy row",
    )
    rrf_k: float = Field(default=60.0, ge=0, description="constant of reciprocal rank fusion")
    tie_break: Literal["file_order", "seeded"] = Field(
        default="file_order", description="order of equally hard rows: the file's (the authors'), or drawn by seed"
    )
    rescore: Literal["never", "each_stage"] = Field(
        default="never",
        description="each_stage: before each stage that takes a part of the rows, the current student scores the rows "
        "again, and they are ranked again; the teacher's signals are kept",
    )
    also_measure: tuple[MeasuredSignal, ...] = Field(
        default=(),
        description="signals to measure besides those that rank the rows, for the report or for a later ranking; those "
        "that cost no further pass of a model are measured anyway",
    )
    generation: ScoringGenerationConfig = ScoringGenerationConfig()
    batch_tokens: int = Field(default=8192, ge=1, description="padded tokens of a forward pass")
    shard_rows: int = Field(
        default=512, ge=1, description="rows of a scoring task, and of a shard of the teacher cache"
    )

    @field_validator("signals", mode="before")
    @classmethod
    def _weighted(cls, signals: Any) -> Any:
        if isinstance(signals, (list, tuple)):
            if len(set(map(str, signals))) != len(signals):
                raise ValueError("a signal stands twice in the list; give it a weight instead")
            signals = dict.fromkeys(signals, 1.0)
        if not isinstance(signals, dict):
            return signals
        if not all(isinstance(name, str) for name in signals):
            raise ValueError("names of signals are text")
        named = {SIGNAL_ALIASES.get(name, name): weight for name, weight in signals.items()}
        if len(named) != len(signals):
            raise ValueError("a signal stands twice, once under another name")
        return named

    @model_validator(mode="after")
    def _learns(self) -> DifficultyConfig:
        fixed = [name for name in self.signals if name in FIXED_SIGNALS or name.startswith(COLUMN)]
        if self.rescore != "never" and len(fixed) == len(self.signals):
            raise ValueError(
                f"rescore each_stage: {', '.join(fixed)} never change while the student learns; set rescore to never, "
                "or add a signal of the student such as ce_loss"
            )
        return self

    @model_validator(mode="after")
    def _directions(self) -> DifficultyConfig:
        used = {name.removeprefix(COLUMN) for name in self.signals if name.startswith(COLUMN)}
        for name in sorted(used ^ set(self.columns)):
            if name in used:
                raise ValueError(f"{COLUMN}{name} needs columns.{name}: high or low, the values that mean an easy row")
            raise ValueError(f"columns.{name} is not among the signals; add {COLUMN}{name} to signals, or remove it")
        return self
