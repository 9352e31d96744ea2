"""Families about words in a row: copying, picking, turning round, sorting, listing, filling in."""

from __future__ import annotations

import random

from pocl_ray.data.samples.registry import Row, family, row
from pocl_ray.data.samples.words import COLOURS, NAMES, PLACES, THINGS, enumerate_in_english, several


@family(grade=1)
def copy(rng: random.Random) -> Row:
    """cat red drum -> cat red drum."""
    text = " ".join(several(rng, 2, 4))
    return row(rng.choice(["Copy the words.", "Repeat the words as they are."]), text, text)


@family(grade=1)
def first_word(rng: random.Random) -> Row:
    """cat red drum -> cat."""
    words = several(rng, 3, 4)
    return row(rng.choice(["What is the first word?", "Write the first word."]), " ".join(words), words[0])


@family(grade=1)
def last_two_words(rng: random.Random) -> Row:
    """cat red drum -> red drum."""
    words = several(rng, 3, 4)
    instruction = rng.choice(["What are the last two words?", "Write the last two words."])
    return row(instruction, " ".join(words), " ".join(words[-2:]))


@family(grade=2)
def reverse_words(rng: random.Random) -> Row:
    """cat red drum -> drum red cat."""
    words = several(rng, 3, 4)
    instruction = rng.choice(["Write the words in reverse order.", "Reverse the order of the words."])
    return row(instruction, " ".join(words), " ".join(reversed(words)))


@family(grade=2)
def list_words(rng: random.Random) -> Row:
    """cat red drum -> cat, red and drum."""
    words = several(rng, 3, 4)
    instruction = rng.choice(["Write the words as a list with 'and'.", "Join the words with commas and 'and'."])
    return row(instruction, " ".join(words), enumerate_in_english(words))


@family(grade=3)
def sort_words(rng: random.Random) -> Row:
    """red cat drum -> cat drum red."""
    words = several(rng, 3, 3)
    instruction = rng.choice(["Sort the words alphabetically.", "Put the words in alphabetical order."])
    return row(instruction, " ".join(words), " ".join(sorted(words)))


@family(grade=2)
def fill_blank(rng: random.Random) -> Row:
    """ball: Anna has a ___ in the park. -> Anna has a ball in the park."""
    name, colour, thing, place = rng.choice(NAMES), rng.choice(COLOURS), rng.choice(THINGS), rng.choice(PLACES)
    gap = rng.choice([name, colour, thing, place])
    sentence = f"{name} has a {colour} {thing} at the {place}."
    instruction = rng.choice(["Fill in the blank with the given word.", "Put the given word into the blank."])
    return row(instruction, f"{gap}: {sentence.replace(gap, '___')}", sentence)
