"""The findings of `pocl-ray init`, as a table of decisions and as the text of a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pocl_ray.advice.choices import Machine, TokenLimits, Training, choose_cache
from pocl_ray.advice.config_text import ConfigText
from pocl_ray.advice.first_rows import CHARS_PER_TOKEN, Lengths, Meaning
from pocl_ray.advice.model_shape import ModelShape, describe
from pocl_ray.config import SourceConfig, StudentConfig, TeacherConfig


@dataclass(frozen=True)
class Models:
    """The two models.

    Attributes:
        teacher: Section of the teacher.
        student: Section of the student.
        shapes: Shapes of teacher and student; None for one that could not be looked at.
        tokenizers: Tokenizers of teacher and student; None for one that is not at hand, or that the student lacks.
        bridged: Whether the two have different tokenizers.
    """

    teacher: TeacherConfig
    student: StudentConfig
    shapes: tuple[ModelShape | None, ModelShape | None]
    tokenizers: tuple[Any, Any]
    bridged: bool


@dataclass(frozen=True)
class Findings:
    """Everything that a new config is made of.

    Attributes:
        name: Name of the run.
        models: Teacher and student.
        train: Source of the training rows, with the mapping of columns.
        dev: Source of the dev rows; None: they are held out of train.
        meaning: Meaning of the training rows' columns.
        template: Prompt template, and the reason for it.
        lengths: Lengths of the first rows.
        num_looked: Number of rows that were looked at.
        num_rows: Number of training rows before any are held out.
        holdout_rows: Rows that become the dev set; 0 if there is one.
        machine: Machine that the config is for.
        tokens: Limits of lengths.
        training: Settings of training.
    """

    name: str
    models: Models
    train: SourceConfig
    dev: SourceConfig | None
    meaning: Meaning
    template: tuple[str, str]
    lengths: Lengths
    num_looked: int
    num_rows: int
    holdout_rows: int
    machine: Machine
    tokens: TokenLimits
    training: Training

    @property
    def cache_bytes(self) -> float | None:
        """Estimated bytes of the teacher's hidden states for all rows; None if the teacher is not known."""
        teacher = self.models.shapes[0]
        if teacher is None:
            return None
        width = 4 if self.machine.target == "laptop" else 2
        return float(self.lengths.responses.mean()) * self.num_rows * teacher.width * width


def decisions(found: Findings) -> list[tuple[str, str, str]]:
    """Return what was decided: name, choice and reason of each decision."""
    lengths, tokens, training, memory = found.lengths, found.tokens, found.training, found.training.memory
    columns = ", ".join(
        f"{role}={column}" for role, column in found.meaning.roles.items() if column in found.meaning.found
    )
    whole = lengths.prompts + lengths.responses
    counted = "" if lengths.is_counted else f", estimated by {CHARS_PER_TOKEN:g} characters a token"
    teacher, student = (describe(shape) for shape in found.models.shapes)
    cut = (
        f"{found.models.student.num_layers} of the teacher's layers: "
        if found.models.student.num_layers is not None
        else ""
    )
    rows = f"{found.num_rows:,} rows; dev: " + ("its own file" if found.dev else f"{found.holdout_rows} rows held out")
    cache, why_cache = choose_cache(found.machine, found.cache_bytes)
    return [
        ("rows", f"{found.meaning.task}: {columns}", rows),
        ("teacher", str(found.models.teacher.path), teacher),
        ("student", str(found.models.student.path or found.models.student.num_layers), cut + student),
        (
            "tokenizer",
            "two, bridged by uld" if found.models.bridged else "one",
            "the vocabularies differ" if found.models.bridged else "",
        ),
        ("template", "none" if found.meaning.task == "text" else found.template[0], found.template[1]),
        (
            "max_tokens",
            f"{tokens.max_tokens} (prompt {tokens.max_prompt_tokens})",
            f"median {int(sorted(whole)[len(whole) // 2])}, longest {int(whole.max())} of {found.num_looked} rows"
            f"{counted}; {tokens.cut_share:.1%} are cut",
        ),
        ("machine", found.machine.target, _machine_text(found.machine)),
        (
            "batch",
            f"{training.global_batch_rows} rows, {memory.micro_batch_rows} at once",
            f"{found.num_rows:,} rows; {training.why_memory}",
        ),
        ("zero_stage", str(memory.zero_stage), _why_zero(memory.zero_stage, memory.num_workers)),
        ("steps", f"{training.num_steps:,}", f"about {training.num_passes:.1f} passes over the rows"),
        ("learning_rate", f"{training.learning_rate:g}", "by the student's size; a starting point for `pocl-ray tune`"),
        ("teacher_cache", cache, why_cache),
    ]


