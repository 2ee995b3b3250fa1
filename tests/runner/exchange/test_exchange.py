"""Cells as Hugging Face folders and back: the same text and logits; trained further by `init`."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Inner
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, Qwen2Config
from typer.testing import CliRunner

from models.pretrained import is_shifted
from runner.commands.cli import app
from runner.data.corpus import loads
from runner.data.pretrained import pretrained_folder, with_pretrained
from runner.data.special_tokens import WithTokens
from runner.data.tokenizers import ByteTokenizer, CharTokenizer
from runner.data.tokenizers_config import TokenizerConfig
from runner.exchange.model_card import without_local_paths
from runner.exchange.tokenizer import can_write, write_tokenizer
from runner.machine import storage
from runner.machine.errors import ConfigError
from runner.records.cells import find_cell, make_cells
from runner.records.config import validate
from runner.records.trained_model import load_model
from tests.command_server import run
from tests.folders import llama3

Run = Callable[..., subprocess.CompletedProcess[str]]
Compose = Callable[..., dict[str, Any]]
TEXT = "Zwölf Boxkämpfer jagen\tden Sylter\r\n\r\n 'großen' Deich. 日本語 🙂<|x|>"


def _cli(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    return done.output + str(done.exception or "")


@pytest.mark.parametrize("kind", ["bytes", "char", "bpe", "unigram", "wordpiece"])
def test_exported_tokenizers_give_the_same_ids(kind: str, tmp_path: Path) -> None:
    if kind == "bytes":
        ours: Any = ByteTokenizer()
    elif kind == "char":
        ours = CharTokenizer("".join(sorted(set(TEXT))))
    else:
        ours = TokenizerConfig(kind=kind, vocab_size=400).build([TEXT, "jagen den Boxer"] * 3)
    write_tokenizer(ours, tmp_path, 64)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ids = ours.encode(TEXT).tolist()
    assert theirs(TEXT, add_special_tokens=False)["input_ids"] == ids
    assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    assert (theirs.eos_token_id, len(theirs), theirs.model_max_length) == (
        ours.eos,
        ours.vocab_size,
        64,
    )
    back = TokenizerConfig(kind="folder", path=str(tmp_path), eos_token=theirs.eos_token).build([])
    assert back.encode(TEXT).tolist() == ids
    assert back.bytes_per_id().tolist() == ours.bytes_per_id().tolist()


@pytest.mark.parametrize("padded", [None, 264])
def test_tokens_of_masked_diffusion_keep_their_ids(padded: int | None, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "out").mkdir()
    write_tokenizer(ByteTokenizer(), tmp_path / "inner", 64)
    inner = TokenizerConfig(
        kind="folder", path=str(tmp_path / "inner"), eos_token="<|endoftext|>", vocab_size=padded
    ).build([])
    ours = WithTokens(inner, ["<mask>", "<expand>", "<delete>"])
    assert can_write(ours)
    write_tokenizer(ours, tmp_path / "out", 64)
    back = TokenizerConfig(
        kind="folder", path=str(tmp_path / "out"), eos_token="<|endoftext|>"
    ).build([])
    assert (back.token_ids, back.vocab_size) == (ours.token_ids, ours.vocab_size)
    assert back.encode(TEXT).tolist() == ours.encode(TEXT).tolist()


@pytest.mark.slow
def test_a_cell_becomes_a_folder_that_transformers_continues_alike(
    espalier: Run, tmp_path: Path
) -> None:
    assert (
        espalier("name=x", "tokenizer=bpe", "tokenizer.vocab_size=300", "track.uri=null").returncode
        == 0
    )
    cell = find_cell(tmp_path, next((tmp_path / "runs").iterdir()).name)
    folder, root = tmp_path / "out", ["--root", str(tmp_path)]
    (cell.folder / "evals").mkdir()
    score = {"name": "t/bleu_average", "value": 0.25, "stderr": None, "n": 9}
    (cell.folder / "evals/0.json").write_text(json.dumps({"scores": [score]}))
    told = _cli(
        "export", cell.fingerprint[:6], str(folder), "--to", "hf", "--license", "mit", *root
    )
    assert "LlamaForCausalLM" in told
    theirs, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    given = tokenizer("line", return_tensors="pt")
    done = theirs.generate(**given, max_new_tokens=9, do_sample=False, pad_token_id=0)
    ours = _cli(
        "generate",
        str(cell.folder),
        "--prompt",
        "line",
        "--tokens",
        "9",
        "--temperature",
        "0",
        *root,
    )
    assert ours == tokenizer.decode(done[0], skip_special_tokens=True) + "\n"
    card = (folder / "README.md").read_text()
    for piece in (
        "license: mit",
        "pipeline_tag",
        "val_loss",
        "num_parameters",
        "bpe",
        "model.width",
        "| t/bleu_average | 0.2500 | not known | 9 |",
    ):
        assert piece in card
    assert "not empty" in _cli("export", cell.fingerprint, str(folder), *root)
    assert "layout=gpt2 cannot hold this model" in _cli(
        "export", cell.fingerprint, str(tmp_path / "n"), "--layout", "gpt2", *root
    )
    assert "there are: hf, gguf, peft" in _cli(
        "export", cell.fingerprint, str(tmp_path / "n"), "--to", "onnx", *root
    )
    cursor = next(cell.folder.glob("mlflow/*.json"))
    assert find_cell(tmp_path, json.loads(cursor.read_text())["run_id"]).folder == cell.folder
    shutil.rmtree(cell.folder / "checkpoints")
    assert "no checkpoint" in _cli("export", cell.fingerprint, str(tmp_path / "n"), *root)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with more rows than its tokenizer has ids, as transformers saves it."""
    folder = tmp_path_factory.mktemp("foreign")
    torch.manual_seed(1)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    LlamaForCausalLM = AutoModelForCausalLM.from_config
    LlamaForCausalLM(
        LlamaConfig(**shape, vocab_size=320, max_position_embeddings=96)
    ).save_pretrained(folder)
    write_tokenizer(ByteTokenizer(), folder, 96)
    return folder


