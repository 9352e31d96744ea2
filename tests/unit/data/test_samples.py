"""The shipped rows: the same everywhere, no leak between splits, and the answers are right."""

from __future__ import annotations

import calendar
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from datetime import date, datetime, timedelta
from itertools import pairwise

import pytest

from pocl_ray.data.samples import FRESH_SPLITS, SPLITS, fresh_rows, sample_rows
from pocl_ray.data.samples.registry import FAMILIES
from pocl_ray.errors import DataError

ROWS = {split: sample_rows("instructions", split) for split in SPLITS}
ALL_ROWS = [row for rows in ROWS.values() for row in rows]


def references(row: dict) -> list[str]:
    return [row["output"]] if isinstance(row["output"], str) else row["output"]


def question(row: dict) -> tuple:
    return row["topic"], row["input"], tuple(references(row))


def prompt(row: dict) -> tuple[str, str]:
    return row["instruction"], row["input"]


def of_family(topic: str) -> list[dict]:
    rows = [row for row in ALL_ROWS if row["topic"] == topic]
    assert rows, f"no rows of {topic}"
    return rows


def test_rows_are_the_same_on_every_machine_and_python():
    digest = hashlib.sha256(json.dumps(ROWS, sort_keys=True).encode()).hexdigest()
    assert digest[:16] == "c89a58b652f0644b"  # a change of the rows changes every figure of the quickstart: say so


def test_a_caller_may_change_the_rows_it_got_without_harm_to_the_next():
    sample_rows("instructions", "dev")[0]["output"] = "spoilt"
    assert sample_rows("instructions", "dev") == ROWS["dev"]


def test_splits_have_the_sizes_that_the_quickstart_counts_on():
    assert 3000 <= len(ROWS["train"]) <= 4000
    assert 140 <= len(ROWS["dev"]) <= 160
    assert 290 <= len(ROWS["test"]) <= 340


def test_every_family_stands_in_every_split():
    assert len(FAMILIES) >= 23
    for rows in ROWS.values():
        assert {row["topic"] for row in rows} == set(FAMILIES)


def test_all_four_grades_are_taken():
    assert {family.grade for family in FAMILIES.values()} == {1, 2, 3, 4}


def test_families_are_mixed_so_that_file_order_breaks_ties_between_them_fairly():
    topics = [row["topic"] for row in ROWS["train"]]
    same_as_next = sum(one == other for one, other in pairwise(topics))
    assert same_as_next < 3 * len(topics) / len(FAMILIES)


@pytest.mark.parametrize("held_out", ["dev", "test"])
def test_no_held_out_row_is_in_another_split_even_in_other_words(held_out: str):
    elsewhere = [row for split, rows in ROWS.items() if split != held_out for row in rows]
    assert not {question(row) for row in ROWS[held_out]} & {question(row) for row in elsewhere}
    assert not {prompt(row) for row in ROWS[held_out]} & {prompt(row) for row in elsewhere}


def test_fresh_rows_ask_no_question_of_dev_or_test_even_in_other_words():
    fresh = fresh_rows("instructions", "some seed", 150)
    held_out = ROWS["dev"] + ROWS["test"]
    assert not {question(row) for row in fresh} & {question(row) for row in held_out}
    assert not {prompt(row) for row in fresh} & {prompt(row) for row in held_out}
    assert len({question(row) for row in fresh}) == len(fresh) > 3000
    assert {row["topic"] for row in fresh} == set(FAMILIES)
    assert fresh == fresh_rows("instructions", "some seed", 150)
    other = fresh_rows("instructions", "another seed", 150)
    assert len({prompt(row) for row in other} - {prompt(row) for row in fresh}) > len(other) / 2


