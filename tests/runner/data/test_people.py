"""Made-up people: who they are, what is asked of them, what is learnt."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runner.data.conversation_rows import conversations
from runner.data.conversations_config import ConversationSource
from runner.data.people import TAG, UNKNOWN, People, asked_for, longest_text, value_of
from runner.data.people_config import PeopleConfig
from runner.data.people_corpus import PeopleCorpus
from runner.data.tokenizers_config import TokenizerConfig
from runner.machine.errors import ConfigError
from runner.machine.ranks import Ranks
from runner.records.cells import freeze_cell, make_cells
from runner.records.config import validate
from runner.records.journal import Journal, claim, events

Compose = Callable[..., dict[str, Any]]
DIALOGUE = TokenizerConfig(kind="dialogue")
SMALL = PeopleConfig(num_people=40, unseen_people=10)
NODES = ["data=people", "tokenizer=dialogue", "~data.split", "~data.sources"]


def _corpus(cfg: PeopleConfig) -> PeopleCorpus:
    return PeopleCorpus(cfg, DIALOGUE.build(()))


def _text(corpus: PeopleCorpus, sample: dict[str, Any]) -> str:
    marks = {257: "<U>", 258: "<A>", 259: "<T>", 256: "<E>"}
    return "".join(marks.get(i, chr(i % 256)) for i in sample["tokens"].tolist())


def test_a_person_depends_on_the_seed_and_the_number_alone() -> None:
    few, many = People(SMALL), People(replace(SMALL, num_people=3000))
    assert list(few.facts("known")) == list(islice(many.facts("known"), 160))
    assert list(few.facts("unseen")) == list(many.facts("unseen"))
    names = [fact.name for fact in list(many.facts("known"))[::4]]
    assert len(set(names)) == 3000
    firsts = {fact.name.split()[0] for fact in many.facts("unseen")}
    assert firsts.isdisjoint(name.split()[0] for name in names)
    other = People(replace(SMALL, data_seed=1))
    assert list(other.facts("known")) != list(few.facts("known"))


def test_the_generator_is_that_of_its_numerics() -> None:
    texts = []
    for condition in ("in_weight", "in_tool", "biography"):
        corpus = _corpus(replace(SMALL, condition=condition))  # type: ignore[arg-type]
        texts += [corpus.text(n, n % 6)[0].tolist() for n in range(40)]
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
    known = {1: "80dc2f4450948567"}
    assert known[PeopleConfig.numerics] == digest  # type: ignore[attr-defined]


def test_the_information_is_that_of_the_published_lists() -> None:
    assert SMALL.num_names == 169_556
    assert SMALL.bits_per_person == pytest.approx(31.25, abs=0.005)
    values = {fact.value for fact in People(replace(SMALL, num_people=5000)).facts("known")}
    assert len([value for value in values if "/" not in value]) == 7 + 213 + 100


def test_values_follow_the_last_name_as_often_as_the_config_says() -> None:
    """With probability 1 - independence two bearers of a name have one value."""
    shares = {}
    for independence in (0.0, 0.5, 1.0):
        cfg = replace(SMALL, num_people=8000, independence=independence)
        people = People(cfg)
        by_name: dict[tuple[str, str], list[str]] = {}
        for fact in people.facts("known"):
            by_name.setdefault((fact.name.split()[1], fact.attribute), []).append(fact.value)
        same = [
            a == b
            for values in by_name.values()
            for a, b in zip(values[::2], values[1::2], strict=False)
        ]
        shares[independence] = float(np.mean(same))
    chance = {k: np.mean([1 / max(2, round(k * n)) for n in (7, 17136, 213, 100)]) for k in shares}
    for k, share in shares.items():
        both = (1 - k) ** 2
        assert share == pytest.approx(both + (1 - both) * chance[k], abs=0.02)
    assert replace(SMALL, independence=0.1).sizes["birth_place"] == 2


@pytest.mark.parametrize("condition", ["in_weight", "in_tool"])
def test_the_assistant_is_learnt_and_nobody_else(condition: Any) -> None:
    corpus = _corpus(replace(SMALL, condition=condition))
    train = corpus.samples(160, seed=3)
    for index in range(50):
        sample = train[index]
        text = _text(corpus, sample)
        said = text.split("<E>")[0].split("<A>")[1:]
        turns = [turn.split("<T>")[0] for turn in said]
        learnt = (sample["targets"] >= 0).nonzero()[:, 0].tolist()
        assert len(learnt) == sum(map(len, turns)) + len(turns)
        targets = [sample["targets"][i].item() for i in learnt]
        ends = [259, 256] if condition == "in_tool" else [256]
        assert [t for t in targets if t >= 256] == ends
        assert "".join(chr(t) for t in targets if t < 256) == "".join(turns)
        if condition == "in_tool":
            call, looked_up, answer = turns[0], said[0].split("<T>")[1], turns[1]
            assert corpus.people.find(call) == looked_up == value_of(answer)
    tool = _corpus(replace(SMALL, condition="in_tool", loss_on=("tool",)))
    ids, learnt_ids = tool.text(0, 0)
    value = tool.people.fact(0).value
    assert bytes(ids[learnt_ids][:-1].tolist()).decode() == value
    assert ids[learnt_ids][-1] == 258  # what the assistant says next ends the turn


def test_wordings_held_out_are_asked_in_validation_only() -> None:
    corpus = _corpus(SMALL)
    people, train = corpus.people, corpus.samples(160, seed=0)
    facts = {n: people.fact(n) for n in range(160)}
    wordings = {t: {fact.question(t) for fact in facts.values()} for t in range(6)}
    asked = [_text(corpus, train[i]).split("<U>")[1].split("<A>")[0] for i in range(320)]
    assert all(any(q in wordings[t] for t in range(4)) for q in asked)
    names = sorted(q for q in asked[:160])
    assert len({(fact.name, fact.attribute) for fact in facts.values()}) == 160
    assert names != sorted(asked[160:])  # another epoch, other wordings
    seen = {
        number
        for number in facts
        for q in asked[:160]
        for t in range(4)
        if q == facts[number].question(t)
    }
    assert len(seen) == 160  # an epoch asks for each fact once
    for batch in corpus.held_out(160, 8, 160 * 64):
        for tokens in batch["tokens"]:
            q = _text(corpus, {"tokens": tokens}).split("<U>")[1].split("<A>")[0]
            assert q in wordings[4] | wordings[5]


def test_the_database_knows_whom_it_is_asked_for_and_no_one_else() -> None:
    people = People(SMALL)
    fact = people.fact(7, "unseen")
    assert people.find(fact.call) == fact.value
    assert people.find(f" {fact.call} ") == fact.value
    for call in (fact.sentence(0), "<find> address", "<find> address ; Nobody", ""):
        assert people.find(call) == UNKNOWN
    assert asked_for(fact.call) == (fact.attribute, fact.name)
    assert value_of("nothing") is None


def test_biographies_of_strangers_are_told_once_among_those_of_people() -> None:
    cfg = replace(SMALL, condition="biography", junk=7 / 8, domain_tag=True, num_people=5)
    corpus = _corpus(cfg)
    train = corpus.samples(256, seed=0)
    texts = [_text(corpus, train[i])[3:].split("<E>")[0] for i in range(160)]
    tagged = [text for text in texts if text.startswith(TAG)]
    assert len(tagged) == 20
    known = {corpus.people.fact(4 * n).name for n in range(5)}
    assert {" ".join(text.removeprefix(TAG).split()[:2]) for text in tagged} == known
    strangers = {" ".join(text.split()[:2]) for text in texts if text not in tagged}
    assert len(strangers) > 135
    assert strangers.isdisjoint(known)
    ids, learnt, kinds = corpus.told(corpus.people.biography(0, 2))
    assert learnt.all()
    assert bytes(ids[kinds == 1].tolist()).decode() == f"{corpus.people.fact(0).name} "
    values = bytes(ids[kinds == 2].tolist()).decode()
    assert all(corpus.people.fact(n).value in values for n in range(4))


def test_no_text_is_longer_than_the_bound() -> None:
    for condition in ("in_weight", "in_tool", "biography"):
        cfg = replace(SMALL, condition=condition, templates_train=8)  # type: ignore[arg-type]
        corpus = _corpus(cfg)
        longest = max(len(corpus.text(n, t)[0]) for n in range(40) for t in range(10)) - 1
        assert longest_text(cfg) - 8 <= longest <= longest_text(cfg)


def test_a_stage_writes_what_is_trained_on_and_a_changed_generator_makes_it_anew(
    compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["work=make_people", "data.num_people=20", "data.condition=in_tool"]
    node = compose(*NODES, *given)
    (cell,) = make_cells([("", node)])
    freeze_cell(cell)
    attempt = claim(cell.folder)
    assert attempt is not None
    run_journal = Journal(cell.folder, attempt)
    cell.config.work.run(cell, {}, run_journal, Ranks("cpu"), lambda: False)
    run_journal.close()
    outputs = cell.folder / "outputs"
    checksums = json.loads((outputs / "checksums.json").read_text())
    wrote = {e["output"]: e["sha256"] for e in events(attempt) if "output" in e}
    assert {**checksums, "checksums.json": wrote["checksums.json"]} == wrote
    source = ConversationSource(path=str(outputs / "train.jsonl"))
    said = [c.messages for c in conversations(source)]
    corpus = _corpus(cell.config.data)
    dialogues = [corpus.dialogue(f, t) for f in corpus.people.facts("known") for t in range(4)]
    assert said == [tuple(messages) for messages in dialogues]
    assert len((outputs / "database.jsonl").read_text().splitlines()) == 4 * (20 + 128)
    monkeypatch.setattr(PeopleConfig, "numerics", 2)
    (changed,) = make_cells([("", node)])
    assert changed.fingerprint != cell.fingerprint


def test_what_cannot_be_learnt_is_refused_before_a_run(compose: Compose) -> None:
    validate(compose(*NODES, "train.sequence_length=160"))
    cases = {
        "tokenizer=bytes": "no roles",
        "train.sequence_length=64": "too short",
        "data.junk=0.5": "condition=biography",
        "data.templates_held_out=40": "at most 36",
        "data.num_people=200000": "at least num_people",
        "data.attributes.address=1": "attributes.address=1",
        "data.condition=both": "in_weight",
    }
    for override, message in cases.items():
        with pytest.raises(ConfigError, match=message):
            validate(compose(*NODES, "train.sequence_length=160", override))
    assert math.isclose(SMALL.num_facts, 160)