@pytest.mark.slow
def test_an_imported_diffusion_model_is_bounded_and_fills_in(text: Path, tmp_path: Path) -> None:
    """A folder of Dream: Qwen2's weights, and a mask that config.json names by its id alone."""
    folder, root = tmp_path / "dream", ["--root", str(tmp_path)]
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = Qwen2Config(
        **shape, num_attention_heads=2, num_key_value_heads=1, vocab_size=320, use_cache=False
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    write_tokenizer(ByteTokenizer(), folder, 96)
    inner = Inner.from_file(str(folder / "tokenizer.json"))
    inner.add_special_tokens(["<|mask|>"])
    inner.save(str(folder / "tokenizer.json"))
    keys = json.loads((folder / "config.json").read_text())
    keys |= {"model_type": "Dream", "mask_token_id": 257, "max_position_embeddings": 96}
    (folder / "config.json").write_text(json.dumps(keys))
    common = [f"root={tmp_path}", "data=text", f"data.sources.0.path={text}", "eval.tokens=256"]
    done = run("runner.commands.cli", "import", "hf", str(folder), *common, "data.split=tail")
    assert done.returncode == 0, done.stderr
    (cell,) = [find_cell(tmp_path, folder.name) for folder in (tmp_path / "runs").iterdir()]
    assert cell.config.task.shift
    assert any("val_bound" in row for row in storage.read_lines(cell.folder / "metrics.jsonl"))
    said = ("generate", str(cell.folder), "--prompt", "A cat", "--tokens", "8", *root)
    assert _cli(*said, "--steps", "4", "--algorithm", "maskgit_plus").startswith("A cat")
    with_mask = (*said[:3], "A <|mask|> cat", *said[4:])
    assert "leave it out: the canvas follows the prompt" in _cli(*with_mask)
    out = tmp_path / "out"
    _cli("export", cell.fingerprint, str(out), *root)
    assert is_shifted(out)
    resizing = {"expand_token_id": 200, "delete_token_id": 256}  # DreamOn's
    (folder / "generation_config.json").write_text(json.dumps(resizing))
    read = TokenizerConfig(kind="folder", path=str(folder))
    assert set(read.named_tokens()) == {"<mask>", "<expand>", "<delete>"}
    assert read.build([]).token_ids == {"<mask>": 257, "<expand>": 200, "<delete>": 256}


@pytest.mark.slow
def test_an_imported_model_is_measured_spoken_to_trained_on_and_given_back(
    text: Path, tmp_path: Path
) -> None:
    foreign = llama3(tmp_path / "llama3")
    common = [
        f"root={tmp_path}",
        "data=text",
        f"data.sources.0.path={text}",
        "eval.tokens=256",
        "data.split=tail",
    ]
    done = run("runner.commands.cli", "import", "hf", str(foreign), *common)
    assert done.returncode == 0, done.stderr
    (cell,) = [find_cell(tmp_path, folder.name) for folder in (tmp_path / "runs").iterdir()]
    model, tokenizer, context = load_model(cell.folder)
    assert (tokenizer.vocab_size, context, cell.state) == (384, 96, "finished")
    ids = torch.from_numpy(tokenizer.encode("some text").astype("int64"))[None]
    theirs = AutoModelForCausalLM.from_pretrained(foreign)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert any("val_loss" in row for row in storage.read_lines(cell.folder / "metrics.jsonl"))
    out, root = tmp_path / "out", ["--root", str(tmp_path)]
    assert "LlamaForCausalLM" in _cli("export", cell.fingerprint, str(out), *root)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (foreign, out))
    given = before("A cat", return_tensors="pt")
    assert after("A cat")["input_ids"] == given["input_ids"][0].tolist()
    for key in ("bos_token", "eos_token", "chat_template"):
        assert getattr(after, key) == getattr(before, key)
    for name, keys in {"config": ["bos_token_id", "eos_token_id"], "generation_config": []}.items():
        old, new = (json.loads((f / f"{name}.json").read_text()) for f in (foreign, out))
        for key in keys or old:
            assert new[key] == old[key]
    card = (out / "README.md").read_text()
    assert str(tmp_path) not in card
    assert "it adds the ids 0 to a text" in card
    said = _cli("generate", str(cell.folder), "--prompt", "A cat", "--temperature", "0", *root)
    done = theirs.generate(**given, max_new_tokens=90, do_sample=False, pad_token_id=1)
    whole = before.decode(done[0], skip_special_tokens=True)
    assert said.startswith(whole[:40])
    asked = ("generate", str(cell.folder), "--prompt", "A cat", "--temperature", "0", *root)
    assert "A cat" + _cli(*asked, "--chat") == said  # the template puts BOS before what is said
    assert "--system does nothing without --chat" in _cli(*asked, "--system", "x")
    train = [
        "train.steps=3",
        "train.batch_size=2",
        "train.sequence_length=32",
        "optim.lr=1e-9",
        "name=ft",
    ]
    done = run("runner", f"init=hf:{foreign}", *train, *common)
    assert done.returncode == 0, done.stderr
    (tuned,) = [f for f in (tmp_path / "runs").iterdir() if f != cell.folder]
    first, last = (load_model(folder)[0].state_dict() for folder in (cell.folder, tuned))
    for name in first:  # it began where the imported model is
        torch.testing.assert_close(last[name], first[name], rtol=0, atol=1e-6)