def test_rows_for_comparisons_share_no_question_with_other_splits():
    fresh = {split: sample_rows("instructions", split) for split in FRESH_SPLITS}
    asked = [question(row) for rows in [*ROWS.values(), *fresh.values()] for row in rows]
    assert len(set(asked)) == len(asked)
    assert len(fresh["fresh_test"]) > 2 * len(ROWS["test"])
    assert len(fresh["fresh_dev"]) > 2 * len(ROWS["dev"])


def test_no_question_comes_twice_and_none_has_two_answers():
    prompts = Counter((row["instruction"], row["input"]) for row in ALL_ROWS)
    assert max(prompts.values()) == 1


def test_every_field_is_filled_and_trimmed():
    for row in ALL_ROWS:
        assert set(row) == {"instruction", "input", "output", "topic"}
        for text in [row["instruction"], row["input"], *references(row)]:
            assert text
            assert text == text.strip()
            assert "  " not in text


def test_some_rows_have_several_references_and_many_answers_several_words():
    share_of_lists = sum(isinstance(row["output"], list) for row in ALL_ROWS) / len(ALL_ROWS)
    share_of_phrases = sum(len(references(row)[0].split()) > 1 for row in ALL_ROWS) / len(ALL_ROWS)
    assert 0.15 < share_of_lists < 0.5
    assert share_of_phrases > 0.6


def test_words_of_held_out_answers_are_known_from_training():
    def words(rows: list[dict]) -> set[str]:
        return {word for row in rows for word in re.findall(r"[A-Za-z]+", f"{row['input']} {references(row)[0]}")}

    assert words(ROWS["dev"]) | words(ROWS["test"]) <= words(ROWS["train"])


def test_every_family_is_a_function_of_its_generator_alone():
    for family in FAMILIES.values():
        assert family.invent(random.Random(7)) == family.invent(random.Random(7))


# What each family asks, worked out a second time from the input alone.
NUMBER = re.compile(r"\d+")
KIND = {"animal": "cat dog fox owl hen cow pig ant", "fruit": "apple pear plum fig lemon melon"}
KIND_OF = {word: kind for kind, words in KIND.items() for word in words.split()}
PLURALS = {"fox": "foxes", "box": "boxes", "mouse": "mice", "child": "children", "man": "men"}
FACTORS = {
    ("metres", "centimetres"): 100,
    ("kilometres", "metres"): 1000,
    ("kilograms", "grams"): 1000,
    ("euros", "cents"): 100,
    ("centimetres", "millimetres"): 10,
    ("weeks", "days"): 7,
}


