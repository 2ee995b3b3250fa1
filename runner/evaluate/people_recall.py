"""Recall of facts about made-up people: by generation, exactly, and teacher-forced.

    recall              the value in the last turn is that of the database
    call_accuracy       the call asks for the attribute and the name that the question asks for
    copy_accuracy       of those whose call was right: the value is that of the tool's answer
    hallucinated        of questions that the database cannot answer: a value is given all the same
    value_accuracy      the value's tokens are the likeliest, each given the true text before it

Each is of known or unseen people, in wordings of training or held-out ones:
recall/unseen_held_out. `recall` alone is that of known people in wordings of training.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch

from models.contract import logits
from runner.data.corpus import end_ids, prompt_sees_itself
from runner.data.dialogue_format import given_spans
from runner.data.people import UNKNOWN, Fact, Group, asked_for, value_of
from runner.data.people_corpus import PeopleCorpus
from runner.evaluate.people_config import PeopleRecallConfig, people_of
from runner.generate.database import DatabaseConfig
from runner.generate.generate import Completion
from runner.generate.over_ranks import generate_over_ranks
from runner.generate.sampling import Sampling
from runner.generate.tools import Tools, tools_for
from runner.records.contracts import Trained

_SPARE = 8  # tokens that an answer may be longer than the true one


@dataclass(frozen=True)
class Asked:
    """A question that was answered.

    Args:
        turns: the texts of the turns after it: call, tool's answer, answer.
    """

    fact: Fact
    turns: list[str]

    @property
    def right(self) -> bool:
        """Whether the value is that of the database."""
        return bool(self.turns) and value_of(self.turns[-1]) == self.fact.value

    @property
    def called(self) -> bool:
        """Whether the right call was made."""
        wanted = (self.fact.attribute, self.fact.name)
        return len(self.turns) > 1 and asked_for(self.turns[0]) == wanted


def measure_recall(cfg: PeopleRecallConfig, trained: Trained) -> dict[str, float]:
    """Return the values of the file's head, and the bounds of `recall` at 95% (Wilson)."""
    people = people_of(cfg, trained)
    corpus = PeopleCorpus(people, trained.corpus.tokenizer)
    wordings = {"train": range(people.templates_train)}
    if people.templates_held_out:
        first = people.templates_train
        wordings["held_out"] = range(first, first + people.templates_held_out)
    values: dict[str, float] = {}
    groups: tuple[Group, ...] = ("known", "unseen") if people.unseen_people else ("known",)
    for group in groups:
        for wording, templates in wordings.items():
            values |= _part(cfg, trained, corpus, group, templates, f"{group}_{wording}")
    if not cfg.answers:
        return values
    count = _count(cfg, corpus, "known")
    low, high = wilson(round(values["recall/known_train"] * count), count)
    values |= {"recall": values["recall/known_train"], "recall_low": low, "recall_high": high}
    if people.condition == "in_tool":
        nobody = tools_for([_Empty()], corpus.tokenizer)
        asked = _ask(cfg, trained, corpus, groups[-1], wordings["train"], nobody)
        values["hallucinated"] = _share(_invents(corpus, one) for one in asked)
    return values


def _part(
    cfg: PeopleRecallConfig,
    trained: Trained,
    corpus: PeopleCorpus,
    group: Group,
    templates: Sequence[int],
    name: str,
) -> dict[str, float]:
    """Return the values of one group in some wordings, under `name`."""
    forced = _value_accuracy(cfg, trained, corpus, group, templates)
    values = {f"value_accuracy/{name}": forced}
    if not cfg.answers:
        return values
    in_tool = corpus.cfg.condition == "in_tool"
    tools = None
    if in_tool:
        tools = tools_for([DatabaseConfig(people=corpus.cfg)], corpus.tokenizer)
    asked = _ask(cfg, trained, corpus, group, templates, tools)
    values[f"recall/{name}"] = _share(one.right for one in asked)
    if in_tool:
        called = [one for one in asked if one.called]
        values[f"call_accuracy/{name}"] = len(called) / len(asked)
        if called:
            values[f"copy_accuracy/{name}"] = _share(one.right for one in called)
    return values


def _count(cfg: PeopleRecallConfig, corpus: PeopleCorpus, group: Group) -> int:
    """Return the number of facts that are asked for."""
    return min(cfg.num_people, corpus.people.count(group)) * len(corpus.people.labels)