def test_the_origin_counts_by_its_content(foreign: Path, compose: Compose, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(foreign, moved)
    (a,), (b,) = (make_cells([("", compose(f"init=hf:{f}"))]) for f in (foreign, moved))
    assert a.fingerprint == b.fingerprint
    assert a.config.model.width == 32
    torch.manual_seed(2)
    other = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=320,
        max_position_embeddings=96,
    )
    AutoModelForCausalLM.from_config(other).save_pretrained(moved)
    (c,) = make_cells([("", compose(f"init=hf:{moved}"))])
    assert c.fingerprint != a.fingerprint
    kept = with_pretrained(compose(f"init=hf:{foreign}", "model.dropout=0.25"))
    assert kept["model"]["dropout"] == 0.25


def test_origins_that_cannot_be_used_say_why(
    foreign: Path, compose: Compose, tmp_path: Path
) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(foreign, odd)
    (odd / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer.eos_token"):
        with_pretrained(compose(f"init=hf:{odd}"))
    given = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(given | {"eos_token_id": 256}))
    assert with_pretrained(compose(f"init=hf:{odd}"))["tokenizer"]["eos_token"] == "<|endoftext|>"
    (odd / "tokenizer.json").unlink()
    (odd / "config.json").write_text(json.dumps(given))
    with pytest.raises(ConfigError, match=r"no tokenizer.json"):
        with_pretrained(compose(f"init=hf:{odd}"))
    with pytest.raises(ConfigError, match="must be hf:DIR"):
        pretrained_folder("gguf:x")
    with pytest.raises(ConfigError, match="no such folder"):
        pretrained_folder(f"hf:{tmp_path / 'nowhere'}")
    both = validate(with_pretrained(compose(f"init=hf:{foreign}", "+upstream={run: abc}")))
    assert (both.init, both.inputs["init"].run) == (f"hf:{foreign}", "abc")
    small = tmp_path / "small"
    AutoModelForCausalLM.from_config(
        GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=99, n_positions=64)
    ).save_pretrained(small)
    write_tokenizer(ByteTokenizer(), small, 64)
    spec = validate(
        with_pretrained(compose(f"init=hf:{small}", "train.sequence_length=64"))
    ).tokenizer
    with pytest.raises(ValueError, match="they do not belong together"):
        spec.build([])


def test_a_padded_tokenizer_survives_its_file(foreign: Path) -> None:
    cfg = TokenizerConfig(kind="folder", path=str(foreign), vocab_size=320)
    assert loads(cfg.build([]).dumps()).vocab_size == 320
    assert Inner.from_file(str(foreign / "tokenizer.json")).get_vocab_size() == 257


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("data.sources.0.path=/home/me/my data/a.txt seed=1", "data.sources.0.path=a.txt seed=1"),
        ("| init | hf:/models/llama |", "| init | hf:llama |"),
        ('["~/a/b.jsonl", "/c"]', '["b.jsonl", "c"]'),
        ("https://x.org/a, t/bleu, 3 / 4, org/name", "https://x.org/a, t/bleu, 3 / 4, org/name"),
    ],
)
def test_a_model_card_names_no_folder_of_this_machine(written: str, shown: str) -> None:
    assert without_local_paths(written) == shown
