"""The difficulty part of the report: signals by bucket, their rank correlation, topics, example rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pocl_ray.records import (
    ID,
    NUM_PROMPT_TOKENS,
    NUM_RESPONSE_TOKENS,
    PREVIOUS_RANK,
    PROMPT,
    RANK,
    REFERENCES,
    RRF_SCORE,
    TOPIC,
)
from pocl_ray.report.files import Plan

_NOT_SIGNALS = (ID, RRF_SCORE, RANK, NUM_PROMPT_TOKENS, NUM_RESPONSE_TOKENS)
_MAX_TEXT_CHARS = 1200
OTHER_TOPICS = "all other topics"
NO_TOPIC = "(no topic)"


@dataclass(frozen=True)
class Box:
    """Spread of a signal over the rows of a bucket; every value is NaN if no row has a finite one.

    Attributes:
        quantiles: Quantiles at 5, 25, 50, 75 and 95 percent.
        mean: Mean over the rows with a finite value.
        num_rows: Number of rows with a finite value.
    """

    quantiles: tuple[float, float, float, float, float]
    mean: float
    num_rows: int


@dataclass(frozen=True)
class SignalSpread:
    """Spread of a signal in each bucket.

    Attributes:
        name: Column of scores.parquet.
        fused: Whether the ranking uses the signal.
        boxes: One box for each bucket, the easiest first.
        num_not_finite: Number of rows without a finite value, which the boxes leave out.
    """

    name: str
    fused: bool
    boxes: tuple[Box, ...]
    num_not_finite: int


@dataclass(frozen=True)
class TopicTable:
    """Distribution of each topic's rows over the buckets.

    Attributes:
        names: Topics, ordered by mean difficulty, the easiest first.
        num_rows: Number of rows of each topic.
        shares: Shares of the buckets, shape (topics, buckets); each row sums to 1.
    """

    names: tuple[str, ...]
    num_rows: tuple[int, ...]
    shares: np.ndarray


@dataclass(frozen=True)
class Example:
    """A training row as the report shows it."""

    rank: int
    row_id: int
    topic: str
    prompt: str
    reference: str
    num_more_references: int
    signals: tuple[tuple[str, float], ...]


def signal_names(scores: dict[str, np.ndarray], fused: Sequence[str]) -> list[str]:
    """Return the signals of scores.parquet; the signals that the ranking uses come first."""
    found = [name for name in scores if name not in _NOT_SIGNALS]
    return [name for name in fused if name in found] + [name for name in found if name not in fused]


def buckets_of(rank: np.ndarray, bucket_ends: Sequence[int]) -> np.ndarray:
    """Return the bucket of each row.

    Args:
        rank: Rank of each row; rank 1 is the easiest.
        bucket_ends: Number of rows up to the end of each bucket. Rows after the last end, which the division into equal
            buckets leaves over, belong to the hardest bucket.
    """
    return np.minimum(np.searchsorted(np.asarray(bucket_ends), rank - 1, side="right"), len(bucket_ends) - 1)


def spread_by_bucket(
    name: str, values: np.ndarray, buckets: np.ndarray, num_buckets: int, *, fused: bool
) -> SignalSpread:
    """Return the spread of one signal, shape (rows,), in each bucket."""
    finite = np.isfinite(values)
    boxes = tuple(_box(values[finite & (buckets == bucket)]) for bucket in range(num_buckets))
    return SignalSpread(name, fused, boxes, int(len(values) - finite.sum()))


def _box(values: np.ndarray) -> Box:
    if not len(values):
        nan = float("nan")
        return Box((nan, nan, nan, nan, nan), nan, 0)
    q05, q25, q50, q75, q95 = (float(q) for q in np.percentile(values, (5, 25, 50, 75, 95)))
    return Box((q05, q25, q50, q75, q95), float(values.mean()), len(values))


def spearman(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Return Spearman's rank correlation of each pair of columns.

    Args:
        columns: Arrays of shape (rows,). A row counts for a pair if both values are finite. Ties share their mean rank.

    Returns:
        Matrix of shape (columns, columns), with NaN for pairs of fewer than three rows or with a constant column.
    """
    result = np.full((len(columns), len(columns)), np.nan)
    for i, left in enumerate(columns):
        for j, right in enumerate(columns[: i + 1]):
            both = np.isfinite(left) & np.isfinite(right)
            result[i, j] = result[j, i] = _pearson(_mean_ranks(left[both]), _mean_ranks(right[both]))
    return result


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _pearson(left: np.ndarray, right: np.ndarray) -> float:
    if len(left) < 3 or left.std() == 0 or right.std() == 0:
        return float("nan")
    return float(np.corrcoef(left, right)[0, 1])


def topics_of_rows(rows: pa.Table, ids: np.ndarray) -> np.ndarray | None:
    """Return the topic of each scored row, or None if the rows name fewer than two topics."""
    if TOPIC not in rows.column_names:
        return None
    column = pc.fill_null(rows.column(TOPIC).cast(pa.string()), "")
    places = pc.index_in(pa.array(ids), value_set=rows.column(ID).cast(pa.int64()))
    topics = pc.fill_null(column.take(places), "").to_numpy(zero_copy_only=False).astype(object)
    if len({topic for topic in topics if topic}) < 2:
        return None
    topics[topics == ""] = NO_TOPIC
    return topics


