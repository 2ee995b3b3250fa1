"""A draft measured: rounds are counted, acceptance is what theory says of a pair."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.machine.errors import ConfigError
from runner.records import metrics
from runner.records.cells import Cell, freeze_cell, make_cells
from runner.work.speculate import round_tokens
from runner.work.speculate_config import SpeculateWork
from tests.conftest import compose_tiny, write_text
from tests.workers import train_here

Made = Callable[..., Cell]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return a run with these overrides."""
    root = tmp_path_factory.mktemp("speculate")
    text = write_text(root / "text.txt")

    def inner(*overrides: str) -> Cell:
        node = compose_tiny(root, text, "train.sequence_length=48", *overrides)
        (cell,) = make_cells([("", node)])
        freeze_cell(cell)
        train_here(cell)
        return cell

    return inner


def test_drafts_of_a_trained_pair_are_measured(made: Made) -> None:
    target, other = made("optim.lr=1e-2"), made("model.width=16", "model.num_heads=1")
    sizes = ["work=speculate", "work.texts=1", "work.prompt=8", "work.tokens=16"]
    runs = f"inputs={{target: {{runs: [{target.fingerprint}]}}, draft: {{runs: [%s]}}}}"
    values = {
        name: metrics.latest(made(*sizes, "+" + given).folder)
        for name, given in {
            "itself": runs % target.fingerprint,
            "other": runs % other.fingerprint,
        }.items()
    }
    for temperature in ("0", "1"):
        itself, drawn = (
            {k.partition("/")[0]: v for k, v in own.items() if k.endswith(f"/{temperature}")}
            for own in values.values()
        )
        assert itself["accepted"] == 1.0
        assert itself["overlap"] == pytest.approx(1.0)
        assert itself["round_tokens"] == itself["expected"] == 5.0
        assert 0.0 <= drawn["accepted"] <= 1.0
        assert 0.0 < drawn["overlap"] <= 1.0
        assert drawn["gap"] == pytest.approx(drawn["round_tokens"] / drawn["expected"] - 1)
    assert drawn["overlap"] < 1.0
    assert values["itself"]["size_ratio"] == 1.0 > values["other"]["size_ratio"]
    lookup = made(*sizes, "work.draft=lookup", f"+inputs.target={{runs: [{target.fingerprint}]}}")
    assert "overlap/0" not in metrics.latest(lookup.folder)
    rounds = json.loads(Path(lookup.folder / "outputs/rounds.json").read_text())["0"]
    assert sum(number for *_, number in rounds) == metrics.latest(lookup.folder)["rounds/0"]
    assert all(1 <= new <= proposed + 1 <= 5 for proposed, new, _ in rounds)
    with pytest.raises(ConfigError, match="needs an input named draft and one named target"):
        made(*sizes)


def test_the_formula_has_the_values_of_the_paper_and_bad_settings_are_refused() -> None:
    for chance, length, tokens in ((0.5, 2, 1.75), (0.8, 4, 3.3616), (0.9, 8, 6.1258), (1, 4, 5)):
        assert round_tokens(chance, length) == pytest.approx(tokens, abs=1e-4)
    with pytest.raises(ValueError, match=r"work\.length=0"):
        SpeculateWork(length=0)
    with pytest.raises(ValueError, match=r"work\.temperatures"):
        SpeculateWork(temperatures=())
