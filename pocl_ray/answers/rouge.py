"""ROUGE-L and exact match of answers against references, on a scale of 0 to 100.

ROUGE-L is the F1 of the `rouge_score` package with stemming, the maximum over a row's references (POCL, section 4.1);
`words` says what the words of other scripts are. Exact match compares after lower-casing, dropping punctuation and
folding white space.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import regex
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl_ray.answers.decode import GenerationSettings, generate
from pocl_ray.answers.segmentation import comparable, words
from pocl_ray.config import GenerationConfig
from pocl_ray.data.row_store import RowStore
from pocl_ray.errors import DataError

_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PUNCTUATION = regex.compile(r"\p{P}")
_DECIMALS = 6


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Return the ROUGE-L F1 of an answer, 0 to 100: the maximum over its references.

    Args:
        prediction: The answer; an empty one scores 0.
        references: Acceptable answers, at least one.
    """
    _check_references(references)
    return 100.0 * _scorer().score_multi(references, prediction)["rougeL"].fmeasure


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Return 100 if an answer equals one of its references but for case, punctuation and white space, else 0.

    Args:
        prediction: The answer.
        references: Acceptable answers, at least one.
    """
    _check_references(references)
    normal = _normalize(prediction)
    return 100.0 if any(_normalize(reference) == normal for reference in references) else 0.0


def rouge_l_batch(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return `rouge_l` of each answer; both sequences are of shape (num_rows,)."""
    return [rouge_l(*pair) for pair in zip(predictions, references, strict=True)]


def exact_match_batch(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return `exact_match` of each answer; both sequences are of shape (num_rows,)."""
    return [exact_match(*pair) for pair in zip(predictions, references, strict=True)]


def score_files(predictions: Path, references: Path) -> dict[str, float | int]:
    """Score the answers of one JSONL file against the references of another, line by line.

    Args:
        predictions: Lines with `text` or `prediction`, a string.
        references: Lines with `output`, a string or a list of strings.

    Returns:
        `rouge_l` and `exact_match`, means over the rows from 0 to 100, and `num_rows`.

    Raises:
        DataError: A file is missing, empty or of another length than the other one, a line is no JSON object, or its
            field is missing or of the wrong type.
    """
    answers = _read_lines(Path(predictions), _prediction_of)
    accepted = _read_lines(Path(references), _references_of)
    if len(answers) != len(accepted):
        raise DataError(
            f"{predictions} has {len(answers)} lines, but {references} has {len(accepted)}: "
            "they must correspond line by line"
        )
    num_rows = len(answers)
    return {
        "rouge_l": round(sum(rouge_l_batch(answers, accepted)) / num_rows, _DECIMALS),
        "exact_match": round(sum(exact_match_batch(answers, accepted)) / num_rows, _DECIMALS),
        "num_rows": num_rows,
    }


class _AnyScript:
    """A tokenizer of `rouge_score` that knows words of every script."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


@lru_cache(maxsize=1)
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # half a second of nltk, which `plan` and `--help` need not pay

    return RougeScorer(["rougeL"], tokenizer=_AnyScript())


def _normalize(text: str) -> str:
    text = text.lower() if text.isascii() else _PUNCTUATION.sub("", comparable(text))
    return " ".join(text.translate(_DROP_PUNCTUATION).split())


def _check_references(references: Sequence[str]) -> None:
    if isinstance(references, str) or not references:
        raise ValueError("references is a non-empty sequence of strings, one for each acceptable answer")


def _read_lines(path: Path, field_of: Callable[[dict[str, Any], str], Any]) -> list[Any]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    # Only "\n" ends a line: str.splitlines would also cut at U+2028, which JSON strings may hold.
    lines = content.removeprefix(b"\xef\xbb\xbf").rstrip().split(b"\n")
    if lines == [b""]:
        raise DataError(f"{path}: holds no rows")
    return [field_of(_parse(line, f"{path}:{number}"), f"{path}:{number}") for number, line in enumerate(lines, 1)]


def _parse(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except ValueError as error:  # broken UTF-8, or not JSON
        raise DataError(f"{place}: not a line of JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f"{place}: each line is a JSON object, not {type(row).__name__}")
    return row


def _prediction_of(row: dict[str, Any], place: str) -> str:
    for name in ("text", "prediction"):
        if name in row:
            if not isinstance(row[name], str):
                raise DataError(f"{place}: {name} is a string, not {type(row[name]).__name__}")
            return row[name]
    raise DataError(f"{place}: has neither text nor prediction; its fields: {_names(row)}")


def _references_of(row: dict[str, Any], place: str) -> list[str]:
    if "output" not in row:
        raise DataError(f"{place}: has no output; its fields: {_names(row)}")
    output = row["output"]
    accepted = [output] if isinstance(output, str) else output
    if not isinstance(accepted, list) or not accepted or not all(isinstance(item, str) for item in accepted):
        raise DataError(f"{place}: output is a string or a non-empty list of strings")
    return accepted


def _names(row: dict[str, Any]) -> str:
    return ", ".join(map(str, row)) or "none"


def score_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: RowStore,
    ids: Sequence[int] | np.ndarray[Any, np.dtype[np.int64]],
    generation: GenerationConfig,
    max_tokens: int,
    seed: int,
) -> list[tuple[float, bool]]:
    """Return the ROUGE-L of a model's answers to the prompts of a task.

    Args:
        model: Student, on the device to use.
        tokenizer: Tokenizer of the run.
        rows: Store of all rows.
        ids: Row ids of the task; a row's answer is drawn by (seed, id) alone.
        generation: Settings of generation.
        max_tokens: Maximum tokens of prompt and answer together (`data.max_tokens`).
        seed: Seed of the sampling.

    Returns:
        For each row the best ROUGE-L over its references, 0 to 100, and whether the answer is complete.
    """
    prompts, _ = rows.tokens(ids)
    settings = GenerationSettings.of(generation, max_tokens, prompts)
    (answers,) = generate(model, tokenizer, prompts, settings, [seed], [int(row) for row in ids])
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    stopped = [len(answer) < limit for answer, limit in zip(answers, settings.limits(len(ids)), strict=True)]
    return list(zip(rouge_l_batch(texts, rows.references(ids)), stopped, strict=True))
