"""Some columns of a layer's input in FP8, the rest under its recipe: OutControl of TetraJet-v2.

    fprop   y    = x_rest w_rest^T + x_out w_out^T
    wgrad   dw_c = g^T x_c for the columns c of each part

The parts of x and w named `out` are E4M3 with an fp32 scale for each 128 elements along the summed
dimension, without Hadamard transform, and so is g beside x_out. dgrad sums over rows of the weight
and takes all of its columns alike.

Shape legend: rows, k = width of x, out of which are outliers.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kernels.emulate import Operand, emulate
from kernels.quantiser import Quantiser
from kernels.scaled_mm import scaled_mm

GROUP = 128
_FP8 = Quantiser(format="fp8_e4m3", block=(1, GROUP), scale="fp32")


@dataclass(frozen=True)
class Columns:
    """The columns of the input that are outliers and those that are not, each in rising order."""

    outliers: Int[Tensor, " out"]
    rest: Int[Tensor, " rest"]

    @classmethod
    def of(cls, outliers: Int[Tensor, " out"], k: int) -> "Columns":
        """Return the columns of an input of width `k`, of which those of `outliers` are so."""
        is_one = torch.zeros(k, dtype=torch.uint8, device=outliers.device)
        is_one[outliers] = 1
        order = is_one.sort(stable=True).indices  # shapes that no value decides
        return cls(order[k - len(outliers) :], order[: k - len(outliers)])

    def dequantised(self, rest: Operand | None, outliers: Operand) -> Float[Tensor, "rows k"]:
        """Return in fp32 what both parts stand for.

        Rows of `rest` and columns of `outliers` may be filled up.
        """
        made = None if rest is None else rest.dequantised()[: len(outliers.values)]
        return self.joined(made, outliers.dequantised()[:, : len(self.outliers)])

    def joined(
        self, rest: Float[Tensor, "rows rest"] | None, outliers: Float[Tensor, "rows out"]
    ) -> Float[Tensor, "rows k"]:
        """Return both parts in the order of the columns; `rest` is None where there are none."""
        if rest is None:
            return outliers
        k = len(self.outliers) + len(self.rest)
        both = rest.new_empty(len(rest), k)
        both[:, self.rest] = rest
        both[:, self.outliers] = outliers
        return both


def in_fp8(x: Float[Tensor, "rows cols"], dim: int) -> Operand:
    """Return `x` as an FP8 operand summed over `dim`, which is filled up with zeros to groups."""
    missing = -x.shape[dim] % GROUP
    padding = (0, missing) if dim == 1 else (0, 0, 0, missing)
    return emulate(F.pad(x, padding), _FP8, dim)


def fp8_mm(a: Float[Tensor, "..."], b: Float[Tensor, "..."], dim: int) -> Float[Tensor, "m n"]:
    """Return the fp32 product of two tensors in FP8, both summed over their dimension `dim`."""
    return scaled_mm(in_fp8(a, dim), in_fp8(b, dim), sums=(dim, dim), fp32=True)


def fprop_with_outliers(
    x: Float[Tensor, "rows k"],
    weight: Float[Tensor, "n k"],
    columns: Columns,
    pair: tuple[Operand, Operand] | None,
) -> tuple[Float[Tensor, "rows n"], Float[Tensor, "rows k"], Float[Tensor, "n k"]]:
    """Return (y, x as quantised, w as quantised), all in bf16.

    Args:
        pair: x and w of the rest as operands, whose rows may be filled up; None if all are
            outliers.
    """
    left, right = (in_fp8(t[:, columns.outliers], 1) for t in (x, weight))
    y = scaled_mm(left, right, sums=(1, 1), fp32=True)
    if pair is not None:
        y = y + scaled_mm(*pair, sums=(1, 1), fp32=True)[: len(x)]
    made_x = columns.dequantised(None if pair is None else pair[0], left)
    made_w = columns.dequantised(None if pair is None else pair[1], right)
    return y.to(torch.bfloat16), made_x.to(torch.bfloat16), made_w.to(torch.bfloat16)