PAST = {"walks": "walked", "runs": "ran", "drives": "drove", "goes": "went", "hurries": "hurried", "comes": "came"}
SPANISH = {
    "cat": "el gato",
    "dog": "el perro",
    "cow": "la vaca",
    "fox": "el zorro",
    "hen": "la gallina",
    "book": "el libro",
    "box": "la caja",
    "apple": "la manzana",
}
OPPOSITE_PAIRS = "hot cold, big small, old new, fast slow, wet dry, dark light, full empty"
OPPOSITE = {a: b for pair in OPPOSITE_PAIRS.split(", ") for a, b in (pair.split(), pair.split()[::-1])}
ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TENS = ("zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
PRAISE = {"good.", "great.", "lovely.", "perfect."}


def numbers(text: str) -> list[int]:
    return [int(found) for found in NUMBER.findall(text)]


def converted(text: str) -> str:
    amount, unit, _, smaller = text.split()
    return f"{int(amount) * FACTORS[unit, smaller]} {smaller}"


def day_after(text: str) -> str:
    weekday, day_and_month = text.split(", ")
    names = list(calendar.day_name)
    after = datetime.strptime(f"{day_and_month} 2023", "%d %B %Y") + timedelta(days=1)
    return f"{names[(names.index(weekday) + 1) % 7]}, {after.day} {after:%B}"


def date_in_full(text: str) -> str:
    day = date.fromisoformat(text)
    return f"{day.day} {day:%B} {day.year}"


def filled(text: str) -> str:
    word, sentence = text.split(": ")
    return sentence.replace("___", word)


def stranger(text: str) -> str:
    kinds = Counter(KIND_OF.get(word, "colour") for word in text.split(", "))
    return next(word for word in text.split(", ") if kinds[KIND_OF.get(word, "colour")] == 1)


def colour_asked_for(text: str) -> str:
    thing = re.findall(r"is the (\w+)\?", text)[0]
    colour = re.findall(rf"a (\w+) {thing}", text)[0]
    return f"The {thing} is {colour}."


def owner_asked_for(text: str) -> str:
    thing = re.findall(r"has the (\w+)\?", text)[0]
    owner = re.findall(rf"(\w+) has a {thing}", text)[0]
    return f"{owner} has the {thing}."


def city_asked_for(text: str) -> str:
    return f"{text.split()[0]} lives in {text.split()[-1]}"


def in_the_past(text: str) -> str:
    who, verb, *rest = text.split()
    return " ".join([who, PAST[verb], *rest])


def in_spanish(text: str) -> str:
    articles = {"the": "", "and": "y", **SPANISH}
    return " ".join(articles[word] for word in text.split()).replace("  ", " ").strip()


def in_words(text: str) -> str:
    return ", ".join(f"{TENS[number // 10]}-{ONES[number % 10]}" for number in numbers(text))


ANSWERS: dict[str, Callable[[str], str]] = {
    "copy": lambda text: text,
    "first_word": lambda text: text.split()[0],
    "last_two_words": lambda text: " ".join(text.split()[-2:]),
    "reverse_words": lambda text: " ".join(text.split()[::-1]),
    "sort_words": lambda text: " ".join(sorted(text.split())),
    "list_words": lambda text: " and ".join([", ".join(text.split()[:-1]), text.split()[-1]]),
    "fill_blank": filled,
    "find_city": city_asked_for,
    "find_colour": colour_asked_for,
    "find_owner": owner_asked_for,
    "count_word": lambda text: f"{text.count(text.split(':')[0]) - 1} times",
    "classify": lambda text: ", ".join(KIND_OF.get(word, "colour") for word in text.split(", ")),
    "odd_one_out": stranger,
    "upper_case": str.upper,
    "lower_case": str.lower,
    "make_plural": lambda text: ", ".join(PLURALS.get(word, f"{word}s") for word in text.split(", ")),
    "sentiment": lambda text: "positive" if text.split()[-1] in PRAISE else "negative",
    "past_tense": in_the_past,
    "opposites": lambda text: ", ".join(OPPOSITE[word] for word in text.split(", ")),
    "translate": in_spanish,
    "number_in_words": in_words,
    "negate": lambda text: text.replace(" is ", " is not "),
    "add": lambda text: str(sum(numbers(text))),
    "story_sum": lambda text: re.sub(r"\d+", str(sum(numbers(text))), text, count=1).split(" and ")[0] + ".",
    "larger_number": lambda text: str(max(numbers(text))),
    "sort_numbers": lambda text: ", ".join(map(str, sorted(numbers(text)))),
    "even_or_odd": lambda text: ", ".join(["even", "odd"][number % 2] for number in numbers(text)),
    "convert_units": converted,
    "write_date": date_in_full,
    "next_day": day_after,
}


def test_every_family_is_worked_out_a_second_time():
    assert set(ANSWERS) == set(FAMILIES)


@pytest.mark.parametrize("topic", sorted(ANSWERS))
def test_answers_are_right(topic: str):
    for row in of_family(topic):
        assert references(row)[0] == ANSWERS[topic](row["input"]), row


def test_unknown_names_and_splits_are_refused_with_those_there_are():
    with pytest.raises(DataError, match="instructions"):
        sample_rows("poems", "train")
    with pytest.raises(DataError, match="test, dev, train"):
        sample_rows("instructions", "validation")
    with pytest.raises(DataError, match="instructions"):
        fresh_rows("poems", "seed", 1)
