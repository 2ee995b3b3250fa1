"""Weights in few bits as compressed-tensors stores them, which transformers and vLLM read.

    pack-quantized          integers of 2 to 8 bits, one after the other in words of 32
    int-quantized           8-bit integers, activations in 8 bits too, by token
    float-quantized         E4M3 with a scale for each row; naive-quantized without activations
    nvfp4-pack-quantized, mxfp4-pack-quantized, mxfp8-quantized

Shape legend: rows, cols of a matrix; groups of a row.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.integers import pack_bits
from kernels.stored import restored_codes
from models.layouts import Layout, Llama, Qwen2, Qwen3, TensorSource
from models.scheme import Scheme
from models.stored_linear import StoredLinear, stored_layers

_HOLDS = (Llama, Qwen2, Qwen3)
_FORMATS = {  # of (elements, whether activations are quantised too)
    ("int8", False): "pack-quantized",
    ("int8", True): "int-quantized",
    ("int", False): "pack-quantized",
    ("ternary", False): "pack-quantized",
    ("fp8", False): "naive-quantized",
    ("fp8", True): "float-quantized",
    ("nvfp4", False): "nvfp4-pack-quantized",
    ("nvfp4", True): "nvfp4-pack-quantized",
    ("mxfp4", False): "mxfp4-pack-quantized",
    ("mxfp4", True): "mxfp4-pack-quantized",
    ("mxfp8", False): "mxfp8-quantized",
    ("mxfp8", True): "mxfp8-quantized",
}
_IN_BF16 = ("mxfp4", "mxfp8", "nvfp4")
_FLOATS = {"fp8": 8, "mxfp8": 8, "nvfp4": 4, "mxfp4": 4}  # bits of an element
IN_FULL = "export it in full, --to hf"


def compressed_state(
    model: Any, layout: Layout, dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, quantization_config of config.json) of a model with stored layers.

    What is not stored in few bits, and the scales of integers and E4M3, is in `dtype` (None: fp32),
    which a reader multiplies in: fp32 gives the model's own logits.

    Raises:
        ValueError: compressed-tensors has no form for the scheme, the layout, or the columns of a
            layer; or reads it in bf16 alone.
    """
    stored = stored_layers(model)
    (scheme,) = {layer.scheme for layer in stored.values()}
    config, dtype = _config(scheme), dtype or torch.float32
    if scheme.storage.elements in _IN_BF16 and dtype != torch.bfloat16:
        raise ValueError(
            f"compressed-tensors reads scheme={scheme.name} in bf16 alone: --dtype bf16; or "
            f"{IN_FULL}"
        )
    if not isinstance(layout, _HOLDS):
        names = ", ".join(kind.model_type for kind in _HOLDS)
        raise ValueError(
            f"compressed-tensors names the nn.Linear of {names}; {layout.model_type} has others: "
            f"{IN_FULL}"
        )
    sources = layout.sources(model.cfg)
    full = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.rpartition(".")[0] not in stored or name.endswith(".bias")
    }
    state = {
        theirs: part.to(dtype)
        for name, tensor in full.items()
        for theirs, part in sources[name].split(tensor).items()
    }
    for name, layer in stored.items():
        state |= _split(_parts(name, layer, dtype), sources[f"{name}.weight"], layer.shape[1])
    return state, config


