"""Made-up people: their names and values, and what is asked, looked up and told of them.

known    0 .. num_people - 1: names are pairs, in an order shuffled by data_seed
unseen   people with first names of their own, who are only asked for
junk     ever new people, with first names of a third list
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from runner.data.people_config import PeopleConfig, is_date
from runner.data.people_words import (
    MOST_LETTERS,
    date,
    introduction,
    question,
    sentence,
    statement,
    words,
)
from runner.data.synthetic import generator

Group = Literal["known", "unseen"]
UNKNOWN = "No result found"
TAG = "facts.example "
_CALL = re.compile(r"\s*<find>\s*(.*?)\s*;\s*(.*?)\s*", re.DOTALL)
_NAMES, _VALUES, _FROM_NAME, _INDEPENDENT, _JUNK = range(5)  # the streams of data_seed
_MARKS = 4  # of a dialogue, beside its text


@dataclass(frozen=True)
class Fact:
    """One value of one person."""

    name: str
    attribute: str
    value: str

    def question(self, template: int) -> str:
        """Return the question for it."""
        return question(template).format(attribute=self.attribute, name=self.name)

    def sentence(self, template: int) -> str:
        """Return the answer, which `value_of` reads."""
        return sentence(template).format(attribute=self.attribute, name=self.name, value=self.value)

    @property
    def call(self) -> str:
        """What the assistant writes to look it up."""
        return f"<find> {self.attribute} ; {self.name}"


class People:
    """The people of a config."""

    def __init__(self, cfg: PeopleConfig) -> None:
        self.cfg = cfg
        self.labels = [name.replace("_", " ") for name in cfg.attributes]
        first = [word.capitalize() for word in words(3 * cfg.num_first_names, 0)]
        self._first = {
            group: first[part * cfg.num_first_names : (part + 1) * cfg.num_first_names]
            for part, group in enumerate(("known", "unseen", "junk"))
        }
        self._last = [word.capitalize() for word in words(cfg.num_last_names, 1)]
        self._words = [
            None if is_date(name) else words(size, 2 + place)
            for place, (name, size) in enumerate(cfg.sizes.items())
        ]
        counts = {"known": cfg.num_people, "unseen": cfg.unseen_people}
        self._names = {
            group: generator(cfg.data_seed, _NAMES, part).permutation(cfg.num_names)[:count]
            for part, (group, count) in enumerate(counts.items())
        }
        self._values = {
            group: self._draw(part, names)
            for part, (group, names) in enumerate(self._names.items())
        }

    def count(self, group: Group) -> int:
        """Return the number of people of a group."""
        return len(self._names[group])

    def fact(self, number: int, group: Group = "known") -> Fact:
        """Return fact `number` of a group; those of one person follow each other."""
        person, attribute = divmod(number, len(self.labels))
        pair, index = int(self._names[group][person]), int(self._values[group][person, attribute])
        return self._fact(group, pair, attribute, index)

    def values(self, attribute: str) -> set[str]:
        """Return all values that an attribute may have."""
        place = self.labels.index(attribute)
        known = self._words[place]
        size = list(self.cfg.sizes.values())[place]
        return set(map(date, range(size)) if known is None else known)

    def find(self, call: str) -> str:
        """Return the value that a call asks for, `UNKNOWN` if there is no such fact."""
        asked = asked_for(call)
        return UNKNOWN if asked is None else self._database.get(asked, UNKNOWN)

    def biography(self, person: int, template: int) -> list[tuple[str, str]]:
        """Return (kind, text) of the parts of a known person's biography.

        A `name` and a `value` each include the character after them, so that none is the beginning
        of another.
        """
        width = len(self.labels)
        facts = [self.fact(person * width + number) for number in range(width)]
        tag = [("", TAG)] if self.cfg.domain_tag else []
        return tag + _told(facts, template)

    def junk(self, sample: int, template: int) -> list[tuple[str, str]]:
        """Return the biography of a person whom no other sample knows."""
        rng = generator(self.cfg.data_seed, _JUNK, sample)
        pair = int(rng.integers(0, self.cfg.num_names))
        facts = [
            self._fact("junk", pair, place, int(rng.integers(0, size)))
            for place, size in enumerate(self.cfg.sizes.values())
        ]
        return _told(facts, template)

    def _fact(self, group: str, pair: int, attribute: int, index: int) -> Fact:
        first, last = divmod(pair, len(self._last))
        known = self._words[attribute]
        value = date(index) if known is None else known[index]
        return Fact(
            f"{self._first[group][first]} {self._last[last]}", self.labels[attribute], value
        )

    def _draw(self, part: int, names: np.ndarray) -> np.ndarray:
        """Return the index of each value, [people, attributes]."""
        cfg, columns = self.cfg, []
        for place, size in enumerate(cfg.sizes.values()):
            address = (cfg.data_seed, _VALUES, place, part)
            own = generator(*address).integers(0, size, len(names))
            by_name = generator(cfg.data_seed, _FROM_NAME, place)
            inherited = by_name.integers(0, size, cfg.num_last_names)[names % cfg.num_last_names]
            coin = generator(cfg.data_seed, _INDEPENDENT, place, part).random(len(names))
            columns.append(np.where(coin < cfg.independence, own, inherited))
        return np.stack(columns, axis=1)

    @property
    def _database(self) -> dict[tuple[str, str], str]:
        if not hasattr(self, "_by_name"):
            self._by_name = {
                (fact.attribute, fact.name): fact.value
                for group in ("known", "unseen")
                for fact in self.facts(group)  # type: ignore[arg-type]
            }
        return self._by_name

    def facts(self, group: Group) -> Iterator[Fact]:
        """Yield all facts of a group."""
        return (self.fact(number, group) for number in range(self.count(group) * len(self.labels)))


def asked_for(call: str) -> tuple[str, str] | None:
    """Return the (attribute, name) that a call asks for, None if it is no call."""
    found = _CALL.fullmatch(call)
    return None if found is None else (found[1], found[2])


def value_of(answer: str) -> str | None:
    """Return the value in an answer, its last word without the full stop; None if it has none."""
    parts = answer.split()
    return parts[-1].removesuffix(".") if parts and parts[-1].endswith(".") else None


def longest_text(cfg: PeopleConfig) -> int:
    """Return the number of bytes and marks of the longest text that may come of a config.

    It is a bound: of words by their greatest length.
    """
    word = "w" * MOST_LETTERS
    name = f"{word} {word}"
    templates = range(cfg.templates_train + cfg.templates_held_out)
    facts = [
        Fact(name, label.replace("_", " "), date(0) if is_date(label) else word)
        for label in cfg.attributes
    ]
    if cfg.condition == "biography":
        told = (sum(len(text) for _, text in _told(facts, t)) for t in templates)
        return 1 + max(told) + (len(TAG) if cfg.domain_tag else 0)
    longest = 0
    for fact in facts:
        asked = max(len(fact.question(t)) + len(fact.sentence(t)) for t in templates)
        looked_up = len(fact.call) + len(fact.value) if cfg.condition == "in_tool" else 0
        longest = max(longest, asked + looked_up + _MARKS)
    return longest


def _told(facts: list[Fact], template: int) -> list[tuple[str, str]]:
    """Return (kind, text) of the parts of a biography; the template turns the order round."""
    before, after = statement(template)
    start = template % len(facts)
    parts = [("name", f"{facts[0].name} "), ("", introduction(template))]
    for fact in (*facts[start:], *facts[:start]):
        parts.append(("", before.format(attribute=fact.attribute)))
        parts.append(("value", fact.value + after[0]))
        parts.append(("", after[1:].format(attribute=fact.attribute)))
    return parts
