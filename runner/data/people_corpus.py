"""Dialogues about made-up people, or their biographies, as samples.

Which text is sample i is a function of (seed, i); a sample is one text, padded.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch.utils.data import Dataset

from runner.data.chat_template import Message
from runner.data.corpus import Sample, encode_literally, start_id
from runner.data.dialogue_format import DialogueFormat, dialogue_format, given_spans
from runner.data.people import Fact, Group, People
from runner.data.people_config import PeopleConfig
from runner.data.synthetic import generator
from runner.data.tokenizers import Tokenizer
from runner.machine.errors import DataError

_NO_TARGET = -100
_HELD_OUT = 5  # a stream of data_seed, beside those of the people


@dataclass(frozen=True)
class PeopleCorpus:
    """See `Corpus`."""

    cfg: PeopleConfig
    tokenizer: Tokenizer
    bytes_per_counted_byte: float = 1.0

    @cached_property
    def people(self) -> People:
        """The people whose texts these are."""
        return People(self.cfg)

    @cached_property
    def format(self) -> DialogueFormat:
        """How the tokenizer writes dialogues."""
        return dialogue_format(self.tokenizer, self.cfg.loss_on)

    def samples(self, seq: int, seed: int) -> Dataset[Sample]:
        """See `Corpus`."""
        return PeopleSamples(self, seq, seed)

    def held_out(self, seq: int, batch: int, max_tokens: int) -> Iterator[Sample]:
        """See `Corpus`: texts of known people in held-out wordings, if there are any."""
        cfg, count = self.cfg, max(1, min(self.cfg.num_val, max_tokens // seq))
        texts = generator(cfg.data_seed, _HELD_OUT).integers(0, self.num_texts, count).tolist()
        first = cfg.templates_train if cfg.templates_held_out else 0
        templates = [first + n % max(1, cfg.templates_held_out) for n in range(count)]
        for start in range(0, count, batch):
            rows = [
                self.sample(*self.text(texts[n], templates[n]), seq, n)
                for n in range(start, min(start + batch, count))
            ]
            yield {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    @property
    def num_texts(self) -> int:
        """The number of facts, of biographies that of people."""
        biographies = self.cfg.condition == "biography"
        return self.cfg.num_people if biographies else self.cfg.num_facts

    def text(self, number: int, template: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of text `number` in a wording, and of each whether it is learnt."""
        if self.cfg.condition == "biography":
            return self.told(self.people.biography(number, template))[:2]
        return self.format.render(self.dialogue(self.people.fact(number), template))

    def sample(self, ids: np.ndarray, learnt: np.ndarray, seq: int, index: int) -> Sample:
        """Return a text as the sample `index`."""
        sample = _padded(ids, learnt, seq, self.tokenizer.eos, index)
        if self.cfg.bidirectional_prompt:
            spans = np.zeros(seq, dtype=np.int64)
            spans[: len(ids) - 1] = given_spans(learnt)[:-1]
            sample["spans"] = torch.from_numpy(spans)
        return sample

    def dialogue(self, fact: Fact, template: int) -> list[Message]:
        """Return the dialogue about a fact."""
        return dialogue(fact, template, in_tool=self.cfg.condition == "in_tool")

    def prompt(self, number: int, template: int, group: Group = "known") -> list[int]:
        """Return the ids of a question, up to where the assistant begins to speak."""
        return self.format.prompt(self.dialogue(self.people.fact(number, group), template)[:1])

    def told(self, parts: list[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (ids, whether learnt, kind) of a biography; kind is 1 in names, 2 in values."""
        kinds, ids = [0], [start_id(self.tokenizer)]
        for kind, text in parts:
            own = encode_literally(self.tokenizer, text).tolist()
            ids += own
            kinds += [{"": 0, "name": 1, "value": 2}[kind]] * len(own)
        learnt = np.ones(len(ids) + 1, dtype=np.bool_)
        return np.array([*ids, self.tokenizer.eos]), learnt, np.array([*kinds, 0])


class PeopleSamples(Dataset[Sample]):
    """The training set; an epoch has each text once, in a wording drawn for it."""

    def __init__(self, corpus: PeopleCorpus, seq: int, seed: int) -> None:
        self.corpus, self.seq, self.seed = corpus, seq, seed
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def __getitem__(self, index: int) -> Sample:
        cfg, corpus = self.corpus.cfg, self.corpus
        useful = 1.0 - cfg.junk
        before, after = int(index * useful + 1e-9), int((index + 1) * useful + 1e-9)
        if before == after:
            template = index % cfg.templates_train
            ids, learnt, _ = corpus.told(corpus.people.junk(index, template))
        else:
            number, template = self._choose(before)
            ids, learnt = corpus.text(number, template)
        return corpus.sample(ids, learnt, self.seq, index)

    def _choose(self, index: int) -> tuple[int, int]:
        """Return (text, template) of text `index` of all epochs."""
        count = self.corpus.num_texts
        epoch, place = divmod(index, count)
        if self._epoch is None or self._epoch[0] != epoch:
            rng = generator(self.seed, epoch)
            order = rng.permutation(count)
            self._epoch = epoch, order, rng.integers(0, self.corpus.cfg.templates_train, count)
        _, order, templates = self._epoch
        return int(order[place]), int(templates[place])


def dialogue(fact: Fact, template: int, *, in_tool: bool) -> list[Message]:
    """Return the messages of a dialogue about a fact, with or without a call."""
    looked_up = [("assistant", fact.call), ("tool", fact.value)] if in_tool else []
    turns = [
        ("user", fact.question(template)),
        *looked_up,
        ("assistant", fact.sentence(template)),
    ]
    return [{"role": role, "content": text} for role, text in turns]


def _padded(ids: np.ndarray, learnt: np.ndarray, seq: int, eos: int, index: int) -> Sample:
    if len(ids) - 1 > seq:
        raise DataError(
            f"a text of data=people has {len(ids)} tokens, more than train.sequence_length={seq} "
            f"and its target; raise it to {len(ids)}"
        )
    tokens, targets = np.full(seq, eos), np.full(seq, _NO_TARGET)
    tokens[: len(ids) - 1] = ids[:-1]
    targets[: len(ids) - 1] = np.where(learnt[1:], ids[1:], _NO_TARGET)
    return {
        "tokens": torch.from_numpy(tokens),
        "targets": torch.from_numpy(targets),
        "documents": torch.zeros(seq, dtype=torch.int64),
        "index": torch.tensor(index),
    }