def _config(scheme: Scheme) -> dict[str, Any]:
    """Return the quantization_config of a scheme."""
    storage = scheme.storage
    form = _FORMATS.get((storage.elements, scheme.dynamic))
    why = None
    if form is None:
        why = f"it has no format of {storage.elements}"
    elif not storage.symmetric:
        why = "its zero points are integers, these are not"
    elif scheme.method == "awq":
        why = "it has no place for the factors of the inputs"
    if why is not None:
        raise ValueError(f"compressed-tensors cannot hold scheme={scheme.name}: {why}; {IN_FULL}")
    group = {"targets": ["Linear"], "format": form, "weights": _arguments(scheme)}
    if scheme.dynamic:
        group["input_activations"] = _arguments(scheme) | _of_tokens(scheme)
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _arguments(scheme: Scheme) -> dict[str, Any]:
    storage, elements = scheme.storage, scheme.storage.elements
    group = {"nvfp4": 16, "mxfp4": 32, "mxfp8": 32}.get(elements, storage.group)
    wide = "tensor_group" if elements == "nvfp4" else "group"
    arguments: dict[str, Any] = {
        "num_bits": _FLOATS.get(elements, storage.bits),
        "type": "float" if elements in _FLOATS else "int",
        "symmetric": True,
        "strategy": "channel" if group is None else wide,
        "group_size": group,
        "dynamic": False,
    }
    if elements in ("mxfp4", "mxfp8"):
        arguments |= {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
    if elements == "nvfp4":
        arguments["scale_dtype"] = "torch.float8_e4m3fn"
    return arguments


def _of_tokens(scheme: Scheme) -> dict[str, Any]:
    """Return what the arguments of activations have instead: scales made as they come."""
    if scheme.storage.elements in ("int8", "fp8"):
        return {"strategy": "token", "dynamic": True}
    return {"dynamic": True}


def _parts(name: str, layer: StoredLinear, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of a layer by the end of their names, rows first."""
    packed, storage = layer.packed, layer.scheme.storage
    cols, elements, scales = layer.shape[1], storage.elements, packed["scales"]
    group = {"nvfp4": 16, "mxfp4": 32, "mxfp8": 32}.get(elements, storage.group)
    if group is not None and cols % group:
        raise ValueError(
            f"compressed-tensors has whole groups only: {name} has {cols} columns, no multiple of "
            f"{group}; {IN_FULL}"
        )
    if elements == "int8":
        codes = packed["codes"]
        made = {"weight_scale": scales.view(torch.float32).to(dtype)}
        whole = {"weight": codes} if layer.scheme.dynamic else {"weight_packed": _words(codes, 8)}
        return made | whole
    if elements in ("int", "ternary"):
        codes = restored_codes(packed, storage, cols).to(torch.int8)
        words = _words(codes, storage.bits)
        return {"weight_packed": words, "weight_scale": scales.view(torch.bfloat16).to(dtype)}
    if elements == "fp8":
        codes = packed["codes"].view(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": scales.view(torch.float32).to(dtype)}
    if elements == "mxfp8":
        return {"weight": packed["codes"].view(torch.float8_e4m3fn), "weight_scale": scales}
    if elements == "mxfp4":
        return {"weight_packed": packed["codes"], "weight_scale": scales}
    outer = packed["outer"].view(torch.float32).reshape(())
    return {
        "weight_packed": packed["codes"],
        "weight_scale": scales.view(torch.float8_e4m3fn),
        "weight_global_scale": 1.0 / outer,
    }


def _words(codes: Tensor, bits: int) -> Tensor:
    """Return signed codes, from -2**(bits - 1) on, in words of 32 bits, rows in whole words."""
    packed = pack_bits((codes.int() + 2 ** (bits - 1)).to(torch.uint8), bits)
    return torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4)).view(torch.int32)


def _split(parts: dict[str, Tensor], source: TensorSource, cols: int) -> dict[str, Tensor]:
    """Return the parts of a layer as those of the layers that it joins, by their names."""
    state = {}
    for end, part in parts.items():
        whole = part.ndim == 0  # of the matrix
        rows = list(source.rows) or [0 if whole else len(part)]
        pieces = [part[None]] * len(rows) if whole else torch.split(part, rows)
        for name, piece in zip(source.names, pieces, strict=True):
            stem = name.removesuffix("weight")
            state[stem + end] = piece.clone(memory_format=torch.contiguous_format)
            if piece.dtype == torch.int32:
                state[f"{stem}weight_shape"] = torch.tensor([len(piece), cols])
    return state
