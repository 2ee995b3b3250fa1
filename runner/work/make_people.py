"""Texts and database of data=people as files, for other tools and for data=conversations."""

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from runner.data.people import People
from runner.data.people_config import PeopleConfig
from runner.data.people_corpus import dialogue
from runner.machine.errors import ConfigError
from runner.machine.ranks import Ranks
from runner.records.cells import Cell
from runner.records.contracts import Inputs, Outcome
from runner.records.journal import Journal
from runner.work.notes import note_environment
from runner.work.outputs import write_output


def make_people(
    cell: Cell, inputs: Inputs, journal: Journal | None, ranks: Ranks, stop: Callable[[], bool]
) -> Outcome:
    """Write train.jsonl, held_out.jsonl, database.jsonl and checksums.json, their sha256 by name.

    A line of train.jsonl is a dialogue, {"messages": [...], "name", "attribute", "value",
    "template"}, or a biography, {"text", "name", "template"}: each person in each wording.

    Raises:
        ConfigError: the data of the run are not people.
    """
    cfg = cell.config.data
    if not isinstance(cfg, PeopleConfig):
        raise ConfigError(f"work=make_people writes data=people, not {type(cfg).__name__}")
    if journal is None:
        return "finished"
    note_environment(journal, cell, ranks)
    people, checksums = People(cfg), {}
    first = cfg.templates_train
    files = {
        "train.jsonl": _texts(people, range(first)),
        "held_out.jsonl": _texts(people, range(first, first + cfg.templates_held_out)),
        "database.jsonl": _database(people),
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_output(cell.folder, name, text, journal)
        checksums[name] = hashlib.sha256(text.encode()).hexdigest()
    write_output(cell.folder, "checksums.json", json.dumps(checksums, indent=1) + "\n", journal)
    journal.metrics(0, {"facts": cfg.num_facts})
    return "finished"


def _texts(people: People, templates: range) -> Iterator[dict[str, Any]]:
    cfg = people.cfg
    if cfg.condition == "biography":
        for person in range(cfg.num_people):
            for template in templates:
                parts = people.biography(person, template)
                text = "".join(part for _, part in parts)
                name = people.fact(person * len(people.labels)).name
                yield {"text": text, "name": name, "template": template}
        return
    for fact in people.facts("known"):
        for template in templates:
            messages = dialogue(fact, template, in_tool=cfg.condition == "in_tool")
            yield {"messages": messages, **vars(fact), "template": template}


def _database(people: People) -> Iterator[dict[str, Any]]:
    for group in ("known", "unseen"):
        for fact in people.facts(group):  # type: ignore[arg-type]
            yield {**vars(fact), "group": group}
