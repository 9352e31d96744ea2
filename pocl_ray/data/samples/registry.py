"""The task families: each is a small function that generates a question and its answer.

A family has a grade, from 1 (the answer can be copied) to 4 (the answer takes several steps). `input` holds everything
that distinguishes a question (and so its answer). The instruction is one of a few wordings of the same task. Rows are
distinguished by input and answer, so that the question "2, 7" of the training split cannot return in the test split in
other words.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from pocl_ray.data.samples.words import (
    ANIMALS,
    BLAME,
    CITIES,
    COLOURS,
    FRUITS,
    IRREGULAR_PLURALS,
    KINDS,
    MONTHS,
    NAMES,
    OPPOSITES,
    PAST_TENSE,
    PLACES,
    PRAISE,
    SPANISH,
    THINGS,
    WEEKDAYS,
    enumerate_in_english,
    plural,
    several,
)


@dataclass(frozen=True)
class Row:
    """One question. `answers` holds all accepted wordings; training uses the first."""

    instruction: str
    input: str
    answers: tuple[str, ...]

    @property
    def question(self) -> tuple[str, tuple[str, ...]]:
        """The input and the answers, which distinguish this row within its family, whatever the wording of the task."""
        return self.input, self.answers


@dataclass(frozen=True)
class Family:
    """A kind of task: its name, its grade of difficulty (1 easy to 4 hard) and the function that generates rows."""

    name: str
    grade: int
    invent: Callable[[random.Random], Row]


FAMILIES: dict[str, Family] = {}


def family(grade: int) -> Callable[[Callable[[random.Random], Row]], Callable[[random.Random], Row]]:
    """Return a decorator that registers a function as a family under its own name.

    Args:
        grade: Difficulty for a person, from 1 (copying) to 4 (several steps of thought).
    """

    def register(invent: Callable[[random.Random], Row]) -> Callable[[random.Random], Row]:
        name = invent.__name__
        assert name not in FAMILIES, f"two families are called {name}"
        assert 1 <= grade <= 4, f"{name}: grade {grade}"
        FAMILIES[name] = Family(name, grade, invent)
        return invent

    return register


def row(instruction: str, text: str, *answers: str) -> Row:
    """Return a row; training uses the first answer."""
    return Row(instruction, text, answers)


# Families about numbers and dates: sums, comparison, sorting, units, parity, number words, the calendar.

ONES = ("", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
UNITS = (
    ("metres", "centimetres", 100),
    ("kilometres", "metres", 1000),
    ("kilograms", "grams", 1000),
    ("euros", "cents", 100),
    ("centimetres", "millimetres", 10),
    ("weeks", "days", 7),
)


@family(grade=4)
def add(rng: random.Random) -> Row:
    """17 + 5 -> 22."""
    left, right = rng.randint(1, 20), rng.randint(1, 9)
    return row(rng.choice(["Add the numbers.", "What is the sum?"]), f"{left} + {right}", str(left + right))


@family(grade=4)
def story_sum(rng: random.Random) -> Row:
    """Anna has 3 figs and buys 4 more. -> Anna has 7 figs."""
    name, fruit = rng.choice(NAMES), plural(rng.choice(FRUITS))
    before, bought = rng.randint(2, 9), rng.randint(2, 9)
    instruction = rng.choice(["How many are there now?", "How many does this person have now?"])
    total = before + bought
    story = f"{name} has {before} {fruit} and buys {bought} more."
    return row(instruction, story, f"{name} has {total} {fruit}.", f"{total} {fruit}", str(total))


@family(grade=3)
def larger_number(rng: random.Random) -> Row:
    """34 or 71 -> 71."""
    left, right = rng.sample(range(10, 100), 2)
    instruction = rng.choice(["Which number is larger?", "Write the larger number."])
    return row(instruction, f"{left} or {right}", str(max(left, right)))


@family(grade=4)
def sort_numbers(rng: random.Random) -> Row:
    """7, 3, 5 -> 3, 5, 7."""
    numbers = rng.sample(range(1, 10), rng.randint(3, 4))
    instruction = rng.choice(["Sort from small to large.", "Put the numbers in order, smallest first."])
    return row(instruction, ", ".join(map(str, numbers)), ", ".join(map(str, sorted(numbers))))


@family(grade=3)
def convert_units(rng: random.Random) -> Row:
    """3 metres in centimetres -> 300 centimetres."""
    unit, smaller, factor = rng.choice(UNITS)
    amount = rng.randint(2, 60) if factor != 7 else rng.randint(2, 10)
    instruction = rng.choice(["Convert to the smaller unit.", "Convert the unit."])
    return row(instruction, f"{amount} {unit} in {smaller}", f"{amount * factor} {smaller}", str(amount * factor))


@family(grade=3)
def even_or_odd(rng: random.Random) -> Row:
    """12, 7, 30 -> even, odd, even."""
    numbers = rng.sample(range(1, 100), 3)
    instruction = rng.choice(["Is each number even or odd?", "Even or odd? Label each number."])
    return row(instruction, ", ".join(map(str, numbers)), ", ".join("odd" if n % 2 else "even" for n in numbers))


@family(grade=2)
def number_in_words(rng: random.Random) -> Row:
    """42, 57 -> forty-two, fifty-seven."""
    tens, ones = rng.sample(range(2, 10), 2), rng.sample(range(1, 10), 2)
    numbers = [10 * ten + one for ten, one in zip(tens, ones, strict=True)]
    spelled = [f"{TENS[ten]}-{ONES[one]}" for ten, one in zip(tens, ones, strict=True)]
    instruction = rng.choice(["Write the numbers in words.", "Spell out the numbers."])
    return row(instruction, ", ".join(map(str, numbers)), ", ".join(spelled))


@family(grade=2)
def write_date(rng: random.Random) -> Row:
    """2024-05-03 -> 3 May 2024."""
    year, month, day = rng.randint(2020, 2029), rng.randint(1, 12), rng.randint(1, 28)
    instruction = rng.choice(["Write the date with the name of the month.", "Write this date in full."])
    return row(
        instruction,
        f"{year}-{month:02d}-{day:02d}",
        f"{day} {MONTHS[month - 1]} {year}",
        f"{MONTHS[month - 1]} {day}, {year}",
    )


@family(grade=4)
def next_day(rng: random.Random) -> Row:
    """Monday, 3 May -> Tuesday, 4 May."""
    weekday, day, month = rng.randrange(7), rng.randint(1, 27), rng.choice(MONTHS)
    instruction = rng.choice(["What is the day after?", "Write the next day."])
    return row(instruction, f"{WEEKDAYS[weekday]}, {day} {month}", f"{WEEKDAYS[(weekday + 1) % 7]}, {day + 1} {month}")


# Families about words in a row: copying, picking, turning round, sorting, listing, filling in.


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


# Families about the sense of a text: finding facts in a passage, counting, sorting things into kinds.


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


# Families that say a text again in another form: case, number, tense, negation, opposite, language.


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