def _machine_text(machine: Machine) -> str:
    if machine.target == "laptop":
        return f"{machine.num_cpus} CPU cores, {machine.memory_gib:.0f} GiB of memory"
    assumed = "" if machine.is_seen else ", assumed: say otherwise with --gpus and --gpu-gib"
    return f"{machine.num_workers} GPU(s) of {machine.memory_gib:.0f} GiB{assumed}"


def _why_zero(stage: int, workers: int) -> str:
    if workers == 1:
        return "one worker has nothing to split"
    return {1: "splits the optimizer's state", 2: "splits gradients as well", 3: "splits the weights as well"}[stage]


def render(found: Findings) -> str:
    """Return the config as text."""
    text = ConfigText()
    text.note(
        f"Written by `pocl-ray init` for {found.machine.target}. docs/config.md explains every key; one that is left",
        "out has its default. `pocl-ray plan` shows the stages, `pocl-ray run --dry-run` what a run would cost.",
    )
    text.key("name", found.name, "the run's directory under storage_path")
    text.key("storage_path", "runs", _why_storage(found.machine))
    text.note()
    _data(text, found)
    _models(text, found)
    _method(text, found)
    _training(text, found)
    _evaluation(text, found)
    return str(text)


def _why_storage(machine: Machine) -> str:
    return "every node must reach it: s3://, gs:// or a shared disk" if machine.target == "cluster" else "here"


def _source(source: SourceConfig) -> dict[str, Any]:
    return source.model_dump(mode="json", exclude_defaults=True)


def _data(text: ConfigText, found: Findings) -> None:
    is_text, tokens = found.meaning.task == "text", found.tokens
    cut = f"{tokens.cut_share:.1%} of the first {found.num_looked} rows are cut"
    holdout = (found.holdout_rows, "drawn from train by seed, as no dev set is given") if found.dev is None else None
    text.section(
        "data",
        {
            "task": (found.meaning.task, f"columns found: {', '.join(found.meaning.found)}"),
            "train": (_source(found.train), f"{found.num_rows:,} rows"),
            "dev": None if found.dev is None else _source(found.dev),
            "holdout_rows": holdout,
            "prompt_template": None if is_text else found.template,
            "max_prompt_tokens": None if is_text else tokens.max_prompt_tokens,
            "max_tokens": (tokens.max_tokens, "longer texts go on in the next row" if is_text else cut),
        },
    )
    text.note()


def _models(text: ConfigText, found: Findings) -> None:
    dtype = _dtype(found)
    teacher: dict[str, Any] = {"path": (found.models.teacher.path, describe(found.models.shapes[0])), "dtype": dtype}
    if found.models.bridged:
        teacher["cross_tokenizer"] = ("uld", "the two tokenizers differ")
    text.section("teacher", teacher)
    text.note()
    why = describe(found.models.shapes[1])
    student: dict[str, Any] = {"path": (found.models.student.path, why)} if found.models.student.path else {}
    if found.models.student.num_layers is not None:
        student["num_layers"] = (found.models.student.num_layers, f"cut from the teacher: {why}")
    student["dtype"] = dtype
    if found.training.memory.gradient_checkpointing:
        student["gradient_checkpointing"] = (True, "less memory, about a third more time")
    text.section("student", student)
    text.note()


