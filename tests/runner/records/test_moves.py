"""A run keeps its name when the class of a config moves to another file."""

import json
import sys
import types
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from models import moves
from models.config import config, neutral, plain, released_name, target_class
from runner.data.benchmark_files import content_hash
from runner.records.cells import make_cells
from runner.records.config import validate
from runner.records.fingerprint import evaluation_key

RELEASED = json.loads(Path(__file__).with_name("released_targets.json").read_text())


@pytest.mark.parametrize("target", RELEASED)
def test_every_released_target_resolves_and_hashes_as_it_did(target: str) -> None:
    cls = target_class(target)
    assert is_dataclass(cls)
    assert released_name(cls) == target


def test_every_config_class_of_conf_is_in_the_list(compose: Callable[..., dict[str, Any]]) -> None:
    root = Path(__file__).parents[3]
    named = {
        line.partition("_target_:")[2].strip(" }")
        for file in root.glob("conf/**/*.yaml")
        for line in file.read_text().splitlines()
        if "_target_:" in line
    }
    ours = {released_name(target_class(t)) for t in named if not t.startswith("hydra_plugins")}
    assert ours <= set(RELEASED), "add what is new to released_targets.json; entries stay for ever"


def test_a_class_that_moves_keeps_fingerprints_and_frozen_cells(
    compose: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = compose()
    (before,) = make_cells([("", node)])
    old = node["schedule"]["_target_"]
    moved = types.ModuleType("moved_schedule")
    cls = config(type("ScheduleConfig", (target_class(old),), {"__module__": "moved_schedule"}))
    monkeypatch.setattr(moved, "ScheduleConfig", cls, raising=False)
    monkeypatch.setitem(sys.modules, "moved_schedule", moved)
    first_used = released_name(target_class(old))
    monkeypatch.setitem(moves.MOVED, first_used, "moved_schedule.ScheduleConfig")
    node["schedule"]["_target_"] = "moved_schedule.ScheduleConfig"
    (after,) = make_cells([("", node)])
    assert after.fingerprint == before.fingerprint
    node["schedule"]["_target_"] = first_used
    assert type(validate(node).schedule) is cls


def test_a_foreign_class_that_moved_is_hashed_under_its_first_name() -> None:
    @config
    class Bigram:
        released_as = "mylab.old.Bigram"
        width: int = 8

    assert released_name(Bigram) == "mylab.old.Bigram"
    assert plain(Bigram(), target=True)["_target_"].endswith("Bigram")


def test_a_benchmark_keeps_its_hash_when_its_functions_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "sums.yaml"
    own.write_text("task: sums\ndoc_to_text: !function old.rows.text\n")
    monkeypatch.setitem(sys.modules, "new_rows", types.SimpleNamespace(text=str))  # type: ignore[arg-type]
    monkeypatch.setitem(moves.MOVED, "old.rows.text", "new_rows.text")
    before = content_hash(("sums",), None, str(tmp_path))
    own.write_text("task: sums\ndoc_to_text: !function new_rows.text\n")
    assert content_hash(("sums",), None, str(tmp_path)) == before


def test_a_field_that_an_evaluation_gains_leaves_its_results_where_they_are() -> None:
    """Only a value that is not neutral asks for results of its own."""

    @config
    class Before:
        released_as: ClassVar[str] = "lab.Probe"
        tokens: int = 3

    @config
    class After:
        released_as: ClassVar[str] = "lab.Probe"
        tokens: int = 3
        name: str = neutral("probe")

    assert evaluation_key("run", Before()) == evaluation_key("run", After())
    keys = {evaluation_key(*of) for of in (("run", After(name="b")), ("other", After()))}
    assert len(keys | {evaluation_key("run", After())}) == 3
