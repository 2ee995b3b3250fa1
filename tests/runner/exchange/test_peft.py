"""Adapters of a run: small checkpoints, the base checked, peft's files written and read."""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from models.adapter_config import AdapterConfig
from models.config import plain
from models.pretrained import load_pretrained
from runner.commands.cli import app
from runner.exchange.peft import export_adapter
from runner.learn.memory import predicted_bytes
from runner.learn.trainer import Trainer
from runner.machine.errors import CheckpointError, ConfigError, DataError
from runner.machine.ranks import Ranks
from runner.records import checkpoint_folder, journal
from runner.records.cells import Cell, freeze_cell, make_cells
from runner.records.trained_model import load_model
from runner.work.notes import write_summary
from tests.folders import llama3

Compose = Callable[..., dict[str, Any]]
TOKENS = torch.arange(40)[None] * 7 % 340


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama3(tmp_path_factory.mktemp("base") / "llama3")


def _cell(compose: Compose, base: Path, root: Path, *more: str, **adapter: Any) -> Cell:
    node = compose(f"init=hf:{base}", f"root={root}", "optim.lr=2e-2", *more)
    node["model"]["adapter"] = plain(AdapterConfig(**adapter), target=True)
    (cell,) = make_cells([("", node)])
    freeze_cell(cell)
    return cell


def _train(cell: Cell, stop: Callable[[], bool] = lambda: False) -> str:
    attempt = journal.claim(cell.folder)
    assert attempt is not None
    writer = journal.Journal(cell.folder, attempt)
    with closing(writer):
        trainer = Trainer(cell, cell.inputs, writer, Ranks("cpu"))
        write_summary(cell.folder, trainer.budget, trainer.precision, trainer.corpus.tokenizer)
        outcome = trainer.fit(stop)
        writer.event(outcome)
    return outcome


