"""The config of made-up people with attributes; see `runner/data/people.py`."""

import math
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from models.config import config, execution, neutral
from runner.data.conversations_config import Role, check_roles
from runner.data.tokenizers_config import TokenizerConfig

if TYPE_CHECKING:
    from runner.data.people_corpus import PeopleCorpus

Condition = Literal["in_weight", "in_tool", "biography"]
_FACTS = {"birth_place": 7, "birth_date": 28 * 12 * 51, "address": 213, "occupation": 100}
_MOST_NAMES = 1 << 24  # pairs of a first and a last name: they are shuffled in memory
_DATE, _YEAR = "date", 28 * 12


@config
class PeopleConfig:
    """Questions about made-up people, or their biographies; the facts are known exactly.

    Person i is a function of (data_seed, i), a text of the person, the attribute and the template.
    A sample is one text, padded. Questions are the same in both conditions:

        in_weight   user question | assistant sentence
        in_tool     user question | assistant <find> attribute ; name | tool value | assistant ...
        biography   name, then each value in a sentence; all of it is learnt

    Dialogues need tokenizer=dialogue or a tokenizer with a chat template.

    Args:
        condition: in_weight, in_tool or biography, as above.
        num_people: people whose facts are to be learnt.
        attributes: {name: number of values}. One whose name ends with "date" has dates, in years of
            12 months of 28 days; other values are words.
        num_first_names, num_last_names: a name is a pair of them, and each is one person's.
        templates_train, templates_held_out: wordings to train on, and others to ask in.
        independence: the probability that a value is drawn on its own; otherwise it follows from
            the last name. Each attribute has max(2, independence x number) values.
        unseen_people: people who are only asked for; they have first names of their own.
        junk: the share of samples that are biographies of ever new people (condition=biography).
        domain_tag: begin the other biographies with a tag.
        loss_on: the roles whose turns are learnt, each with the token that ends it.
        bidirectional_prompt: tokens of a stretch that the assistant has not written see each other
            (prefix-LM); between stretches attention stays causal. The model must be of attention.
        num_val: texts of validation: known people in held-out wordings.
        data_seed: of the people (the run's seed orders the texts).
        num_workers: processes that make samples beside the training process.
    """

    sources: ClassVar[tuple[Any, ...]] = ()
    mask_documents: ClassVar[bool] = False
    reads_template: ClassVar[bool] = True

    condition: Condition = "in_weight"
    num_people: int = 512
    attributes: dict[str, int] = field(default_factory=lambda: dict(_FACTS), hash=False)
    num_first_names: int = 437
    num_last_names: int = 388
    templates_train: int = 4
    templates_held_out: int = 2
    independence: float = 1.0
    unseen_people: int = 128
    junk: float = 0.0
    domain_tag: bool = False
    loss_on: tuple[Role, ...] = ("assistant",)
    bidirectional_prompt: bool = neutral(False)
    num_val: int = 256
    data_seed: int = 0
    num_workers: int = execution(0)

    def __post_init__(self) -> None:
        for name in ("num_people", "templates_train", "num_val", "num_first_names"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.attributes:
            raise ValueError("attributes is empty; name at least one, as address: 213")
        for name, size in self.attributes.items():
            most = 100 * _YEAR if is_date(name) else 1 << 16
            if not 2 <= size <= most:
                raise ValueError(f"attributes.{name}={size} must lie in 2 to {most}")
        names = self.num_first_names * self.num_last_names
        if not max(self.num_people, self.unseen_people) <= names <= _MOST_NAMES:
            raise ValueError(
                f"num_first_names={self.num_first_names} x num_last_names={self.num_last_names} "
                f"must be at least num_people={self.num_people} and "
                f"unseen_people={self.unseen_people}, and at most {_MOST_NAMES}"
            )
        self._check_templates()
        if not 0.0 <= self.independence <= 1.0:
            raise ValueError(f"independence={self.independence} must lie in [0, 1]")
        if not 0.0 <= self.junk < 1.0:
            raise ValueError(f"junk={self.junk} must lie in [0, 1)")
        if (self.junk or self.domain_tag) and self.condition != "biography":
            raise ValueError(
                f"junk={self.junk} and domain_tag={self.domain_tag} are of biographies; leave them "
                f"out of condition={self.condition}, or take condition=biography"
            )
        if self.bidirectional_prompt and self.condition == "biography":
            raise ValueError(
                "bidirectional_prompt=true is of dialogues, and a biography has no prompt; leave "
                "one out"
            )
        check_roles(self.loss_on, bidirectional=self.bidirectional_prompt)

    def _check_templates(self) -> None:
        from runner.data.people_words import NUM_TEMPLATES  # noqa: PLC0415

        total = self.templates_train + self.templates_held_out
        if self.templates_held_out < 0 or total > NUM_TEMPLATES:
            raise ValueError(
                f"templates_train={self.templates_train} and "
                f"templates_held_out={self.templates_held_out} must be at most {NUM_TEMPLATES} "
                "together"
            )

    @property
    def sizes(self) -> dict[str, int]:
        """The number of values of each attribute."""
        return {
            name: max(2, round(self.independence * size)) for name, size in self.attributes.items()
        }

    @property
    def num_names(self) -> int:
        """N0, the number of names that a person may have."""
        return self.num_first_names * self.num_last_names

    @property
    def bits_per_person(self) -> float:
        """log2 S0, the information in one person's values, drawn independently."""
        return sum(math.log2(size) for size in self.sizes.values())

    @property
    def num_facts(self) -> int:
        """The number of facts: values of the people to learn."""
        return self.num_people * len(self.attributes)

    def content_hash(self) -> list[str]:
        """Return []: the data follow from the config alone."""
        return []

    def check(self, tokenizer: Any, seq: int) -> None:
        """Raise ValueError for a tokenizer without roles, or a sequence too short for a text."""
        if not isinstance(tokenizer, TokenizerConfig):
            return
        if self.condition != "biography" and tokenizer.kind not in ("dialogue", "folder"):
            raise ValueError(
                f"data.condition={self.condition} is of dialogues, and tokenizer.kind="
                f"{tokenizer.kind} has no roles; use tokenizer=dialogue, or tokenizer=folder with "
                "a chat template"
            )
        if tokenizer.kind == "symbols":
            raise ValueError("data=people is text; use tokenizer=dialogue, not tokenizer=symbols")
        if tokenizer.kind in ("dialogue", "bytes"):
            from runner.data.people import longest_text  # noqa: PLC0415

            longest = longest_text(self)
            if longest > seq:
                raise ValueError(
                    f"train.sequence_length={seq} is too short for a text of data=people with "
                    f"{longest} bytes and marks; raise it to {longest}"
                )

    def build(self, tokenizer: Any, cache: Path, hashes: list[str] | None = None) -> "PeopleCorpus":
        """Return the corpus; nothing is cached, so `cache` and `hashes` are not used."""
        from runner.data.people_corpus import PeopleCorpus  # noqa: PLC0415

        return PeopleCorpus(self, tokenizer.build(()))


def is_date(attribute: str) -> bool:
    """Return whether the values of an attribute are dates."""
    return attribute.endswith(_DATE)