def _ask(
    cfg: PeopleRecallConfig,
    trained: Trained,
    corpus: PeopleCorpus,
    group: Group,
    templates: Sequence[int],
    tools: Tools | None,
) -> list[Asked]:
    """Ask for each fact once, in the wordings by turns."""
    facts = [corpus.people.fact(n, group) for n in range(_count(cfg, corpus, group))]
    asked = [templates[n % len(templates)] for n in range(len(facts))]
    device = trained.ranks.device
    prompts = [
        torch.tensor(corpus.prompt(n, template, group), device=device)
        for n, template in enumerate(asked)
    ]
    whole = [
        len(corpus.format.render(corpus.dialogue(fact, template))[0])
        for fact, template in zip(facts, asked, strict=True)
    ]
    longest = max(n - len(prompt) for n, prompt in zip(whole, prompts, strict=True)) + _SPARE
    done = generate_over_ranks(
        trained.ranks,
        trained.model,
        prompts,
        Sampling(max_new_tokens=longest, temperature=0.0),
        rows=cfg.rows,
        context=max(whole) + _SPARE,
        decode=corpus.tokenizer.decode,
        ends=end_ids(corpus.tokenizer),
        tools=tools,
        bidirectional=prompt_sees_itself(trained.cfg.data),
    )
    return [Asked(f, _turns(corpus, c)) for f, c in zip(facts, done, strict=True)]


def _turns(corpus: PeopleCorpus, completion: Completion) -> list[str]:
    """Return the texts of the turns of a completion; a tool's are what was forced."""
    turns: list[list[int]] = [[]]
    before = False
    for index, forced in zip(completion.ids, completion.forced, strict=True):
        if forced != before:
            turns.append([])
            before = forced
        turns[-1].append(index)
    return [corpus.tokenizer.decode(ids).strip() for ids in turns]


@torch.no_grad()
def _value_accuracy(
    cfg: PeopleRecallConfig,
    trained: Trained,
    corpus: PeopleCorpus,
    group: Group,
    templates: Sequence[int],
) -> float:
    """Return the share of values whose tokens are each the likeliest; every rank computes all."""
    right, count = 0, _count(cfg, corpus, group)
    for first in range(0, count, cfg.rows):
        rows, spans, places = [], [], []
        for n in range(first, min(first + cfg.rows, count)):
            fact = corpus.people.fact(n, group)
            asked = corpus.dialogue(fact, templates[n % len(templates)])
            ids, learnt = corpus.format.render(asked)
            spans.append(torch.from_numpy(given_spans(learnt)))
            rows.append(torch.from_numpy(ids.astype("int64")))
            places.append(_place_of_value(corpus, ids.tolist(), fact.value))
        tokens, given = (
            torch.nn.utils.rnn.pad_sequence(parts, batch_first=True) for parts in (rows, spans)
        )
        device, bidirectional = trained.ranks.device, prompt_sees_itself(trained.cfg.data)
        with trained.precision.autocast():
            scores = logits(
                trained.model,
                tokens[:, :-1].to(device),
                spans=given[:, :-1].to(device) if bidirectional else None,
            )
        likeliest = scores.argmax(dim=-1).cpu()
        for row, (begin, end) in enumerate(places):
            right += bool((likeliest[row, begin - 1 : end - 1] == tokens[row, begin:end]).all())
    return right / count


def _place_of_value(corpus: PeopleCorpus, ids: list[int], value: str) -> tuple[int, int]:
    """Return (begin, end) of the last ids that spell a value."""
    decode = corpus.tokenizer.decode
    begin = next(n for n in range(len(ids) - 1, -1, -1) if value in decode(ids[n:]))
    end = next(n for n in range(begin + 1, len(ids) + 1) if value in decode(ids[begin:n]))
    return begin, end


class _Empty:
    """A database that knows nobody."""

    def __call__(self, text: str) -> str:
        return UNKNOWN


def _invents(corpus: PeopleCorpus, asked: Asked) -> bool:
    """Return whether a value of the attribute was given."""
    given = value_of(asked.turns[-1]) if asked.turns else None
    return given is not None and given in corpus.people.values(asked.fact.attribute)


def _share(flags: Iterable[bool]) -> float:
    counted = list(flags)
    return sum(counted) / len(counted)


def wilson(right: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """Return the bounds of a share at a confidence level (Wilson, 1927)."""
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share, spread = right / count, z * z / count
    middle = share + spread / 2
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    return (middle - half) / (1 + spread), (middle + half) / (1 + spread)
