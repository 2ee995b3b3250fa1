"""GGUF files of Llama's architecture: made into a Hugging Face folder, and written from a cell."""

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.adapter import merge
from models.decoder_config import DecoderConfig
from models.layouts import Llama
from models.rounded_linear import plain_layers
from models.stored_linear import decompress
from runner.data.corpus import load_tokenizer
from runner.exchange.gguf_file import (
    GGUFFile,
    locate,
    model_names,
    to_halves,
    to_pairs,
    turns,
    write,
)
from runner.exchange.gguf_tokenizer import tokenizer_files, tokenizer_keys, write_files
from runner.machine.errors import ConfigError, DataError
from runner.machine.storage import unfinished_name
from runner.machine.system_errors import reading, write_error
from runner.machine.text_files import read_json
from runner.records.cells import Cell
from runner.records.trained_model import load_model

DTYPES = ("fp32", "bf16", "fp16", "q8_0")
_REVISION = 1  # raised when the same file gives another folder
_ORIGIN = "gguf.json"
_ROPE_FREQUENCIES = "rope_freqs.weight"


def import_gguf(source: str, folder: Path | None, beside: Path) -> Path:
    """Return a Hugging Face folder with the model and tokenizer of a GGUF file, weights in fp32.

    A folder made of the same file earlier is used again.

    Args:
        source: FILE or package:NAME.
        folder: the folder to make (None: `beside`/NAME, NAME being the file's).
        beside: where folders lie by default.

    Raises:
        ConfigError: the folder holds something else; see also `locate`.
        DataError: the file is damaged or not of a form that is read.
    """
    file = locate(source)
    folder = folder or beside / file.stem
    opened = GGUFFile(file)
    with reading(file), open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    origin = {"sha256": digest, "revision": _REVISION}
    if folder.exists():
        known = folder / _ORIGIN
        if known.exists() and read_json(known) == origin:
            return folder
        raise ConfigError(f"{folder} exists and was not made of {file}; give another --out")
    config, weights = _config(opened), _weights_by_name(opened)
    files = {"config.json": config, **tokenizer_files(opened), _ORIGIN: origin}
    part = unfinished_name(folder)
    try:
        part.mkdir(parents=True)
        _save_weights(opened, weights, config, part)
        write_files(files, part)
        part.rename(folder)
    except OSError as error:
        raise write_error(folder, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _config(source: GGUFFile) -> dict[str, Any]:
    """Return the keys of config.json.

    Raises:
        DataError: the architecture, or an option of it, is not read.
    """
    architecture = source.key("general.architecture", str)
    if architecture != "llama":
        raise DataError(
            f"{source.file}: general.architecture={architecture!r} is not read; read is: llama"
        )
    if source.metadata.get("llama.expert_count"):
        raise DataError(f"{source.file} has experts; only dense models are read")
    _check_sizes(source)
    width = source.key("llama.embedding_length", int)
    heads = source.key("llama.attention.head_count", int)
    dim = source.key("llama.attention.key_length", int, width // heads)
    rotary = source.key("llama.rope.dimension_count", int, dim)
    if rotary != dim:
        raise DataError(f"{source.file} turns {rotary} of {dim} dimensions; only all are read")
    tokens = source.key("tokenizer.ggml.tokens", list)
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": source.key("llama.vocab_size", int, len(tokens)),
        "hidden_size": width,
        "intermediate_size": source.key("llama.feed_forward_length", int),
        "num_hidden_layers": source.key("llama.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": source.key("llama.attention.head_count_kv", int, heads),
        "head_dim": dim,
        "max_position_embeddings": source.key("llama.context_length", int),
        "rms_norm_eps": _short(source.key("llama.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": source.key("llama.rope.freq_base", float, 10000.0),
        "rope_scaling": _scaling(source),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in source.names(),
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def _check_sizes(source: GGUFFile) -> None:
    """Raise DataError if a size is no size, or heads do not divide what they share."""
    names = ("embedding_length", "block_count", "attention.head_count", "feed_forward_length")
    width, blocks, heads, _ = (source.key(f"llama.{name}", int) for name in names)
    kv_heads = source.key("llama.attention.head_count_kv", int, heads)
    for name in (*names, "attention.head_count_kv", "attention.key_length", "context_length"):
        value = source.key(f"llama.{name}", int, 1)
        if value < 1:
            raise DataError(f"{source.file}: llama.{name}={value} must be at least 1")
    tensors = len(source.names())
    if blocks > tensors:
        raise DataError(
            f"{source.file}: llama.block_count={blocks}, and there are {tensors} tensors"
        )
    if heads % kv_heads or (width % heads and "llama.attention.key_length" not in source.metadata):
        raise DataError(
            f"{source.file}: {heads} heads and {kv_heads} of keys and values do not divide a width "
            f"of {width}; convert the model again"
        )


def _short(value: float) -> float:
    """Return the shortest decimal that is `value` in fp32: 1e-05 of 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _scaling(source: GGUFFile) -> dict[str, Any] | None:
    """Return the key rope_scaling: that of Llama 3.1, or linear."""
    if _ROPE_FREQUENCIES in source.names():
        return _llama3_scaling(source)
    kind = source.metadata.get("llama.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind != "linear":
        raise DataError(f"{source.file}: llama.rope.scaling.type={kind!r} is not read")
    factor = source.key("llama.rope.scaling.factor", float)
    return {"rope_type": "linear", "type": "linear", "factor": factor}


def _llama3_scaling(source: GGUFFile) -> dict[str, Any]:
    """Return Llama 3.1's scaling, of which the file keeps the divisor of each frequency only.

    Raises:
        DataError: the divisors are not those of Llama 3.1, whose bounds are 1 and 4 turns in 8,192
            tokens.
    """
    divisors = source.read(_ROPE_FREQUENCIES)
    base = source.key("llama.rope.freq_base", float, 10000.0)
    frequencies = base ** -(np.arange(len(divisors)) / len(divisors))
    factor, turns_ = float(divisors.max()), 8192 * frequencies / (2 * np.pi)
    smooth = np.clip((turns_ - 1) / 3, 0, 1)
    if not np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise DataError(f"{source.file}: {_ROPE_FREQUENCIES} is not the scaling of Llama 3.1")
    return {
        "rope_type": "llama3",
        "type": "llama3",
        "factor": factor,
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }


def _weights_by_name(source: GGUFFile) -> dict[str, str]:
    """Return {name in the file: name in transformers}.

    Raises:
        DataError: a tensor is missing or left over.
    """
    there = set(source.names()) - {_ROPE_FREQUENCIES}
    names = model_names(
        source.key("llama.block_count", int), tied="output.weight" not in source.names()
    )
    if missing := sorted(names.keys() - there):
        raise DataError(
            f"{source.file} lacks {len(missing)} tensors, the first is {missing[0]}; "
            "convert the model again"
        )
    if left := sorted(there - names.keys()):
        raise DataError(
            f"{source.file} holds tensors that Llama does not have: {', '.join(left[:3])}"
        )
    return names


def _save_weights(
    source: GGUFFile, names: Mapping[str, str], config: Mapping[str, Any], folder: Path
) -> None:
    from huggingface_hub import save_torch_state_dict  # noqa: PLC0415

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    state = {}
    for name, theirs in names.items():
        values = source.read(name)
        if not np.isfinite(values).all():
            raise DataError(f"{source.file}: {name} holds NaN or infinity; convert the model again")
        if turns(name):
            own = heads[name.split(".")[-2]]
            if len(values) != own * config["head_dim"]:
                raise DataError(
                    f"{source.file}: {name} has {len(values)} rows for {own} heads of "
                    f"{config['head_dim']}; convert the model again"
                )
            values = to_halves(values, own)
        state[theirs] = torch.tensor(values)
    rows = state["model.embed_tokens.weight"].shape[0]
    if rows != config["vocab_size"]:
        raise DataError(
            f"{source.file}: token_embd.weight has {rows} rows for a vocabulary of "
            f"{config['vocab_size']}; convert the model again"
        )
    save_torch_state_dict(state, folder, metadata={"format": "pt"})


def export_gguf(cell: Cell, file: Path, *, dtype: str, average: bool = False) -> str:
    """Write the newest weights of `cell` as a new GGUF file; return the architecture.

    Args:
        dtype: of the matrices: fp32, bf16, fp16 or q8_0.
        average: export the averaged weights (train.average).

    Raises:
        ConfigError: `dtype` is unknown, the file exists, or model or tokenizer has no form in GGUF.
        CheckpointError: the cell has no checkpoint.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r} is none of: {', '.join(DTYPES)}")
    if file.exists():
        raise ConfigError(f"{file} exists; choose a new file")
    model, _, context = load_model(cell.folder, average=average)
    tokenizer = load_tokenizer(cell.folder / "tokenizer.json")
    try:
        model = decompress(plain_layers(merge(model)))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    cfg = model.cfg
    reason: Any = type(cfg).__name__
    if isinstance(cfg, DecoderConfig):
        written = Llama().write(cfg, model.vocab_size)
        reason = written if isinstance(written, str) else _unwritable(cfg)
    if reason or not isinstance(cfg, DecoderConfig):
        raise ConfigError(f"GGUF holds models of Llama's architecture, not this one ({reason})")
    keys = _keys(cfg, model.vocab_size, context, cell.config.name) | tokenizer_keys(tokenizer)
    write(file, keys, _tensors(cfg, model.state_dict()), dtype)
    return "llama"


def _unwritable(cfg: DecoderConfig) -> str:
    values = {"bias": cfg.bias, "rope_scaling": cfg.rope_scaling}
    return ", ".join(f"{name}={value}" for name, value in values.items() if value)


def _keys(cfg: DecoderConfig, vocab_size: int, context: int, name: str) -> dict[str, Any]:
    return {
        "general.name": name,
        "llama.vocab_size": vocab_size,
        "llama.context_length": context,
        "llama.embedding_length": cfg.width,
        "llama.block_count": cfg.depth,
        "llama.feed_forward_length": cfg.hidden_dim,
        "llama.attention.head_count": cfg.num_heads,
        "llama.attention.head_count_kv": cfg.kv_heads,
        "llama.attention.key_length": cfg.attention_dim,
        "llama.attention.value_length": cfg.attention_dim,
        "llama.attention.layer_norm_rms_epsilon": float(cfg.norm_eps or 1e-6),
        "llama.rope.dimension_count": cfg.attention_dim,
        "llama.rope.freq_base": float(cfg.rope_base),
    }


def _tensors(
    cfg: DecoderConfig, state: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, values in fp32) of the tensors of the file."""
    theirs: dict[str, torch.Tensor] = {}
    for name, source in Llama().sources(cfg).items():
        theirs |= source.split(state[name].float())
    heads = {"attn_q": cfg.num_heads, "attn_k": cfg.kv_heads}
    for name, stored in model_names(cfg.depth, tied=cfg.tied).items():
        values = theirs.pop(stored).numpy()
        yield name, to_pairs(values, heads[name.split(".")[-2]]) if turns(name) else values
