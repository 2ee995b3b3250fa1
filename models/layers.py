"""Layers that many models share: norms, the feed-forward network, linears packed for decoding.

Shape legend: batch, seq, dim = model width.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kernels.packed import PackedWeight, can_pack, packed_linear
from models.branch import Context
from models.branch_config import Activation, Norm
from models.rounded_linear import RoundedLinear
from models.stored_linear import StoredLinear


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang & Sennrich, arXiv 1910.07467), in the dtype of `x`."""

    def __init__(self, dim: int, eps: float | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = 1e-6 if eps is None else eps

    def forward(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        y = F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        return y.to(x.dtype)  # autocast of a GPU norms in fp32, in which the head's GEMMs would be


class LayerNorm(nn.Module):
    """(x - mean) / std * weight (+ bias), in the dtype of `x`."""

    def __init__(self, dim: int, bias: bool, eps: float | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.eps = 1e-5 if eps is None else eps

    def forward(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), bias, self.eps)
        return y.to(x.dtype)  # see RMSNorm


def make_norm(kind: Norm, dim: int, bias: bool, eps: float | None) -> RMSNorm | LayerNorm:
    """Return the norm named `kind`.

    Args:
        bias: LayerNorm has a bias; RMSNorm never has one.
        eps: None is the default of the kind.
    """
    return RMSNorm(dim, eps) if kind == "rmsnorm" else LayerNorm(dim, bias, eps)


class PackedLinear(nn.Module):
    """A linear layer for inference on a CPU, with a second copy of its weight: `kernels.packed`."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias, self.packed = weight, bias, PackedWeight(weight)

    def forward(self, x: Float[Tensor, "*rows k"]) -> Float[Tensor, "*rows n"]:
        return packed_linear(x, self.weight, self.packed, self.bias)


def pack_linears(module: nn.Module, dtype: torch.dtype, *, compiled: bool) -> None:
    """Replace every nn.Linear below `module` that can be packed by a `PackedLinear`.

    A `StoredLinear` says itself what it becomes in `dtype`; a `RoundedLinear` is rounded once.
    """
    for name, child in module.named_children():
        if isinstance(child, StoredLinear):
            child = child.for_inference(dtype, compiled=compiled)
            setattr(module, name, child)
        if isinstance(child, RoundedLinear):
            child.for_inference()
        if type(child) is nn.Linear and can_pack(child.weight):
            setattr(module, name, PackedLinear(child.weight, child.bias))
        else:
            pack_linears(child, dtype, compiled=compiled)


class FeedForward(nn.Module):
    """SwiGLU (gate and up are one GEMM), GELU (tanh form) or squared ReLU between two linears."""

    def __init__(self, dim: int, hidden: int, activation: Activation, *, bias: bool) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(dim, hidden * (2 if activation == "swiglu" else 1), bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)
        self.fused = {"up": {"gate": hidden, "up": hidden}} if activation == "swiglu" else {}

    def forward(
        self, x: Float[Tensor, "*rows dim"], _context: Context | None = None
    ) -> Float[Tensor, "*rows dim"]:
        return self.down(self.activate(self.up(x)))  # type: ignore[no-any-return]

    def activate(self, h: Float[Tensor, "*rows up"]) -> Float[Tensor, "*rows hidden"]:
        """Return the activations between the two linears, from the output of the first."""
        if self.activation == "swiglu":
            gate, value = h.chunk(2, dim=-1)
            return F.silu(gate) * value
        if self.activation == "gelu":
            return F.gelu(h, approximate="tanh")
        return F.relu(h).square()
