from __future__ import annotations

import json
from pathlib import Path

import pytest
from rouge_score.rouge_scorer import RougeScorer

from pocl_ray.answers.rouge import exact_match, exact_match_batch, rouge_l, rouge_l_batch, score_files
from pocl_ray.errors import DataError

PAIRS = [
    ("The quick brown fox jumps over the lazy dogs", ["A lazy dog jumped over the quickest fox", "brown foxes"]),
    ("", ["something"]),
    ("Paris.", ["paris"]),
    ("running runners run", ["the runner runs", "Running, runners; run!"]),
    ("costs $42, not 7%", ["it costs 42 $"]),
    ("...", ["!!!"]),
]


def write_lines(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(("prediction", "references"), PAIRS)
def test_rouge_l_is_the_packages_own_with_stemming(prediction: str, references: list[str]) -> None:
    package = RougeScorer(["rougeL"], use_stemmer=True)
    expected = max(package.score(reference, prediction)["rougeL"].fmeasure for reference in references)
    assert rouge_l(prediction, references) == pytest.approx(100 * expected, abs=1e-12)


def test_rouge_l_equals_the_packages_on_real_rows(shared: Path) -> None:
    lines = (shared / "data" / "s_ni_dev.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    accepted = [row["output"] if isinstance(row["output"], list) else [row["output"]] for row in rows]
    predictions = [row["input"][:200] for row in rows]
    package = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = [(p, r) for p, r in zip(predictions, accepted, strict=True) if "".join([p, *r]).isascii()]
    assert len(pairs) > 0.8 * len(rows)
    predictions, accepted = [p for p, _ in pairs], [r for _, r in pairs]
    expected = [100 * package.score_multi(r, p)["rougeL"].fmeasure for p, r in pairs]
    assert rouge_l_batch(predictions, accepted) == pytest.approx(expected, abs=1e-9)


def test_exact_match_ignores_case_punctuation_and_white_space() -> None:
    assert exact_match(" The  Answer,\nis: 42! ", ["no", "the answer is 42"]) == 100.0
    assert exact_match("the answer is 4 2", ["the answer is 42"]) == 0.0
    assert exact_match_batch(["A", "b"], [["a"], ["c"]]) == [100.0, 0.0]


def test_a_single_string_as_references_is_refused_rather_than_read_letter_by_letter() -> None:
    with pytest.raises(ValueError, match="non-empty sequence"):
        rouge_l("a", "abc")
    with pytest.raises(ValueError, match="non-empty sequence"):
        exact_match("a", [])


def test_files_give_the_mean_over_rows(tmp_path: Path) -> None:
    predictions = write_lines(tmp_path / "p.jsonl", [{"text": "the cat sat"}, {"prediction": "Yes!\u2028"}])
    references = write_lines(tmp_path / "r.jsonl", [{"output": ["a dog", "the cat"]}, {"output": "yes"}])
    found = score_files(predictions, references)
    assert found == {"rouge_l": pytest.approx((80 + 100) / 2), "exact_match": 50.0, "num_rows": 2}


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ('{"text": "a"}\n{"text": "b"', r"p\.jsonl:2: not a line of JSON"),
        ('{"text": "a"}\n\n{"text": "b"}', r"p\.jsonl:2: not a line of JSON"),
        ('{"answer": "a"}\n{"text": "b"}', r"p\.jsonl:1: has neither text nor prediction; its fields: answer"),
        ('{"text": 3}\n{"text": "b"}', r"p\.jsonl:1: text is a string, not int"),
        ('["a"]\n{"text": "b"}', r"p\.jsonl:1: each line is a JSON object, not list"),
        ('{"text": "a"}', r"p\.jsonl has 1 lines, but .*r\.jsonl has 2"),
        ("\n", r"p\.jsonl: holds no rows"),
    ],
)
def test_a_broken_predictions_file_is_an_error_that_names_file_and_line(
    tmp_path: Path, predictions: str, message: str
) -> None:
    (tmp_path / "p.jsonl").write_text(predictions, encoding="utf-8")
    references = write_lines(tmp_path / "r.jsonl", [{"output": "a"}, {"output": "b"}])
    with pytest.raises(DataError, match=message):
        score_files(tmp_path / "p.jsonl", references)


@pytest.mark.parametrize("row", [{"output": []}, {"output": [1]}, {"output": None}, {"outputs": "a"}])
def test_a_broken_references_file_is_an_error_that_names_file_and_line(tmp_path: Path, row: object) -> None:
    predictions = write_lines(tmp_path / "p.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match=r"r\.jsonl:1: "):
        score_files(predictions, write_lines(tmp_path / "r.jsonl", [row]))


def test_missing_files_and_broken_utf8_are_errors(tmp_path: Path) -> None:
    references = write_lines(tmp_path / "r.jsonl", [{"output": "a"}])
    with pytest.raises(DataError, match="no such file"):
        score_files(tmp_path / "absent.jsonl", references)
    (tmp_path / "p.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"p\.jsonl:1: not a line of JSON"):
        score_files(tmp_path / "p.jsonl", references)
