"""Families that say a text again in another form: case, number, tense, negation, opposite, language."""

from __future__ import annotations

import random

from pocl_ray.data.samples.registry import Row, family, row
from pocl_ray.data.samples.words import (
    ANIMALS,
    COLOURS,
    IRREGULAR_PLURALS,
    NAMES,
    OPPOSITES,
    PAST_TENSE,
    PLACES,
    SPANISH,
    THINGS,
    plural,
    several,
)


@family(grade=2)
def upper_case(rng: random.Random) -> Row:
    """red hat -> RED HAT."""
    text = " ".join(several(rng, 2, 3, ANIMALS + COLOURS))
    return row(rng.choice(["Write in capital letters.", "Write the words in upper case."]), text, text.upper())


@family(grade=2)
def lower_case(rng: random.Random) -> Row:
    """RED HAT -> red hat."""
    text = " ".join(several(rng, 2, 3, ANIMALS + COLOURS))
    return row(rng.choice(["Write in small letters.", "Write the words in lower case."]), text.upper(), text)


@family(grade=2)
def make_plural(rng: random.Random) -> Row:
    """cat, mouse -> cats, mice."""
    nouns = several(rng, 2, 3, tuple(dict.fromkeys([*ANIMALS, *THINGS, *IRREGULAR_PLURALS])))
    instruction = rng.choice(["Write the plural of each word.", "Make the words plural."])
    return row(instruction, ", ".join(nouns), ", ".join(plural(noun) for noun in nouns))


@family(grade=2)
def past_tense(rng: random.Random) -> Row:
    """Anna runs to the river with Ben. -> Anna ran to the river with Ben."""
    verb = rng.choice(list(PAST_TENSE))
    who, friend = rng.sample(NAMES, 2)
    rest = f"to the {rng.choice(PLACES)} with {friend}."
    instruction = rng.choice(["Write the sentence in the past tense.", "Say that it happened in the past."])
    return row(instruction, f"{who} {verb} {rest}", f"{who} {PAST_TENSE[verb]} {rest}")


@family(grade=2)
def negate(rng: random.Random) -> Row:
    """Tom's hat is red. -> Tom's hat is not red."""
    subject = f"{rng.choice(NAMES)}'s {rng.choice(THINGS)} is"
    colour = rng.choice(COLOURS)
    instruction = rng.choice(["Say that it is not so.", "Make the sentence negative."])
    answers = f"{subject} not {colour}.", f"{subject}n't {colour}."
    return row(instruction, f"{subject} {colour}.", *answers)


@family(grade=3)
def opposites(rng: random.Random) -> Row:
    """hot, old, fast -> cold, new, slow."""
    pairs = {**OPPOSITES, **{right: left for left, right in OPPOSITES.items()}}
    words = several(rng, 2, 3, tuple(pairs))
    instruction = rng.choice(["Write the opposite of each word.", "What are the opposites?"])
    return row(instruction, ", ".join(words), ", ".join(pairs[word] for word in words))


@family(grade=3)
def translate(rng: random.Random) -> Row:
    """the cat and the cow -> el gato y la vaca."""
    nouns = several(rng, 2, 3, tuple(SPANISH))
    instruction = rng.choice(["Translate into Spanish.", "Say it in Spanish."])
    english, spanish = (f"the {noun}" for noun in nouns), (SPANISH[noun] for noun in nouns)
    return row(instruction, " and ".join(english), " y ".join(spanish))
