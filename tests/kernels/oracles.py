"""Published implementations as oracles: TransformerEngine's NVFP4 reference on a CPU."""

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch


def te_recipes() -> Any:
    """Return transformer_engine.common.recipe, which alone needs no CUDA."""
    spec = importlib.util.find_spec("transformer_engine")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    file = Path(spec.submodule_search_locations[0]) / "common" / "recipe" / "__init__.py"
    found = importlib.util.spec_from_file_location("te_recipes", file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["te_recipes"] = module  # dataclasses look there
    found.loader.exec_module(module)
    return module


def te_reference() -> Any:
    """Return TransformerEngine's reference_nvfp4 module, its imports of the CUDA part stubbed."""
    spec = importlib.util.find_spec("transformer_engine")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = Path(spec.submodule_search_locations[0])
    names = {
        f"transformer_engine{tail}": root / path
        for tail, path in {
            "": "",
            ".pytorch": "pytorch",
            ".pytorch.custom_recipes": "pytorch/custom_recipes",
            ".pytorch.tensor": "pytorch/tensor",
        }.items()
    }
    before = {n: m for n, m in sys.modules.items() if n.startswith("transformer_engine")}
    for name, path in names.items():
        module = types.ModuleType(name)
        module.__path__ = [str(path)]
        sys.modules[name] = module
    storage = types.ModuleType("transformer_engine.pytorch.quantized_tensor")
    storage.QuantizedTensorStorage = type("QuantizedTensorStorage", (), {})  # type: ignore[attr-defined]
    storage.Quantizer = _Quantizer  # type: ignore[attr-defined]
    sys.modules[storage.__name__] = storage
    helpers = types.ModuleType("transformer_engine.pytorch.tensor.utils")
    helpers.is_custom = lambda *_: True  # type: ignore[attr-defined]
    sys.modules[helpers.__name__] = helpers
    try:
        return importlib.import_module("transformer_engine.pytorch.custom_recipes.reference_nvfp4")
    finally:
        for name in [n for n in sys.modules if n.startswith("transformer_engine")]:
            del sys.modules[name]
        sys.modules.update(before)


class _Quantizer:
    def __init__(self, *, rowwise: bool, columnwise: bool) -> None:
        self.rowwise_usage, self.columnwise_usage = rowwise, columnwise


def inputs(kind: str, rows: int = 128, cols: int = 256, seed: int = 0) -> torch.Tensor:
    """Return a bf16 matrix of one of the kinds that quantisers stumble over."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator)
    if kind == "lognormal":
        x = x.sign() * torch.exp(3.0 * torch.randn(rows, cols, generator=generator))
    elif kind == "ties":
        x = torch.randint(-24, 25, (rows, cols), generator=generator) / 4.0
    elif kind == "zeros":
        x = torch.where(torch.rand(rows, cols, generator=generator) < 0.9, 0.0, x)
        x[: rows // 2] = 0.0
    elif kind == "wide":  # block scales that underflow E4M3
        x = x * 2.0 ** torch.randint(
            -30, 20, (rows, cols // 16), generator=generator
        ).repeat_interleave(16, 1)
    elif kind == "outliers":
        x[:, ::61] *= 100.0
    return x.bfloat16()


KINDS = ("normal", "lognormal", "ties", "zeros", "wide", "outliers")
