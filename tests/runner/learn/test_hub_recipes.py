"""The recipes of conf/recipe on tiny random folders of the layouts that they are for."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig

from models.adapter import adapter_names
from runner.records import checkpoint_folder
from runner.records.cells import make_cells
from runner.records.trained_model import load_model
from tests.conftest import compose_tiny
from tests.folders import causal, t5
from tests.workers import train_here

TINY = ["train.sequence_length=48", "train.batch_size=4", "train.micro_batch=null"]
TINY += ["train.steps=2", "eval.every=2", "eval.tokens=96"]
GPT2 = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=384)
LLAMA = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    vocab_size=384,
)


def _composed(root: Path, recipe: str, folder: Path, *more: str) -> Any:
    given = [f"+recipe={recipe}", f"init=hf:{folder}", "~data.split", *TINY, *more]
    (cell,) = make_cells([(recipe, compose_tiny(root, root / "train.tsv", *given))])
    return cell


@pytest.mark.parametrize("recipe", ["gpt2", "distilgpt2", "tinyllama"])
def test_a_decoder_learns_labels_and_is_asked_for_them(recipe: str, tmp_path: Path) -> None:
    folder = causal(tmp_path / "model", LLAMA if recipe == "tinyllama" else GPT2)
    rows = "".join(f"film {i} is {word}\t{i % 2}\n" for i, word in enumerate(["bad", "good"] * 20))
    (tmp_path / "train.tsv").write_text(rows)
    (tmp_path / "test.tsv").write_text(rows[:200].rpartition("\n")[0] + "\n")
    asked = "eval.also.sst2.source.path=" + str(tmp_path / "test.tsv")
    asked = ["data=sst2", "+eval/also@eval.also.sst2=sst2", asked]
    cell = _composed(tmp_path, recipe, folder, *asked)
    logged = train_here(cell)
    assert 0.0 <= logged["sst2/accuracy"][-1] <= 1.0
    assert logged["sst2/accuracy_calibrated"][-1] == pytest.approx(0.5, abs=0.5)
    model, _, _ = load_model(cell.folder)
    assert adapter_names(model), "adapters are trained, nothing else"
    saved = checkpoint_folder.listing(cell.folder / "checkpoints")
    assert saved


def test_flan_t5_learns_summaries_and_is_measured_by_rouge(tmp_path: Path) -> None:
    folder = t5(tmp_path / "model", flan=True)
    rows = [{"dialogue": f"A: the dog sat {i}.", "summary": f"dog {i}."} for i in range(60)]
    file = tmp_path / "dialogues.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    small = [
        "data=samsum",
        "eval.also.summaries.problems=3",
        "eval.also.summaries.max_new_tokens=6",
    ]
    cell = _composed(tmp_path, "flan_t5", folder, f"data.sources.0.path={file}", *small)
    logged = train_here(cell)
    for kind in ("rouge1", "rouge2", "rougeLsum"):
        assert 0.0 <= logged[f"summaries/{kind}"][-1] <= 1.0
    lines = (cell.folder / "texts_summaries.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert json.loads(lines[0])["reference"].startswith("dog ")
