"""A linear layer for few rows on a CPU, its weight in the layout that oneDNN reads fastest.

Decoding multiplies a handful of rows with every weight, so its speed is that of reading weights
from memory. The plain layout reaches half of it in bf16, and in fp32 too where MKL multiplies on a
CPU that is not Intel's.

Shape legend: rows, n = outputs, k = inputs.
"""

from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# In fp32, on Intel's CPUs, MKL and the plain layout are as fast up to few rows and beyond many.
_FEW, _MANY = 2, 16


_CPU = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
_INTEL = str(_CPU.get("cpu_name", "Intel")).startswith("Intel")  # where unnamed: the plain layout


def can_pack(weight: Tensor) -> bool:
    """Return whether `PackedWeight` takes `weight`: bf16 or fp32, on a CPU with oneDNN."""
    supported = weight.dtype in (torch.float32, torch.bfloat16)
    has_op = hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return weight.device.type == "cpu" and supported and has_op and torch._C._has_mkldnn


class PackedWeight:
    """A copy of a weight [n k] in oneDNN's layout, opaque: only `packed_linear` reads it.

    A compiled graph cannot hold a tensor of that layout and knows it by its number.
    """

    def __init__(self, weight: Float[Tensor, "n k"]) -> None:
        self.tensor: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self.number = next(_NUMBERS)
        _BY_NUMBER[self.number] = self

    def __deepcopy__(self, _memo: dict[int, Any]) -> "PackedWeight":
        return self  # it never changes


_NUMBERS = count()
_BY_NUMBER: WeakValueDictionary[int, PackedWeight] = WeakValueDictionary()


def packed_linear(
    x: Float[Tensor, "*rows k"],
    weight: Float[Tensor, "n k"],
    packed: PackedWeight,
    bias: Float[Tensor, " n"] | None,
) -> Float[Tensor, "*rows n"]:
    """Return x weight^T + bias by the faster of the two layouts; it has no gradient.

    Args:
        packed: of `weight`.
    """
    rows = x.numel() // x.shape[-1]
    compiling = torch.compiler.is_compiling()
    if rows == 1 and compiling:
        # Inductor's own loop reads weights as fast as memory gives them; an mm it would leave to
        # MKL.
        product = (weight.float() * x.reshape(-1).float()).sum(-1).to(x.dtype)
        return (product if bias is None else product + bias).view(*x.shape[:-1], -1)
    plain = _INTEL and weight.dtype == torch.float32 and not _FEW < rows <= _MANY
    if x.dtype != weight.dtype or plain:
        return F.linear(x, weight, bias)
    flat = x.reshape(rows, x.shape[-1])
    if compiling:
        out: Tensor = _BY_NUMBER_OP(flat, bias, packed.number, weight.shape[0])
    else:  # a single row of fp32 is read fastest as it lies there
        as_it_lies = rows == 1 and weight.dtype == torch.float32
        out = _product(flat, weight if as_it_lies else packed.tensor, bias)
    return out.view(*x.shape[:-1], out.shape[-1])


def _product(flat: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(flat, weight, bias, "none", [], "")
    return out


def _by_number(flat: Tensor, bias: Tensor | None, number: int, outputs: int) -> Tensor:
    return _product(flat, _BY_NUMBER[number].tensor, bias)


def _shape_of_product(flat: Tensor, bias: Tensor | None, number: int, outputs: int) -> Tensor:
    return flat.new_empty(flat.shape[0], outputs)  # len() would fix the number of rows


# Of the two ways to define an operator this one costs a call a third of what custom_op's does.
_NAME = "espalier::packed_linear"
torch.library.define(_NAME, "(Tensor flat, Tensor? bias, int number, int outputs) -> Tensor")
torch.library.impl(_NAME, "CPU", _by_number)
torch.library.register_fake(_NAME, _shape_of_product)
_BY_NUMBER_OP = torch.ops.espalier.packed_linear.default
