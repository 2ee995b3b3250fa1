"""Weights in few bits as a cell: what it measures, and that it is a model like any other."""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from models.contract import logits
from models.stored_linear import stored_layers
from runner.commands.cli import app
from runner.evaluate.config import HarnessConfig
from runner.exchange.gguf_file import GGUFFile
from runner.exchange.gguf_model import export_gguf
from runner.exchange.huggingface import export
from runner.generate.sampling import Sampling
from runner.generate.text_generator import TextGenerator
from runner.grid.quantised_cells import quantised_cells
from runner.learn.setup import set_up
from runner.machine.errors import ConfigError
from runner.machine.ranks import Ranks
from runner.records import metrics
from runner.records.cells import Cell, freeze_cell, make_cells
from runner.records.trained_model import load_model
from runner.views.quantised_table import quantised_table
from runner.work.quantisation_cost import compared, paired_interval
from tests.command_server import run
from tests.conftest import compose_tiny, write_text
from tests.runner.serve.running import asked
from tests.workers import train_here


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Cell:
    """A small decoder of Llama's form."""
    root = tmp_path_factory.mktemp("quantise")
    node = compose_tiny(
        root,
        write_text(root / "text.txt"),
        "tokenizer=bpe",
        "tokenizer.vocab_size=272",
        "model.width=32",
        "model.hidden=96",
        "train.steps=60",
        "optim.lr=1e-2",
    )
    (cell,) = make_cells([("", node)])
    freeze_cell(cell)
    train_here(cell)
    return cell


def _quantised(trained: Cell, *schemes: str) -> list[Cell]:
    root = trained.folder.parents[1]
    cells, name, skipped = quantised_cells(root, trained.fingerprint, schemes, ["calibration=8"])
    assert (name, skipped) == (f"{trained.config.name}-quantised", [])
    for cell in cells:
        freeze_cell(cell)
        train_here(cell)
    return cells


@pytest.fixture(scope="module")
def stored(trained: Cell) -> list[Cell]:
    """The decoder in int8 and by GPTQ."""
    return _quantised(trained, "int8", "gptq-int4-g32")


def test_a_quantised_run_is_evaluated_generates_and_is_exported_as_any_other(
    trained: Cell, stored: list[Cell], tmp_path: Path
) -> None:
    plain = metrics.latest(trained.folder)["val_loss"]
    for cell, most, bits in zip(stored, (0.002, 0.3), (8.0, 4.5), strict=True):
        values = metrics.latest(cell.folder)
        assert values["val_loss"] - plain == pytest.approx(values["loss_delta"], abs=1e-5)
        assert values["loss_delta_low"] <= values["loss_delta"] <= values["loss_delta_high"]
        assert abs(values["loss_delta"]) < most
        assert 0 < values["kl"] < most
        assert values["top1_agreement"] > 0.8
        assert bits <= values["bits_per_weight"] < bits + 2  # with scales, few columns to a row
        rows = json.loads((cell.folder / "outputs" / "losses.json").read_text())
        assert sum(row["count"] for row in rows) == values["val_tokens"]
        assert len(rows) == values["loss_delta_units"]
        assert all(values[f"tokens_per_s_{n}{of}"] > 0 for n in (1, 8) for of in ("", "_before"))
        model, _, context = load_model(cell.folder)
        assert len(stored_layers(model)) == len(list(model.blocks())) * 4
        ids = torch.arange(context)[None]
        before = logits(model, ids)
        (one,) = TextGenerator(cell.folder).generate(["line 1"], Sampling(max_new_tokens=5))
        assert len(one.ids) == 5
        helped = TextGenerator(trained.folder, draft=str(cell.folder))  # by what is near to it
        greedy = Sampling(max_new_tokens=10, temperature=0.0)
        (drafted,) = helped.generate(["line 1"], greedy)
        assert drafted.ids == TextGenerator(trained.folder).generate(["line 1"], greedy)[0].ids
        export(cell, tmp_path / cell.fingerprint)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / cell.fingerprint)
        torch.testing.assert_close(theirs(ids).logits, before, atol=1e-4, rtol=0)
        export(cell, tmp_path / f"few-{cell.fingerprint}", compressed=True)
        export_gguf(cell, tmp_path / f"{cell.fingerprint}.gguf", dtype="q8_0")
        (mine, theirs) = (
            stored_layers(model)["layers.0.mlp.down"].full_weight(),
            torch.from_numpy(
                GGUFFile(tmp_path / f"{cell.fingerprint}.gguf").read("blk.0.ffn_down.weight")
            ),
        )
        torch.testing.assert_close(theirs, mine, rtol=0, atol=float(mine.abs().max()) / 120)
        with pytest.raises(ConfigError, match="can be quantised"):
            quantised_cells(trained.folder.parents[1], cell.fingerprint, ["int8"], [])


def test_a_quantised_run_is_served_as_it_generates(stored: list[Cell]) -> None:
    body = {"prompt": "line 1", "max_tokens": 6, "temperature": 0}
    for cell in stored:
        generator = TextGenerator(cell.folder)
        ((status, answer),) = asked(generator, cell.folder, [("/v1/completions", body)])
        assert status == 200
        greedy = Sampling(max_new_tokens=6, temperature=0.0)
        (own,) = generator.generate(["line 1"], greedy)
        assert answer["choices"][0]["text"] == own.text
        assert answer["usage"]["completion_tokens"] == len(own.ids)


