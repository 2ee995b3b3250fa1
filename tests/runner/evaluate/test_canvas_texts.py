"""Samplers judged by what is known of the data, and the orders in which texts appear."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from runner.commands.cli import app
from runner.data.markov import shared_chain
from runner.data.markov_config import MarkovConfig
from runner.data.sum_lines import SumLinesConfig, is_right
from runner.data.tokenizers import SymbolTokenizer
from runner.evaluate.canvas import measure_samplers
from runner.evaluate.canvas_config import RevealOrdersConfig, SamplersConfig
from runner.evaluate.infilling import infilling
from runner.evaluate.infilling_config import InfillingConfig
from runner.evaluate.next_token_judge import NextTokenJudge
from runner.generate.generate import generate
from runner.generate.sampling import Sampling
from runner.learn.trainer import Trainer
from runner.machine.errors import ConfigError
from runner.machine.ranks import Ranks
from runner.records.cells import make_cells
from runner.records.contracts import Trained
from tests.workers import train_here

Compose = Callable[..., dict[str, Any]]
SUMS = ["data=sum_lines", "~data.sources.0.path", "data.sources.0.lines=400"]
SUDOKU = ["data=sudoku", "~data.sources.0.path", "data.sources.0.lines=100"]
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
    cfg = SamplersConfig(
        algorithms=("entropy", "origin"), steps=(2, 8), thresholds=(1e-6, 1.0), tokens=24, texts=4
    )
    values = measure_samplers(cfg, trained)
    names = {name.partition("@")[2] for name in values if not name.endswith("_stderr")}
    parallel = {"threshold_1e-06", "threshold_1.0"}
    assert names == {"entropy_2", "entropy_8", "origin_2", "origin_8"} | parallel
    for name, passes in (("entropy_2", 2), ("threshold_1e-06", 1), ("threshold_1.0", 24)):
        assert values[f"samples/passes_per_token@{name}"] == pytest.approx(passes / 24)
    orders = RevealOrdersConfig(prompts=("1", "12+"), samples=2, tokens=6)
    assert orders.run(trained, 0) == {"orders": 4.0}
    rows = json.loads((tmp_path / "orders.json").read_text())
    assert [row["prompt"] for row in rows] == ["1", "1", "12+", "12+"]
    assert all(len(row["revealed_at"]) == 6 > max(row["revealed_at"]) for row in rows)
    for digits, error in ((2, 0.0), (1, 2.0)):  # of a fixed canvas
        scores = infilling(InfillingConfig(sums=3, digits=digits, canvases=(4,)), trained)
        assert scores["infilling/length_error@4"] == error
    with pytest.raises(ConfigError, match="needs data=markov"):
        measure_samplers(SamplersConfig(judge="chain", steps=(2,), tokens=4, texts=2), trained)


def test_a_command_says_its_passes_and_refuses_what_a_canvas_cannot_hold(
    compose: Compose, tmp_path: Path
) -> None:
    (cell,) = make_cells([("", compose("task=diffusion", *DIFFUSION, "train.steps=1"))])
    train_here(cell)
    (plain,) = make_cells([("", compose("train.steps=1"))])
    train_here(plain)

    def asked(run: Any, *options: str) -> Any:
        return CliRunner().invoke(app, ["generate", str(run.folder), *options])

    canvas = ("--tokens", "8", "--temperature", "1")
    parallel = ("--algorithm", "low_confidence", "--threshold")
    for options in (("--prompt", "A"), ("--prompt", "A", "--stream")):
        for least, passes, each in (("1e-9", 1, "0.12"), ("1", 8, "1.00")):
            done = asked(cell, *options, *canvas, *parallel, least, "--end-penalty", "1e9")
            assert done.exit_code == 0, done.output
            said = f"{passes} forward passes for 8 tokens, {each} a token"
            assert said in done.stderr, done.stderr
    done = asked(plain, "--prompt", "A", "--tokens", "4")
    assert "passes" not in done.stderr
    for run, options, words in (
        (cell, (*canvas, "--block", "2", "--steps", "3"), "steps=3 must be in 4 (one for each"),
        (cell, ("--tokens", "65"), "pass the context of 64; ask for fewer tokens"),
        (
            cell,
            ("--repetition-penalty", "2"),
            "--repetition-penalty does nothing: this model fills",
        ),
        (plain, ("--steps", "3"), "--steps does nothing: this model adds one token after"),
    ):
        refused = asked(run, "--prompt", "A", *options)
        assert isinstance(refused.exception, ConfigError), refused.output
        assert words in str(refused.exception)


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


def test_puzzles_are_solved_and_texts_read_by_a_model_of_next_tokens(
    compose: Compose, tmp_path: Path
) -> None:
    length = "train.sequence_length=64"
    (judge,) = make_cells([("", compose(*SUDOKU, length))])
    train_here(judge)
    own = NextTokenJudge(judge.folder, torch.device("cpu"))
    written = generate(
        own.model,
        [torch.tensor([10, 49]), torch.tensor([10])],
        Sampling(max_new_tokens=9, temperature=1.0),
        context=64,
        decode=own.tokenizer.decode,
        ends=(),
    )
    told = [-sum(one.logprobs) / len(one.logprobs) for one in written]
    assert own.nats(written, own.tokenizer) == pytest.approx(told, rel=1e-4)

    given = f"+inputs.judge.runs=[{judge.fingerprint}]"
    trained = _trained(compose, tmp_path, *SUDOKU, given, "task=diffusion", *DIFFUSION)
    few = SamplersConfig(
        judge="sudoku", judge_input="judge", algorithms=("entropy",), steps=(2,), tokens=16, texts=3
    )
    values = few.run(trained, 0)
    names = ("right", "judge_nats", "distinct")
    assert {f"samples/{name}@entropy_2" for name in names} <= set(values)
    assert values["samples/right@entropy_2"] == 0.0, "of random weights"
    assert 2.0 < values["samples/judge_nats@entropy_2"] < 12.0
    text_alone = replace(few, judge=None)
    assert not any("right" in name for name in text_alone.run(trained, 0))

    with pytest.raises(ConfigError, match=r"the judge is the input 'other', and the run has: jud"):
        replace(few, judge_input="other").run(trained, 0)
    long = replace(written[0], ids=written[0].ids * 8)
    with pytest.raises(ConfigError, match=r"are 74 tokens, the judge .* reads 65"):
        own.nats([long], own.tokenizer)
    with pytest.raises(ConfigError, match="another tokenizer"):
        own.nats(written, SymbolTokenizer(300))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"judge": None}, "needs a judge_input"),
        ({"algorithms": ("best",)}, "best is none of"),
        ({"thresholds": (1.5,)}, r"1\.5 is no probability"),
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
