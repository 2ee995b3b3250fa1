"""The files that a run writes about itself before its first step."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from models.precision import Precision
from runner.machine import storage
from runner.machine.environment import changes, describe, first_record
from runner.machine.ranks import Ranks
from runner.records.budget import Budget
from runner.records.cells import Cell
from runner.records.drift import note_code
from runner.records.journal import Journal


def note_environment(journal: Journal, cell: Cell, ranks: Ranks, **facts: Any) -> None:
    """Write environment.json and code.json of this attempt.

    If they differ from the first attempt's in a way that changes bits, print and record the
    differences.
    """
    train, first = cell.config.train, first_record(cell.folder)
    record = describe() | {"world": ranks.world, "device": str(ranks.device)} | facts
    if train is not None:
        record |= {"parallel": train.parallel, "compile": train.compile}
    edited = note_code(journal.attempt, cell)
    differing = [*changes(first, record), *([edited] if edited else [])]
    if differing:
        journal.event("not_bit_identical", changes=differing)
        print(f"resumed, but not bit-identically: {'; '.join(differing)}", file=sys.stderr)
    storage.write_atomically(journal.attempt / "environment.json", json.dumps(record, indent=1))


def write_summary(folder: Path, budget: Budget, precision: Precision, tokenizer: Any) -> None:
    """Write summary.json, precision.json and tokenizer.json; analysis never recomputes them."""
    texts = {"summary.json": json.dumps(asdict(budget), indent=1)}
    table = [asdict(choice) for choice in precision.table]
    if table:
        texts["precision.json"] = json.dumps(table, indent=1)
    texts["tokenizer.json"] = tokenizer.dumps()
    for name, text in texts.items():  # launchers read them while a resumed run writes them again
        storage.write_atomically(folder / name, text)
