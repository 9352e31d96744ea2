"""Preparation of all rows of a run: training, dev and test sets, and the rejects."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pocl_ray.config import DataConfig, SourceConfig
from pocl_ray.data.prompts import Example, PromptTemplate, read_examples
from pocl_ray.data.readers import Reject
from pocl_ray.data.row_counts import COUNTS
from pocl_ray.data.row_store import RowStore, pairing_figures, shared_prompts
from pocl_ray.data.rows import TeacherTokens, hold_out, named_errors, prepare_rows, summarize_rows, write_rejects
from pocl_ray.data.sources import default_split, source_fingerprint
from pocl_ray.records import RowsSummary
from pocl_ray.run_directory.storage import RunDirectory

SUMMARY, REJECTS = "rows/summary.json", "rejects.jsonl"
# Keys that older versions did not have. With their defaults a run directory of such a version stays the same run.
_ADDED_LATER: dict[str, object] = {"special_tokens": "text", "template_args": {}}
FOR_TEACHER = "for_teacher"
"""The folder in the rows' folder, and key of the summary, of the rows in the teacher's own tokens."""

PAIRING = "pairing"
"""The key of the summary of paired tokens."""


@dataclass(frozen=True)
class Rows:
    """The sets of a run.

    Attributes:
        train: Rows for scoring and training.
        dev: Rows for the dev figures.
        tests: Evaluation sets by name; the dev set if none is given.
        leaks: Number of prompts of each other set that are also in train.
        for_teacher: Mapping of each set to the same rows, by id, in the teacher's own tokens; empty if both models
            share a tokenizer.
    """

    train: RowsSummary
    dev: RowsSummary
    tests: dict[str, RowsSummary]
    leaks: dict[str, int]
    for_teacher: dict[str, RowsSummary] = field(default_factory=dict)

    def __iter__(self) -> Iterator[RowsSummary]:
        """Yield all sets, each once."""
        yield self.train
        yield self.dev
        yield from (made for made in self.tests.values() if made.name != "dev")

    @property
    def as_teacher_reads(self) -> Rows:
        """Return the sets in the teacher's tokens, which are usually also the student's."""
        own = self.for_teacher
        if not own:
            return self
        return Rows(own["train"], own["dev"], {name: own[name] for name in self.tests}, self.leaks)


def data_fingerprint(config: DataConfig) -> list[object]:
    """Return everything that the rows depend on: the sources' content, and the settings for reading and cutting."""
    sources = {name: source_fingerprint(source, default_split(name)) for name, source in _sources(config)}
    others = {"train", "dev", "tests", "max_reject_share", "responses"}
    settings = config.model_dump(mode="json", exclude=others)
    for name, default in _ADDED_LATER.items():
        if settings.get(name) == default:
            del settings[name]
    return [sources, settings]


def training_texts(config: DataConfig) -> Iterator[str]:
    """Yield prompts and responses of the training rows, to train a tokenizer on.

    Raises:
        ConfigError: The config asks for a chat template, which a tokenizer that is still to be trained does not have.
    """
    template = PromptTemplate("plain" if config.task == "text" else config.prompt_template, None)
    with named_errors("train"):
        for item in read_examples(config.train, template, default_split("train"), config.task):
            if isinstance(item, Example):
                yield from filter(None, (item.prompt, item.references[0]))


def prepare_all(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    run_dir: RunDirectory,
    numbers: Sequence[str] = (),
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> Rows:
    """Write the rows of every set, `rejects.jsonl` and a summary into the run directory.

    Args:
        config: Sources, template and lengths.
        tokenizer: Tokenizer of the run.
        seed: Seed of the draw of held-out rows.
        run_dir: Run directory that receives the rows.
        numbers: Numeric columns of the training rows that serve as difficulty signals.
        teacher_tokenizer: Tokenizer of the teacher, if it has its own. All sets are then written in its tokens as well.

    Raises:
        DataError: A source is missing or unusable, or too many of its rows are unusable.
    """
    rejects: list[Reject] = []
    made: dict[str, RowsSummary] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, source in _sources(config):
            own = numbers if name == "train" else ()
            teacher = None
            if teacher_tokenizer is not None:
                teacher = TeacherTokens(teacher_tokenizer, folder / FOR_TEACHER / f"{name}.arrow")
            path = folder / f"{name}.arrow"
            made[name], left_out = prepare_rows(name, source, config, tokenizer, path, own, teacher)
            rejects.extend(left_out)
        if config.dev is None:
            counts = {name: getattr(made["train"], name) for name in COUNTS}
            train, made["dev"] = _hold_out(folder, config, seed, made["train"].num_rejected)
            made["train"] = replace(train, **counts)
        for_teacher = {} if teacher_tokenizer is None else _for_teacher(folder / FOR_TEACHER, made, config, seed)
        train_store = RowStore.open(folder / "train.arrow")
        others = [name for name in made if name != "train"]
        leaks = {n: shared_prompts(train_store, RowStore.open(folder / f"{n}.arrow")) for n in others}
        for summary in (*made.values(), *for_teacher.values()):
            run_dir.publish(folder / Path(summary.path).relative_to("rows"), summary.path)
        write_rejects(rejects, folder / REJECTS)
        run_dir.publish(folder / REJECTS, REJECTS)
    content = {"sets": {name: asdict(s) for name, s in made.items()}, "leaks": leaks}
    if for_teacher:
        content[FOR_TEACHER] = {name: asdict(s) for name, s in for_teacher.items()}
        content[PAIRING] = {name: _pairing(run_dir, made[name], for_teacher[name], config) for name in made}
    run_dir.write_json(SUMMARY, content)
    return read_summary(run_dir)


def _pairing(run_dir: RunDirectory, ours: RowsSummary, theirs: RowsSummary, config: DataConfig) -> dict[str, int]:
    student, teacher = (RowStore.open(run_dir.local(summary.path)) for summary in (ours, theirs))
    return pairing_figures(student, teacher, config.max_prompt_tokens, config.max_tokens)


def _hold_out(folder: Path, config: DataConfig, seed: int, num_rejected: int) -> tuple[RowsSummary, RowsSummary]:
    train, dev = folder / "train.arrow", folder / "dev.arrow"
    return hold_out(train, config.holdout_rows, seed, train, dev, num_rejected)


def _for_teacher(folder: Path, made: dict[str, RowsSummary], config: DataConfig, seed: int) -> dict[str, RowsSummary]:
    """The summaries of the rows in the teacher's tokens, after the same rows of train are held out here too."""
    if config.dev is None:
        _hold_out(folder, config, seed, made["train"].num_rejected)
    found = {name: summarize_rows(name, folder / f"{name}.arrow", one.num_rejected) for name, one in made.items()}
    assert all(one.num_rows == made[name].num_rows for name, one in found.items())
    return {name: replace(one, path=f"rows/{FOR_TEACHER}/{name}.arrow") for name, one in found.items()}


def read_summary(run_dir: RunDirectory) -> Rows:
    """Return the sets that `prepare_all` wrote."""
    content = run_dir.read_json(SUMMARY)
    sets, for_teacher = (
        {name: RowsSummary(**fields) for name, fields in content.get(key, {}).items()} for key in ("sets", FOR_TEACHER)
    )
    tests = {name: made for name, made in sets.items() if name not in ("train", "dev")}
    return Rows(sets["train"], sets["dev"], tests or {"dev": sets["dev"]}, content["leaks"], for_teacher)


def _sources(config: DataConfig) -> list[tuple[str, SourceConfig]]:
    named = [("train", config.train)]
    if config.dev is not None:
        named.append(("dev", config.dev))
    return named + list(config.tests.items())
