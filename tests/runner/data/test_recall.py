"""Associative recall: the targets are the values of repeated keys, which the example holds."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.runs import from_folders
from runner.data.corpus import loads
from runner.data.recall import RecallSamples
from runner.data.recall_config import RecallConfig
from runner.data.tokenizers import SymbolTokenizer
from runner.data.tokenizers_config import TokenizerConfig
from runner.machine.errors import DataError
from tests.command_server import run

CFG = RecallConfig(num_pairs=4, num_train=50, num_val=20)


def test_every_question_is_answered_by_the_pairs_before_it() -> None:
    samples = RecallSamples(CFG, 64, 32, seed=0)
    for number in range(50):
        sample = samples.example(number, number)
        tokens, targets = sample["tokens"].tolist(), sample["targets"].tolist()
        pairs = dict(zip(tokens[0:8:2], tokens[1:8:2], strict=True))
        assert len(pairs) == len(set(pairs.values())) == 4
        assert all(1 <= key < 32 <= value < 64 for key, value in pairs.items())
        queries = [position for position, target in enumerate(targets) if target >= 0]
        assert len(queries) == 4
        assert min(queries) >= 8
        assert all(position % 2 == 0 for position in queries)
        assert sorted(tokens[position] for position in queries) == sorted(pairs)
        assert all(targets[position] == pairs[tokens[position]] for position in queries)


def test_near_places_are_asked_more_often_by_the_power_law() -> None:
    samples = RecallSamples(RecallConfig(num_pairs=1), 64, 34, seed=0)
    positions = [int((samples.example(n, n)["targets"] >= 0).nonzero()) for n in range(3000)]
    frequencies = np.bincount([(i - 2) // 2 for i in positions], minlength=16) / 3000
    law = np.arange(1, 17) ** -0.99
    np.testing.assert_allclose(frequencies, law / law.sum(), atol=4 * (0.25 / 3000) ** 0.5)


def test_an_epoch_visits_each_example_once_and_seeds_differ_in_order_only() -> None:
    def epoch(seed: int, number: int) -> list[tuple[int, ...]]:
        samples = RecallSamples(CFG, 64, 32, seed)
        return [tuple(samples[50 * number + i]["tokens"].tolist()) for i in range(50)]

    first = epoch(0, 0)
    assert len(set(first)) == 50
    for other in (epoch(0, 1), epoch(1, 0)):
        assert other != first
        assert set(other) == set(first)


def test_validation_holds_other_examples_and_no_more_than_asked() -> None:
    corpus = CFG.build(TokenizerConfig(kind="symbols", vocab_size=64), Path("unused"))
    batches = list(corpus.held_out(32, 8, 10**6))
    assert [len(batch["tokens"]) for batch in batches] == [8, 8, 4]
    assert sum(len(batch["tokens"]) for batch in corpus.held_out(32, 8, 5 * 32)) == 5
    train = {tuple(corpus.samples(32, 0)[i]["tokens"].tolist()) for i in range(50)}
    assert not train & {tuple(row) for batch in batches for row in batch["tokens"].tolist()}


def test_symbols_are_numbers_there_and_back() -> None:
    tokenizer = loads(SymbolTokenizer(20).dumps())
    assert tokenizer.encode(" 3 17 3").tolist() == [3, 17, 3]
    assert tokenizer.decode([3, 17, 19, 3]) == " 3 17 3"
    assert int(tokenizer.bytes_per_id()[[3, 17, 3]].sum()) == len(" 3 17 3")
    with pytest.raises(DataError, match="is not a row of numbers"):
        tokenizer.encode("three")
    with pytest.raises(DataError, match=r"outside 0\.\.19"):
        tokenizer.encode("20")


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="num_pairs=0"):
        RecallConfig(num_pairs=0)
    symbols = TokenizerConfig(kind="symbols", vocab_size=64)
    CFG.check(symbols, 16)
    with pytest.raises(ValueError, match="tokenizer=symbols"):
        CFG.check(TokenizerConfig(), 16)
    with pytest.raises(ValueError, match="vocab_size=8"):
        CFG.check(TokenizerConfig(kind="symbols", vocab_size=8), 16)
    with pytest.raises(ValueError, match="sequence_length=15"):
        CFG.check(symbols, 15)


def test_recall_of_text_is_refused_before_any_run_starts() -> None:
    done = run("runner", "-m", "data=recall", "seed=1,2")
    assert done.returncode == 1
    assert "use tokenizer=symbols, not tokenizer.kind=bytes" in done.stderr


@pytest.mark.slow
def test_attention_learns_to_recall_and_the_run_says_how_often(tmp_path: Path) -> None:
    """A convolution binds each value to its key; only attention can tell two pairs apart."""
    overrides = [
        "model=gpt_pico",
        "model.depth=1",
        "model.width=64",
        "model.num_heads=1",
        "model.pattern=ca",
        "+model/part@model.parts.c=short_conv",
        "data=recall",
        "data.num_pairs=2",
        "data.num_train=4000",
        "data.num_val=100",
        "tokenizer=symbols",
        "tokenizer.vocab_size=32",
        "train.sequence_length=16",
        "train.batch_size=64",
        "train.steps=500",
        "optim.lr=1e-2",
        "eval.details=true",
        "eval.sample_tokens=0",
        "track.uri=off",
        f"root={tmp_path}",
    ]
    done = run("runner", *overrides)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    accuracy = [row["val_accuracy"] for row in rows if "val_accuracy" in row]
    assert accuracy[-1] > 0.9
    assert torch.tensor(accuracy).isfinite().all()
    runs = from_folders(tmp_path, "default")
    positions, last = runs.positions(), runs.table.iloc[0]
    assert positions["n"].sum() == last["val_tokens"] == 2 * 100
    assert positions["position"].between(4, 15).all()
    mean = (positions["loss"] * positions["n"]).sum() / positions["n"].sum()
    assert mean == pytest.approx(last["val_loss"], abs=1e-6)
    with pytest.raises(ValueError, match=r"eval\.details"):
        replace(runs, root=None).positions()


@pytest.mark.parametrize(
    "data", [["data=recall", "data.num_pairs=2"], ["data=markov", "tokenizer.vocab_size=32"]]
)
def test_a_sample_of_symbols_follows_the_end_of_a_document(data: list[str], tmp_path: Path) -> None:
    """Its prompt, a line feed, is no symbol."""
    sizes = ["train.sequence_length=16", "train.batch_size=4", "train.steps=2", "eval.tokens=64"]
    more = ["model=gpt_pico", "tokenizer=symbols", "track.uri=off", f"root={tmp_path}"]
    done = run("runner", *data, *sizes, *more)
    assert done.returncode == 0, done.stderr
    (samples,) = tmp_path.glob("runs/*/samples.txt")
    said = samples.read_text().splitlines()[-1].split()
    assert said
    assert all(word.isdigit() for word in said)
