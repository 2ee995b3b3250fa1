"""A linear layer for few rows on a CPU, its weight in the layout that oneDNN reads fastest.

Decoding multiplies a handful of rows with every weight, so its speed is that of reading weights
from memory. The plain layout reaches half of it in bf16, and in fp32 too where MKL multiplies on a
CPU that is not Intel's.

Shape legend: rows, n = outputs, k = inputs.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# In fp32, on Intel's CPUs, MKL and the plain layout are as fast up to few rows and beyond many.
_FEW, _MANY = 2, 16


_CPU = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
_INTEL = str(_CPU.get("cpu_name", "Intel")).startswith("Intel")  # where unnamed: the plain layout


def can_pack(weight: Tensor) -> bool:
    """Return whether `pack` takes `weight`: bf16 or fp32, on a CPU with oneDNN."""
    supported = weight.dtype in (torch.float32, torch.bfloat16)
    has_op = hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return weight.device.type == "cpu" and supported and has_op and torch._C._has_mkldnn


def pack(weight: Float[Tensor, "n k"]) -> Tensor:
    """Return a copy of `weight` in oneDNN's layout, opaque: only `packed_linear` reads it."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return packed


def packed_linear(
    x: Float[Tensor, "*rows k"],
    weight: Float[Tensor, "n k"],
    packed: Tensor | None,
    bias: Float[Tensor, " n"] | None,
) -> Float[Tensor, "*rows n"]:
    """Return x weight^T + bias by the faster of the two layouts; it has no gradient.

    Args:
        packed: `pack(weight)`; None leaves the plain layout only.
    """
    rows = x.numel() // x.shape[-1]
    if rows == 1 and torch.compiler.is_compiling():
        # Inductor's own loop reads weights as fast as memory gives them; an mm it would leave to
        # MKL.
        product = (weight.float() * x.reshape(-1).float()).sum(-1).to(x.dtype)
        return (product if bias is None else product + bias).view(*x.shape[:-1], -1)
    plain = weight.dtype == torch.float32 and not _FEW < rows <= _MANY and _INTEL
    if packed is None or x.dtype != weight.dtype or plain:
        return F.linear(x, weight, bias)
    flat = x.reshape(rows, x.shape[-1])
    if rows == 1 and weight.dtype == torch.float32:
        packed = weight  # a single row is read fastest as it lies there
    out: Tensor = torch.ops.mkldnn._linear_pointwise(flat, packed, bias, "none", [], "")
    return out.view(*x.shape[:-1], out.shape[-1])
