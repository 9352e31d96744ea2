"""The closed word lists of the sample rows.

They are short on purpose: a model of less than a million parameters shall meet every word often enough to know it, and
spend its capacity on the tasks. Difficulty comes from what is done with the words, not from rare ones.
"""

from __future__ import annotations

import random

ANIMALS = ("cat", "dog", "fox", "owl", "hen", "cow", "pig", "ant")
FRUITS = ("apple", "pear", "plum", "fig", "lemon", "melon")
COLOURS = ("red", "blue", "green", "white", "black", "pink")
THINGS = ("ball", "kite", "drum", "book", "lamp", "cup", "hat", "box")
WORDS = ANIMALS + FRUITS + COLOURS + THINGS

KINDS = {
    **dict.fromkeys(ANIMALS, "animal"),
    **dict.fromkeys(FRUITS, "fruit"),
    **dict.fromkeys(COLOURS, "colour"),
}

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Max", "Nora", "Tom")
CITIES = ("Rome", "Paris", "Oslo", "Cairo", "Lima", "Tokyo")
PLACES = ("park", "school", "river", "market")

IRREGULAR_PLURALS = {"fox": "foxes", "box": "boxes", "mouse": "mice", "child": "children", "man": "men"}
PAST_TENSE = {
    "walks": "walked",
    "runs": "ran",
    "drives": "drove",
    "goes": "went",
    "hurries": "hurried",
    "comes": "came",
}
OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "old": "new",
    "fast": "slow",
    "wet": "dry",
    "dark": "light",
    "full": "empty",
}
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

PRAISE = ("good", "great", "lovely", "perfect")
BLAME = ("bad", "awful", "boring", "terrible")

MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def several(rng: random.Random, least: int, most: int, pool: tuple[str, ...] = WORDS) -> list[str]:
    """Draw `least` to `most` different words in random order."""
    return rng.sample(pool, rng.randint(least, most))


def plural(noun: str) -> str:
    """The plural of a noun of these lists."""
    return IRREGULAR_PLURALS.get(noun, noun + "s")


def enumerate_in_english(words: list[str]) -> str:
    """Join words the way a sentence lists them: "cat, dog and fox"."""
    return f"{', '.join(words[:-1])} and {words[-1]}"