def _dtype(found: Findings) -> str:
    return {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[found.training.memory.precision]


def _method(text: ConfigText, found: Findings) -> None:
    training = found.training
    steps = (training.num_steps, f"about {training.num_passes:.1f} passes over the rows; fewer for a first try")
    if found.models.bridged:
        text.note(
            "Over two tokenizers the loss compares sorted probabilities, and cross-entropy says which token is right."
        )
        text.section(
            "curriculum",
            {
                "pacing": ("none", "frontier pacing needs one tokenizer"),
                "num_steps": steps,
                "kd_temperature": 1.0,
                "kd_ratio": (0.6, "the paper's weight"),
            },
        )
        text.section("difficulty", {"signals": ["ce_loss"]})
        text.section("distill", {"loss": "uld"})
        text.note()
        return
    text.note(
        "Rows with a larger KL from the teacher are drawn more often, and the temperature rises by step: the best",
        "of the curricula in docs/experiments.md. POCL as published is configs/paper/gpt2-dolly.yaml.",
    )
    text.section(
        "curriculum",
        {
            "pacing": "frontier",
            "num_steps": steps,
            "kd_temperature": {"start": 1.0, "end": 2.0, "by": "step"},
            "kd_ratio": (1.0, "distillation alone; lower adds cross-entropy with the responses"),
            "hand_off": "last",
        },
    )
    kind, why = choose_cache(found.machine, found.cache_bytes)
    text.section("distill", {"loss": ("forward_kl", "others: docs/methods.md"), "teacher_cache": (kind, why)})
    text.note()
    text.note("control: {seeds: [1, 2, 3]}   # plain distillation in pairs, for an interval; seven times the training")
    text.note()


def _training(text: ConfigText, found: Findings) -> None:
    training, memory, machine = found.training, found.training.memory, found.machine
    workers, is_laptop = machine.num_workers, machine.target == "laptop"
    text.section(
        "train",
        {
            "global_batch_rows": (training.global_batch_rows, "rows of an optimizer step, over all workers"),
            "micro_batch_rows": (memory.micro_batch_rows, training.why_memory),
            "learning_rate": (training.learning_rate, "by the student's size; `pocl-ray tune` searches it"),
            "lr_schedule": ("wsd", "constant, and falls over the last 40 % of the steps"),
            "warmup_ratio": 0.04,
            "precision": (memory.precision, "bfloat16 is slow on most CPUs" if is_laptop else ""),
            "zero_stage": (memory.zero_stage, _why_zero(memory.zero_stage, workers)),
            "offload_optimizer": ("cpu", "its state does not fit the GPU") if memory.offload else None,
        },
    )
    text.note()
    cpus = min(8, max(1, machine.num_cpus // workers))
    scaling: dict[str, Any] = {
        "num_workers": (workers, "one for all cores" if is_laptop else "one for each GPU"),
        "cpus_per_worker": machine.num_cpus if is_laptop else cpus if machine.target == "gpu" else 4,
        "evaluation_actors": min(2, machine.num_cpus) if is_laptop else workers,
    }
    if not is_laptop:
        scaling["use_gpu"] = True
    if machine.target == "cluster":
        scaling["student_actors"] = max(1, workers // 4)
        scaling["teacher_actors"] = max(1, workers - workers // 4)
        scaling["max_failures"] = 10
        scaling["start_timeout_s"] = (600.0, "an autoscaling cluster needs minutes to grow")
    text.section("scaling", scaling)
    text.note()


def _evaluation(text: ConfigText, found: Findings) -> None:
    if found.meaning.task == "text":
        text.note("Plain text has no prompts to answer: the evaluation is each model's perplexity on the dev rows.")
        return
    is_laptop, tokens = found.machine.target == "laptop", found.tokens
    text.note("On the dev rows, as no test set is given; data.tests takes any number of them.")
    text.section(
        "evaluation",
        {
            "seeds": ([10, 20] if is_laptop else [10, 20, 30, 40, 50], "sampled answers, and greedy ones as well"),
            "generation": ({"max_new_tokens": tokens.max_new_tokens}, "99 % of the responses are no longer"),
            "dev_generation": {"max_new_tokens": tokens.max_new_tokens},
            "max_dev_rows": (64 if is_laptop else 256, "rows of the dev figure during training"),
        },
    )
