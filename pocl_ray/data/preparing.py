"""All rows of a run: tokenizer, training, dev and test sets, and what was left out."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pocl_ray.config import DataConfig, SourceConfig
from pocl_ray.data.examples import read_examples
from pocl_ray.data.prompts import Example, PromptTemplate
from pocl_ray.data.readers import Reject
from pocl_ray.data.row_store import RowStore, shared_prompts
from pocl_ray.data.rows import default_split, hold_out, named_errors, prepare_rows, write_rejects
from pocl_ray.data.sources import read_source, source_fingerprint
from pocl_ray.records import RowsSummary
from pocl_ray.storage import RunDirectory

SUMMARY, REJECTS = "rows/summary.json", "rejects.jsonl"


@dataclass(frozen=True)
class Rows:
    """The sets of a run.

    Attributes:
        train: Rows that are scored and trained on.
        dev: Rows of the dev figures.
        tests: Evaluation sets by name; the dev set where none is given.
        leaks: Prompts of each other set that stand in train as well.
    """

    train: RowsSummary
    dev: RowsSummary
    tests: dict[str, RowsSummary]
    leaks: dict[str, int]

    def __iter__(self) -> Iterator[RowsSummary]:
        """All sets, each once."""
        yield self.train
        yield self.dev
        yield from (made for made in self.tests.values() if made.name != "dev")


def data_fingerprint(config: DataConfig) -> list[object]:
    """Return what the rows depend on: the sources' content, and how rows are read and cut."""
    sources = {name: source_fingerprint(source, default_split(name)) for name, source in _sources(config)}
    others = {"train", "dev", "tests", "max_reject_share", "responses"}
    return [sources, config.model_dump(mode="json", exclude=others)]


def training_texts(config: DataConfig) -> Iterator[str]:
    """Yield prompts and responses of the training rows, to train a tokenizer on.

    Raises:
        ConfigError: The chat template is asked for, which a tokenizer to be trained cannot have.
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
) -> Rows:
    """Write the rows of every set, `rejects.jsonl` and a summary into the run directory.

    Args:
        config: Sources, template and lengths.
        tokenizer: The run's.
        seed: Draws the rows that are held out.
        run_dir: Where they go.
        numbers: Numeric columns of the training rows that are carried along, as difficulty signals.

    Raises:
        DataError: A source is missing or unusable, or too many of its rows are.
    """
    rejects: list[Reject] = []
    made: dict[str, RowsSummary] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, source in _sources(config):
            own = numbers if name == "train" else ()
            made[name], left_out = prepare_rows(name, source, config, tokenizer, folder / f"{name}.arrow", own)
            rejects.extend(left_out)
        if config.dev is None:
            train, dev = folder / "train.arrow", folder / "dev.arrow"
            num_rejected = made["train"].num_rejected
            made["train"], made["dev"] = hold_out(train, config.holdout_rows, seed, train, dev, num_rejected)
        train_store = RowStore.open(folder / "train.arrow")
        others = [name for name in made if name != "train"]
        leaks = {n: shared_prompts(train_store, RowStore.open(folder / f"{n}.arrow")) for n in others}
        for name in made:
            run_dir.publish(folder / f"{name}.arrow", f"rows/{name}.arrow")
        write_rejects(rejects, folder / REJECTS)
        run_dir.publish(folder / REJECTS, REJECTS)
    run_dir.write_json(SUMMARY, {"sets": {name: asdict(s) for name, s in made.items()}, "leaks": leaks})
    return read_summary(run_dir)


def read_summary(run_dir: RunDirectory) -> Rows:
    """Return the sets that `prepare_all` wrote."""
    content = run_dir.read_json(SUMMARY)
    sets = {name: RowsSummary(**fields) for name, fields in content["sets"].items()}
    tests = {name: made for name, made in sets.items() if name not in ("train", "dev")}
    return Rows(sets["train"], sets["dev"], tests or {"dev": sets["dev"]}, content["leaks"])


def count_rows(config: DataConfig) -> int:
    """Return the readable training rows of the source, without a tokenizer; a few may turn out unusable later."""
    total = sum(1 for row in read_source(config.train, default_split("train")) if not isinstance(row, Reject))
    return total - config.holdout_rows


def _sources(config: DataConfig) -> list[tuple[str, SourceConfig]]:
    named = [("train", config.train)]
    if config.dev is not None:
        named.append(("dev", config.dev))
    return named + list(config.tests.items())
