"""`espalier keys`: every key with its type, default and meaning; the schema of sweep.yaml."""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema_rs
import pytest
import yaml

from runner.commands.key_reference import blocks, groups
from runner.commands.keys import _lines, kept_text, sources_state
from runner.commands.sweep_schema import sweep_schema
from runner.machine.errors import ConfigError
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def schema() -> jsonschema_rs.Validator:
    """A validator by the schema as an editor reads it."""
    return jsonschema_rs.validator_for(json.loads(json.dumps(sweep_schema())))


def test_every_key_has_a_meaning() -> None:
    keys = [key for group in groups() for block in blocks(group) for key in block.keys]
    assert len(keys) > 300
    assert not sorted({key.path for key in keys if not key.meaning})


def test_all_keys_are_known_without_torch() -> None:
    """What `espalier keys` and Tab import: a class of a node must stand where torch is not."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from runner.commands.key_reference import blocks, groups\n"
        "print(sum(len(block.keys) for group in groups() for block in blocks(group)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 300


def test_a_key_says_whether_it_changes_the_result() -> None:
    lines = list(_lines("train.checkpoint")) + list(_lines("optim.lr"))
    assert "  train.checkpoint.every_s: float = 300  [execution]" in lines
    assert "  optim.lr: float = 0.003" in lines
    assert not any("train.clip" in line or "optim.eps" in line for line in lines)
    assert "      peak learning rate; the schedule multiplies it." in lines


def test_parts_of_a_group_and_keys_of_hydra_are_listed() -> None:
    assert any("model.adapter.rank: int" in line for line in _lines("model/adapter"))
    assert any("hydra.launcher.partition" in line for line in _lines("hydra"))
    with pytest.raises(ConfigError, match=r"optmi is no group and no key; there are: work, model"):
        _lines("optmi")


def test_sweeps_of_the_experiments_satisfy_the_schema(schema: jsonschema_rs.Validator) -> None:
    refused = {
        f"{file.parent.name}: {error.instance_path}: {error.message}"
        for file in (ROOT / "experiments").glob("*/sweep.yaml")
        for error in schema.iter_errors(yaml.safe_load(file.read_text()))
    }
    assert refused == set()


@pytest.mark.parametrize(
    "sweep",
    [
        {"modle": "x"},
        {"optim": {"lrate": 1}},
        {"optim": {"lr": "high"}},
        {"train": {"checkpoint": {"every": 3}}},
        {"hydra": {"sweeper": {"parmas": {}}}},
    ],
    ids=str,
)
def test_a_mistake_does_not_satisfy_the_schema(
    sweep: object, schema: jsonschema_rs.Validator
) -> None:
    assert not schema.is_valid(sweep)
    assert schema.is_valid({"optim": {"lr": "${my.rate}"}, "model": {"_target_": "a.B", "c": 1}})


def test_the_list_of_all_keys_is_made_once_until_a_source_changes(tmp_path: Path) -> None:
    made = iter(["first", "second"])
    kept = tmp_path / "home" / "keys.txt"
    assert [kept_text(kept, "a", lambda: next(made)) for _ in range(2)] == ["first", "first"]
    assert kept_text(kept, "b", lambda: next(made)) == "second"
    assert kept_text(kept / "no folder", "b", lambda: "made anew") == "made anew"
    source = tmp_path / "models" / "x_config.py"
    source.parent.mkdir()
    source.write_text("a")
    before = sources_state(tmp_path)
    assert sources_state(tmp_path) == before
    source.write_text("ab")
    assert sources_state(tmp_path) != before
