"""Families about numbers and dates: sums, comparison, sorting, units, parity, number words, the calendar."""

from __future__ import annotations

import random

from pocl_ray.data.samples.registry import Row, family, row
from pocl_ray.data.samples.words import FRUITS, MONTHS, NAMES, WEEKDAYS, plural

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
