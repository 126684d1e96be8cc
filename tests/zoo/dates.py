"""Dates as people write them, each with its ISO form: what the shipped date reader is trained and tested on.

Conventions, where a date could be read in more than one way:
    slashes      month/day/year, as in the United States: 11/05/85 is the 5th of November; 1985/11/5 is year first
    dots         day.month.year: 5.11.1985; 1985.11.5 is year first
    dashes       year-month-day if the year of four digits is first, else day-month-year: 5-11-1985
    eight digits year, month, day: 19851105
    short years  two digits, never first; 00 to 49 are 2000 to 2049, 50 to 99 are 1950 to 1999

Days lie between 1900-01-01 and 2099-12-31. One in twenty, told by a hash of the day alone, is held out: training sees
it in no format at all.
"""

import datetime
import hashlib
from collections.abc import Callable
from functools import cache
from random import Random

Day = datetime.date
Pair = tuple[str, str]  # (text, ISO date)

FIRST, LAST = Day(1900, 1, 1), Day(2099, 12, 31)
PIVOT = 50  # the first short year of the 1900s
LONGEST = 48  # characters of a text
HELD_OUT_SHARE = 20  # one day in so many

UNITS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")
TEENS = ("ten", "eleven", "twelf", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
SPELLED = [*UNITS, *(f"{ten}th" for ten in TEENS), "twentieth", *(f"twenty-{unit}" for unit in UNITS)]
SPELLED += ["thirtieth", "thirty-first"]
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SHORT_WEEKDAYS = (("Mon",), ("Tue", "Tues"), ("Wed",), ("Thu", "Thur", "Thurs"), ("Fri",), ("Sat",), ("Sun",))
MONTHS = ("January", "February", "March", "April", "May", "June")
MONTHS += ("July", "August", "September", "October", "November", "December")
LEADS = ("on", "on", "from", "until", "dated", "born on", "published on", "valid from")  # may stand before a date


def number(value: int, random: Random) -> str:
    """A day or a month in digits, with or without a leading zero."""
    return f"{value:02d}" if random.random() < 0.5 else str(value)


def ordinal(day: Day, random: Random) -> str:
    """3rd, or now and then third."""
    if random.random() < 0.2:
        return SPELLED[day.day - 1]
    ending = "th" if 10 < day.day < 14 else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    return f"{day.day}{ending}"


def day_name(day: Day, random: Random) -> str:
    """3, 03, 3rd or third."""
    return ordinal(day, random) if random.random() < 0.5 else number(day.day, random)


def month_name(day: Day, random: Random, dot: bool = True) -> str:
    """May, or a month cut short, with a dot if one may follow."""
    if random.random() < 0.45:
        return MONTHS[day.month - 1]
    short = "Sept" if day.month == 9 and random.random() < 0.5 else MONTHS[day.month - 1][:3]
    return f"{short}." if dot and random.random() < 0.35 else short


def year_name(day: Day, random: Random, apostrophe: bool = True) -> str:
    """1979, or 79 and '79 where the pivot leads back to the year."""
    if not 1900 + PIVOT <= day.year < 2000 + PIVOT or random.random() < 0.45:
        return str(day.year)
    return f"'{day.year % 100:02d}" if apostrophe and random.random() < 0.35 else f"{day.year % 100:02d}"


def day_first(day: Day, random: Random) -> str:
    """3 May 1979; 3rd of May, 79; 3. May '79"""
    name = day_name(day, random)
    between = random.choice([" ", " ", " of ", ". "] if name.isdigit() else [" ", " of "])
    return f"{name}{between}{month_name(day, random)}{random.choice([' ', ', '])}{year_name(day, random)}"


def the_day_of(day: Day, random: Random) -> str:
    """the 3rd of May, 1979; the third day of May 1979"""
    between = random.choice([" of ", " of ", " ", " day of "])
    month, comma, year = month_name(day, random), random.choice([" ", ", "]), year_name(day, random)
    return f"the {ordinal(day, random)}{between}{month}{comma}{year}"


def month_first(day: Day, random: Random) -> str:
    """May 3, 1979; May 3rd 79; May the 3rd, '79"""
    name = f"the {ordinal(day, random)}" if random.random() < 0.2 else day_name(day, random)
    return f"{month_name(day, random)} {name}{random.choice([' ', ', '])}{year_name(day, random)}"


def year_first(day: Day, random: Random) -> str:
    """1979 May 3; 1979, 3rd May; 1979-May-03"""
    if random.random() < 0.25:
        return f"{day.year}-{month_name(day, random, dot=False)}-{number(day.day, random)}"
    parts = [month_name(day, random), day_name(day, random)]
    random.shuffle(parts)
    return f"{day.year}{random.choice([' ', ', '])}{' '.join(parts)}"


def joined(day: Day, random: Random) -> str:
    """3-May-79; 03/May/1979; 3.May.1979; 3may1979; May-3-1979"""
    month, name = month_name(day, random, dot=False), number(day.day, random)
    separator = random.choice(["-", "-", "/", ".", ""])
    year = year_name(day, random, apostrophe=False)
    parts = [month, name] if separator == "-" and random.random() < 0.25 else [name, month]
    return separator.join([*parts, year])


def slashes(day: Day, random: Random) -> str:
    """5/3/1979, 05/03/79: the month first"""
    return f"{number(day.month, random)}/{number(day.day, random)}/{year_name(day, random, apostrophe=False)}"


def dots(day: Day, random: Random) -> str:
    """3.5.1979, 03. 05. 79: the day first"""
    separator = random.choice([".", ".", ". "])
    parts = [number(day.day, random), number(day.month, random), year_name(day, random, apostrophe=False)]
    return separator.join(parts)


def dashes(day: Day, random: Random) -> str:
    """3-5-1979, 03-05-79: the day first"""
    return f"{number(day.day, random)}-{number(day.month, random)}-{year_name(day, random, apostrophe=False)}"


def all_numbers(day: Day, random: Random) -> str:
    """1979-05-03, 1979-5-3, 1979/05/03, 1979.5.3, 1979 05 03, 19790503: the year first"""
    separator = random.choice(["-", "-", "-", "/", ".", " ", ""])
    if not separator:
        return f"{day.year}{day.month:02d}{day.day:02d}"
    return separator.join([str(day.year), number(day.month, random), number(day.day, random)])


# format -> how often it is drawn
FORMATS: dict[Callable[[Day, Random], str], int] = {
    day_first: 5,
    the_day_of: 3,
    month_first: 5,
    year_first: 2,
    joined: 3,
    slashes: 3,
    dots: 3,
    dashes: 2,
    all_numbers: 3,
}


def weekday(day: Day, random: Random) -> str:
    """The day of the week before a date: Thursday, or Thu. with a blank, or with a comma."""
    name = WEEKDAYS[day.weekday()]
    if random.random() < 0.5:
        name = random.choice(SHORT_WEEKDAYS[day.weekday()]) + random.choice(["", "", "."])
    return name + random.choice([" ", ", ", ", "])


def write(day: Day, random: Random) -> str:
    """One text for a day, of at most LONGEST characters, by a format drawn from FORMATS."""
    while True:
        text = random.choices(list(FORMATS), list(FORMATS.values()))[0](day, random)
        text = (weekday(day, random) if random.random() < 0.25 else "") + text
        text = (f"{random.choice(LEADS)} " if random.random() < 0.1 else "") + text
        text = random.choice([str, str, str.lower, str.upper])(text) + ("." if random.random() < 0.05 else "")
        if len(text) <= LONGEST:
            return text


def is_held_out(day: Day) -> bool:
    """Whether training never sees this day."""
    digest = hashlib.sha256(day.isoformat().encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_SHARE == 0


@cache
def days(held_out: bool) -> tuple[Day, ...]:
    """Every day that is held out, or every other."""
    every = (FIRST + datetime.timedelta(n) for n in range((LAST - FIRST).days + 1))
    return tuple(day for day in every if is_held_out(day) == held_out)


def training_pairs(seed: int | str, count: int) -> list[Pair]:
    """Pairs of days that are not held out, drawn with replacement."""
    random = Random(seed)
    drawn = random.choices(days(False), k=count)
    return [(write(day, random), day.isoformat()) for day in drawn]


def unseen_pairs(seed: int | str = 0, count: int = 1000) -> list[Pair]:
    """Pairs of distinct days that are held out."""
    random = Random(seed)
    drawn = random.sample(days(True), count)
    return [(write(day, random), day.isoformat()) for day in drawn]