def topic_table(topics: np.ndarray, rank: np.ndarray, buckets: np.ndarray, num_buckets: int, limit: int) -> TopicTable:
    """Return the rows of each topic by bucket; topics beyond the `limit` largest are combined into one."""
    names, codes, sizes = np.unique(topics.astype(str), return_inverse=True, return_counts=True)
    order = np.argsort(-sizes, kind="stable")
    kept = order if len(names) <= limit else order[: limit - 1]
    mean_rank = np.bincount(codes, weights=rank) / sizes
    counts = np.zeros((len(names), num_buckets))
    np.add.at(counts, (codes, buckets), 1)
    kept = kept[np.argsort(mean_rank[kept], kind="stable")]
    labels, table = [str(name) for name in names[kept]], counts[kept]
    if len(kept) < len(names):
        labels.append(OTHER_TOPICS)
        table = np.vstack([table, counts.sum(axis=0) - table.sum(axis=0)])
    num_rows = table.sum(axis=1)
    return TopicTable(tuple(labels), tuple(int(n) for n in num_rows), table / num_rows[:, None])


def example_rows(
    rows: pa.Table, scores: dict[str, np.ndarray], signals: Sequence[str], num_examples: int
) -> tuple[list[Example], list[Example]]:
    """Return the easiest rows, the easiest first, and the hardest rows, the hardest first; no row is in both lists."""
    order = np.argsort(scores[RANK], kind="stable")
    num_examples = min(num_examples, (len(order) + 1) // 2)
    easiest, hardest = order[:num_examples], order[num_examples:][::-1][:num_examples]
    picked = np.concatenate([easiest, hardest])
    places = pc.index_in(pa.array(scores[ID][picked]), value_set=rows.column(ID).cast(pa.int64()))
    found = [(int(row), place) for row, place in zip(picked, places.to_pylist(), strict=True) if place is not None]
    texts = rows.take([place for _, place in found]).to_pylist()
    prompts = _without_common_lines([str(text[PROMPT]) for text in texts])
    examples = {
        row: _example(row, text, prompt, scores, signals)
        for (row, _), text, prompt in zip(found, texts, prompts, strict=True)
    }
    return [examples[r] for r in easiest if r in examples], [examples[r] for r in hardest if r in examples]


def _without_common_lines(prompts: list[str]) -> list[str]:
    """The prompts without the lines that all of them begin or end with, which are the template's text."""
    if len(set(prompts)) < 2:
        return prompts
    lines = [prompt.split("\n") for prompt in prompts]
    head = _num_common(lines)
    tail = _num_common([part[head:][::-1] for part in lines])
    return ["\n".join(part[head : len(part) - tail]).strip() for part in lines]


def _num_common(lines: Sequence[Sequence[str]]) -> int:
    columns = zip(*lines, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _example(
    row: int, text: dict[str, object], prompt: str, scores: dict[str, np.ndarray], signals: Sequence[str]
) -> Example:
    references = text.get(REFERENCES)
    answers = [str(answer) for answer in references] if isinstance(references, list) else [str(references or "")]
    return Example(
        rank=int(scores[RANK][row]),
        row_id=int(scores[ID][row]),
        topic=str(text.get(TOPIC) or ""),
        prompt=_shorten(prompt),
        reference=_shorten(answers[0].strip() if answers else ""),
        num_more_references=max(0, len(answers) - 1),
        signals=tuple((name, float(scores[name][row])) for name in signals),
    )


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_TEXT_CHARS else text[:_MAX_TEXT_CHARS].rstrip() + " …"


@dataclass(frozen=True)
class Reranked:
    """Comparison of a ranking with the one before it.

    Attributes:
        stage: Stage that uses the ranking.
        num_rows: Number of all rows.
        num_moved: Number of rows that changed their bucket.
        num_replaced: Number of rows of the stage that the ranking before would not have put there.
        num_stage_rows: Number of rows of the stage.
        spearman: Rank correlation of the two rankings.
    """

    stage: int
    num_rows: int
    num_moved: int
    num_replaced: int
    num_stage_rows: int
    spearman: float


def reranked(tables: Mapping[int, dict[str, np.ndarray]], plan: Plan) -> list[Reranked]:
    """Return the comparison of each ranking between stages with the one before it."""
    found = []
    for index, table in sorted(tables.items()):
        now, before, stage = table[RANK], table[PREVIOUS_RANK], plan.stages[index]
        moved = buckets_of(now, plan.bucket_ends) != buckets_of(before, plan.bucket_ends)
        taken, was_taken = ((stage.first_rank < rank) & (rank <= stage.end_rank) for rank in (now, before))
        found.append(
            Reranked(
                stage=index,
                num_rows=len(now),
                num_moved=int(moved.sum()),
                num_replaced=int((taken & ~was_taken).sum()),
                num_stage_rows=stage.num_rows,
                spearman=float(spearman([now, before])[0, 1]),
            )
        )
    return found