@pytest.mark.slow
def test_a_quantised_run_generates_by_a_compiled_step(stored: list[Cell]) -> None:
    line = ["generate", str(stored[0].folder), "--prompt", "line 1", "--tokens", "6"]
    line += ["--temperature", "0"]
    assert _told(*line, "--compile") == _told(*line)


def _told(*line: str) -> str:
    done = run("runner.commands.cli", *line)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_verb_plans_and_ends_with_a_table(
    trained: Cell, stored: list[Cell], capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(trained.folder.parents[1])
    verb = ["quantise", trained.fingerprint, "--root", root, "calibration=8", "--schemes"]
    planned = CliRunner().invoke(app, [*verb, "nf4,gptq-int4-g32", "--plan"])
    assert (planned.exit_code, "2 cells (1 finished, 1 new)" in planned.output) == (0, True), (
        planned.output
    )
    for folder, score in ((trained.folder, 0.5), (stored[0].folder, 0.25)):
        line = {"step": 0, "time": 0.0, "attempt": 1, "toy/acc": score, "toy/acc_stderr": 0.1}
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    cfg = stored[0].config
    judged = replace(cfg, eval=replace(cfg.eval, also={"toy": HarnessConfig(tasks=("toy",))}))
    table = quantised_table([replace(stored[0], config=judged), stored[1]])
    assert table is not None
    Console(width=200).print(table)
    _, int8, gptq = capsys.readouterr().out.splitlines()
    bits = metrics.latest(stored[0].folder)["bits_per_weight"]
    assert int8.split()[1:3] == ["int8", f"{bits:.2f}"]
    assert "emulated" not in int8
    assert int8.endswith("toy/acc 0.250 (0.500)")
    assert "emulated" in gptq
    assert f"{8 * trained.config.train.sequence_length:,} tokens" in gptq
    missing, _, _ = quantised_cells(trained.folder.parents[1], trained.fingerprint, ["nf4"], [])
    assert quantised_table(missing) is None


def test_a_model_that_is_trained_ternary_is_stored_without_any_loss(tmp_path: Path) -> None:
    choices = ("+model/rounding=bitnet", "model.width=32", "train.steps=20", "optim.lr=1e-2")
    node = compose_tiny(tmp_path, write_text(tmp_path / "text.txt"), *choices)
    (cell,) = make_cells([("", node)])
    freeze_cell(cell)
    assert train_here(cell)["val_loss"][-1] < 5.0
    (stored,) = _quantised(cell, "as-trained")
    values = metrics.latest(stored.folder)
    assert (values["loss_delta"], values["kl"], values["top1_agreement"]) == (0, 0, 1)
    assert values["bits_per_weight"] < 2.1
    asked = Sampling(max_new_tokens=5, temperature=0.0)
    texts = [TextGenerator(c.folder).generate(["line 1"], asked)[0].ids for c in (cell, stored)]
    assert texts[0] == texts[1]


def test_what_no_scheme_fits_is_refused_by_name(trained: Cell) -> None:
    node = json.loads((trained.folder / "cell.json").read_text())["config"]
    node["work"] = {"_target_": "runner.work.config.QuantiseWork"}
    (cell,) = make_cells([("", node)])
    freeze_cell(cell)
    with pytest.raises(ConfigError, match="needs an input named init"):
        train_here(cell)
    with pytest.raises(ConfigError, match="there is no qoq: its product of 4-bit weights"):
        quantised_cells(trained.folder.parents[1], trained.fingerprint, ["qoq"], [])


def test_the_interval_of_a_paired_difference_is_that_of_a_normal_mean() -> None:
    drawn = np.random.default_rng(0).normal(0.01, 0.1, size=(400, 1))
    values = np.concatenate((drawn * 16, np.full((400, 1), 16.0)), axis=1)
    low, high = paired_interval(values, seed=0)
    half = 1.96 * drawn.std() / 20
    np.testing.assert_allclose([low, high], drawn.mean() + np.array([-half, half]), atol=half / 8)


class _Corpus:
    """Two documents in three sequences, numbered through all text; then others from 0."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def held_out(self, seq: int, batch: int, max_tokens: int) -> Iterator[dict[str, torch.Tensor]]:
        ids = torch.arange(seq + 1)
        for documents in ([3] * seq, [3] * 2 + [4] * (seq - 2), *[[0] * seq] * 9):
            yield {
                "tokens": ids[None, :-1],
                "targets": ids[None, 1:],
                "documents": torch.tensor([documents]),
            }


def test_a_comparison_reads_each_sequence_once_a_model_and_counts_by_document(
    trained: Cell,
) -> None:
    setup = set_up(trained, {}, Ranks("cpu"), None)
    passes = {"before": 0, "after": 0}
    before = copy.deepcopy(setup.model)
    for name, model in (("before", before), ("after", setup.model)):
        model.register_forward_pre_hook(
            lambda *_, name=name: passes.__setitem__(name, passes[name] + 1)
        )
    rows, values = compared(replace(setup, corpus=_Corpus(setup.corpus.tokenizer)), before)
    assert passes == {"before": 11, "after": 11}
    seq = setup.cfg.train.sequence_length
    assert [row["count"] for row in rows] == [seq + 2, seq - 2, *[seq] * 9]
    assert (values["loss_delta"], values["kl"], values["top1_agreement"]) == (0, 0, 1)
