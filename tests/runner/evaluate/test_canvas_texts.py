"""Samplers judged by what is known of the data, and the orders in which texts appear."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runner.data.markov import shared_chain
from runner.data.markov_config import MarkovConfig
from runner.data.sum_lines import SumLinesConfig, is_right
from runner.evaluate.canvas import measure_samplers
from runner.evaluate.canvas_config import RevealOrdersConfig, SamplersConfig
from runner.evaluate.infilling import infilling
from runner.evaluate.infilling_config import InfillingConfig
from runner.learn.trainer import Trainer
from runner.machine.errors import ConfigError
from runner.machine.ranks import Ranks
from runner.records.cells import make_cells
from runner.records.contracts import Trained

Compose = Callable[..., dict[str, Any]]
SUMS = ["data=sum_lines", "~data.sources.0.path", "data.sources.0.lines=400"]
CHAIN = ["data=markov", "~data.split", "~data.sources", "tokenizer=symbols"]
DIFFUSION = ["model.causal=false", "train.sequence_length=64"]


def _trained(compose: Compose, folder: Path | None, *overrides: str) -> Trained:
    (cell,) = make_cells([("", compose(*overrides))])
    trainer = Trainer(cell, cell.inputs, None, Ranks("cpu"))
    return trainer.setup.trained(0, folder, last=True)


def test_sums_are_right_and_of_one_length() -> None:
    (text,) = SumLinesConfig(lines=50).documents()
    lines = text.splitlines()
    assert {len(line) for line in lines} == {10}
    assert all(is_right(line) for line in lines)
    wrong = ("17+25=0043", "17+25", "1+2+3=6", "a+b=c", "=", "")
    assert not any(is_right(line) for line in wrong)


def test_samplers_are_judged_by_the_sums_they_write(compose: Compose, tmp_path: Path) -> None:
    trained = _trained(compose, tmp_path, *SUMS, "task=diffusion", *DIFFUSION)
    cfg = SamplersConfig(algorithms=("entropy", "origin"), steps=(2, 8), tokens=24, texts=4)
    values = measure_samplers(cfg, trained)
    names = {name.partition("@")[2] for name in values if not name.endswith("_stderr")}
    assert names == {"entropy_2", "entropy_8", "origin_2", "origin_8"}
    orders = RevealOrdersConfig(prompts=("1", "12+"), samples=2, tokens=6)
    assert orders.run(trained, 0) == {"orders": 4.0}
    rows = json.loads((tmp_path / "orders.json").read_text())
    assert [row["prompt"] for row in rows] == ["1", "1", "12+", "12+"]
    assert all(len(row["revealed_at"]) == 6 > max(row["revealed_at"]) for row in rows)
    scores = infilling(InfillingConfig(sums=3, canvases=(4,)), trained)
    assert scores["infilling/length_error@4"] >= 0.0
    with pytest.raises(ConfigError, match="needs data=markov"):
        measure_samplers(SamplersConfig(judge="chain", steps=(2,), tokens=4, texts=2), trained)


def test_a_chain_judges_texts_of_both_kinds_of_model(compose: Compose) -> None:
    vocab = "tokenizer.vocab_size=12"
    for task, names in (("language_modelling", {"autoregressive"}), ("diffusion", {"random_4"})):
        kind = ["train.sequence_length=64"] if task == "language_modelling" else DIFFUSION
        trained = _trained(compose, None, *CHAIN, vocab, f"task={task}", *kind)
        cfg = SamplersConfig(judge="chain", algorithms=("random",), steps=(4,), tokens=16, texts=4)
        values = measure_samplers(cfg, trained)
        nats = {k: v for k, v in values.items() if k.startswith("samples/nats") and "_std" not in k}
        assert {name.partition("@")[2] for name in nats} == names
        assert min(nats.values()) > 1.0, "of random weights"
    chain = shared_chain(MarkovConfig(), 12)
    walk = chain.walk(400, np.random.default_rng(0))[None]
    assert float(chain.nats(walk)[:, 1:].mean()) < 1.0, "the chain's own texts"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"algorithms": ("best",)}, "best is none of"),
        ({"steps": (100,)}, r"must lie in 1 to tokens=64"),
    ],
)
def test_samplers_that_cannot_be_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplersConfig(**wrong)


def test_questions_come_from_one_place() -> None:
    for wrong in ({}, {"file": "x", "sums": 3}):
        with pytest.raises(ValueError, match="either file, or sums"):
            InfillingConfig(**wrong)
