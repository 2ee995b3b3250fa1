"""Names, values and sentences of made-up people: syllables and templates, nobody and nowhere real.

Words are drawn from a fixed stream for each list, so that a longer list begins with a shorter one.
"""

from runner.data.synthetic import generator

_ONSETS = "bdfghjklmnprstvwz"
_VOWELS = "aeiou"
_LAST = ("bd", "dv", "gd", "jk", "kv", "lz", "mf", "pk", "tz", "vk", "zd")  # as no real name ends
MOST_LETTERS = 8
_STREAM = 70

QUESTIONS = (
    "What is the {attribute} of {name}?",
    "Tell me the {attribute} of {name}.",
    "{name}: what is the {attribute}?",
    "Which {attribute} does {name} have?",
    "I need to know the {attribute} of {name}.",
    "Of {name} say the {attribute}.",
)
OPENINGS = ("", "Hello. ", "A question: ", "Quickly, please. ", "Hi there! ", "Now then. ")
SENTENCES = (
    "The {attribute} of {name} is {value}.",
    "{name} has the {attribute} {value}.",
    "It is said of {name}, {attribute}: {value}.",
)
INTRODUCTIONS = (
    "is in our files.",
    "was asked yesterday.",
    "comes from afar.",
    "wrote a letter.",
    "sits at the table.",
    "sings at night.",
)
STATEMENTS = (
    " The {attribute} is {value}.",
    " As {attribute} they give {value}.",
    " Their {attribute}: {value}.",
    " We noted {value}, the {attribute}.",
    " Asked for the {attribute}, they say {value}.",
    " One knows the {attribute} to be {value}.",
)
NUM_TEMPLATES = len(QUESTIONS) * len(OPENINGS)
_DAYS, _MONTHS, _FIRST_YEAR = 28, 12, 1950


def words(count: int, which: int) -> list[str]:
    """Return `count` different words of two or three syllables, the beginning of list `which`."""
    rng = generator(_STREAM, which)
    found: dict[str, None] = {}
    while len(found) < count:
        numbers = rng.integers(0, 1 << 30, 8).tolist()
        syllables = "".join(
            _ONSETS[onset % len(_ONSETS)] + _VOWELS[vowel % len(_VOWELS)]
            for onset, vowel in zip(numbers[:3], numbers[3:6], strict=True)
        )
        found[syllables[2 * (numbers[6] % 2) :] + _LAST[numbers[7] % len(_LAST)]] = None
    return list(found)


def date(number: int) -> str:
    """Return day `number` as DD/MM/YYYY; months have 28 days, and the first year is 1950."""
    month, day = divmod(number, _DAYS)
    year, month = divmod(month, _MONTHS)
    return f"{day + 1:02d}/{month + 1:02d}/{_FIRST_YEAR + year}"


def question(template: int) -> str:
    """Return the question of a template, with the fields `attribute` and `name`."""
    return OPENINGS[template // len(QUESTIONS)] + QUESTIONS[template % len(QUESTIONS)]


def sentence(template: int) -> str:
    """Return the answer of a template: it ends with the field `value` and a full stop."""
    return SENTENCES[template % len(SENTENCES)]


def introduction(template: int) -> str:
    """Return what follows the name in a biography."""
    return INTRODUCTIONS[template % len(INTRODUCTIONS)]


def statement(template: int) -> tuple[str, str]:
    """Return what a biography writes before and after a value, with the field `attribute`."""
    turn = template + template // len(INTRODUCTIONS)
    before, _, after = STATEMENTS[turn % len(STATEMENTS)].partition("{value}")
    return before, after
