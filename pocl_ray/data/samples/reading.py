"""Families about the sense of a text: finding facts in a passage, counting, sorting things into kinds."""

from __future__ import annotations

import random

from pocl_ray.data.samples.registry import Row, family, row
from pocl_ray.data.samples.words import (
    ANIMALS,
    BLAME,
    CITIES,
    COLOURS,
    FRUITS,
    KINDS,
    NAMES,
    PRAISE,
    THINGS,
    several,
)


@family(grade=1)
def find_city(rng: random.Random) -> Row:
    """Anna has a red hat and lives in Oslo. -> Anna lives in Oslo."""
    name, city = rng.choice(NAMES), rng.choice(CITIES)
    passage = f"{name} has a {rng.choice(COLOURS)} {rng.choice(THINGS)} and lives in {city}."
    instruction = rng.choice(["Where does this person live?", "In which city does this person live?"])
    return row(instruction, passage, f"{name} lives in {city}.", city, f"In {city}.")


@family(grade=2)
def find_colour(rng: random.Random) -> Row:
    """Ben has a pink cup and a blue kite. What colour is the kite? -> The kite is blue."""
    colours, things = rng.sample(COLOURS, 2), rng.sample(THINGS, 2)
    asked = rng.randrange(2)
    fact = f"{rng.choice(NAMES)} has a {colours[0]} {things[0]} and a {colours[1]} {things[1]}."
    instruction = rng.choice(["Answer the question.", "Read the text and answer."])
    question = f"{fact} What colour is the {things[asked]}?"
    return row(instruction, question, f"The {things[asked]} is {colours[asked]}.", colours[asked])


@family(grade=2)
def find_owner(rng: random.Random) -> Row:
    """Tom has a hat and Emma has a book. Who has the book? -> Emma has the book."""
    names, things = rng.sample(NAMES, 2), rng.sample(THINGS, 2)
    asked = rng.randrange(2)
    fact = f"{names[0]} has a {things[0]} and {names[1]} has a {things[1]}."
    instruction = rng.choice(["Answer the question.", "Read the text and answer."])
    answer = f"{names[asked]} has the {things[asked]}."
    return row(instruction, f"{fact} Who has the {things[asked]}?", answer, names[asked], f"{names[asked]} does.")


@family(grade=3)
def count_word(rng: random.Random) -> Row:
    """cat: dog cat hen cat cat -> 3 times."""
    word, *others = rng.sample(ANIMALS + FRUITS, 3)
    num_times = rng.randint(2, 5)
    words = [word] * num_times + others
    rng.shuffle(words)
    instruction = rng.choice(["How often does the given word occur?", "Count how often the given word occurs."])
    return row(instruction, f"{word}: {' '.join(words)}", f"{num_times} times", str(num_times))


@family(grade=2)
def classify(rng: random.Random) -> Row:
    """fox, plum, red -> animal, fruit, colour."""
    words = several(rng, 2, 3, tuple(KINDS))
    instruction = rng.choice(["Is each word an animal, a fruit or a colour?", "Animal, fruit or colour? Label each."])
    return row(instruction, ", ".join(words), ", ".join(KINDS[word] for word in words))


@family(grade=3)
def odd_one_out(rng: random.Random) -> Row:
    """fox, plum, cow, ant -> plum."""
    kinds = rng.sample([ANIMALS, FRUITS, COLOURS], 2)
    stranger = rng.choice(kinds[1])
    words = [*rng.sample(kinds[0], 3), stranger]
    rng.shuffle(words)
    instruction = rng.choice(["Which word does not fit with the others?", "Find the odd one out."])
    return row(instruction, ", ".join(words), stranger)


@family(grade=2)
def sentiment(rng: random.Random) -> Row:
    """The film was really awful. -> negative."""
    praised = rng.random() < 0.5
    what, how = rng.choice(["film", "food", *THINGS]), rng.choice(["", "very ", "really "])
    verdict = rng.choice(PRAISE if praised else BLAME)
    instruction = rng.choice(["Is this review positive or negative?", "Positive or negative?"])
    return row(instruction, f"The {what} was {how}{verdict}.", "positive" if praised else "negative")