def _export(cell: Cell, folder: Path, to: str, root: Path) -> None:
    command = ["export", cell.fingerprint, str(folder), "--to", to, "--root", str(root)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.exception or done.output


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_is_trained_resumed_exported_merged_and_started_from(
    kind: Any, base: Path, compose: Compose, tmp_path: Path
) -> None:
    chosen: dict[str, Any] = {"kind": kind, "rank": 4, "targets": ("*.q", "*.v", "*.mlp.*")}
    cell = _cell(compose, base, tmp_path, **chosen)
    asked = iter(range(100))
    assert _train(cell, lambda: next(asked) >= 5) == "interrupted"
    assert _train(cell) == "finished"
    other = _cell(compose, base, tmp_path / "whole", **chosen)
    assert _train(other) == "finished"
    newest, whole = (checkpoint_folder.newest(c.folder / "checkpoints") for c in (cell, other))
    assert newest is not None
    assert whole is not None
    for file in ("model", "optimizer"):
        saved, same = (load_file(f / f"{file}.safetensors") for f in (newest, whole))
        assert all(torch.equal(saved[name], same[name]) for name in saved.keys() | same.keys())
        assert all(re.search(r"\.(a|b|magnitude)(\.|$|/)", name) for name in saved)
    model, _, _ = load_model(cell.folder)
    plain_model = load_pretrained(base)
    with torch.no_grad():
        logits = model(TOKENS)
        assert (logits - plain_model(TOKENS)).abs().max() > 0.1
    _export(cell, tmp_path / "merged", "hf", tmp_path)
    _export(cell, tmp_path / "peft", "peft", tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, logits, rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_dora"]) == (4, 16.0, kind == "dora")
    _merge_by_hand(tmp_path / "peft", base, logits, config)
    still = ["train.steps=1", "optim.lr=1e-12"]
    start = str(tmp_path / "peft")
    again = _cell(compose, base, tmp_path / "again", *still, start=start, **chosen)
    _train(again)
    with torch.no_grad():
        torch.testing.assert_close(load_model(again.folder)[0](TOKENS), logits, rtol=0, atol=1e-5)


def _merge_by_hand(folder: Path, base: Path, logits: torch.Tensor, config: dict[str, Any]) -> None:
    """Merge peft's tensors into transformers' model by peft's formula; the logits are ours."""
    model = AutoModelForCausalLM.from_pretrained(base)
    tensors = load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for module in config["target_modules"]:
            key, layer = f"base_model.model.{module}", model.get_submodule(module)
            update = tensors.pop(f"{key}.lora_B.weight") @ tensors.pop(f"{key}.lora_A.weight")
            weight = layer.weight + config["lora_alpha"] / config["r"] * update
            if config["use_dora"]:
                length = tensors.pop(f"{key}.lora_magnitude_vector")
                weight = weight * (length / weight.norm(dim=1))[:, None]
            layer.weight.copy_(weight)
        assert not tensors
        torch.testing.assert_close(model(TOKENS).logits, logits, rtol=1e-4, atol=1e-4)


def test_peft_itself_reads_it(base: Path, compose: Compose, tmp_path: Path) -> None:
    try:
        import peft
    except (ImportError, RuntimeError) as error:  # it raises beside an empty transformer-engine
        pytest.skip(f"peft cannot be imported: {error}")
    cell = _cell(compose, base, tmp_path, rank=4)
    _train(cell)
    _export(cell, tmp_path / "peft", "peft", tmp_path)
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "peft")
    )
    with torch.no_grad():
        ours = load_model(cell.folder)[0](TOKENS)
        torch.testing.assert_close(theirs(TOKENS).logits, ours, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_another_base_is_refused(
    base: Path, compose: Compose, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    cell = _cell(compose, moved, tmp_path, "train.steps=2", rank=4)
    _train(cell)
    _export(cell, tmp_path / "peft", "peft", tmp_path)
    file = moved / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    weights = load_file(file)
    weights["model.norm.weight"] += 1.0
    save_file(weights, file, metadata=metadata)
    with pytest.raises(CheckpointError, match="has an adapter of another base: init=hf:"):
        load_model(cell.folder)
    start = str(tmp_path / "peft")
    with pytest.raises(DataError, match="peft is an adapter of another base"):
        _train(_cell(compose, moved, tmp_path / "b", rank=4, start=start))
    for change, message in [
        ({"rank": 8}, "has rank=4, model.adapter.rank is 8; give 4"),
        ({"rank": 4, "kind": "rslora"}, "has kind=lora, model.adapter.kind is rslora"),
        ({"rank": 4, "targets": ("*.q",)}, "or of other layers .*model.adapter.targets"),
    ]:
        with pytest.raises(DataError, match=message):
            _train(_cell(compose, base, tmp_path / "c", start=start, **change))
    with pytest.raises(ValueError, match="safetensors does not exist"):
        _cell(compose, base, tmp_path / "d", start=str(tmp_path))
    (without,) = make_cells([("", compose(f"init=hf:{base}", f"root={tmp_path / 'e'}"))])
    with pytest.raises(ConfigError, match="has no adapter; export it with --to hf"):
        export_adapter(without, tmp_path / "x")


def test_memory_of_qlora_is_that_of_packed_weights_and_small_states(
    compose: Compose, base: Path, tmp_path: Path
) -> None:
    wide = ["model.width=512", "model.depth=6", "model.num_heads=8", "train.micro_batch=1"]
    node = compose(*wide, f"root={tmp_path}")
    full = predicted_bytes(make_cells([("", node)])[0].config, 257, gpu=True)
    node["model"]["adapter"] = plain(AdapterConfig(base="nf4", rank=4), target=True)
    (cell,) = make_cells([("", node)])
    small = predicted_bytes(cell.config, 257, gpu=True)
    weights = cell.config.model.num_parameters(257)
    # AdamW holds weight, gradient and two moments of each parameter: 16 bytes; packed, half a byte
    assert full > 15 * weights
    assert small < 0.25 * full
