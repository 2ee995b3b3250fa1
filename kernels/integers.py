"""Integers of few bits with a scale, and where asked a zero point, for each group of a row.

w = (q - z) s. Symmetric: z = 0 and q in -qmax..qmax, qmax = 2**(bits - 1) - 1, so that w and -w
have the same magnitude. Asymmetric: s and z map the smallest and the largest weight of the group to
0 and 2**bits - 1; both ranges contain 0.

Shape legend: rows, cols of the matrix; groups of a row; a last group may be shorter.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float16, Int8, UInt8
from torch import Tensor

from kernels.formats import pack, unpack


@dataclass(frozen=True)
class IntegerGrid:
    """The values that the weights of a matrix may have.

    Args:
        low, high: the smallest and the largest code.
        group: columns of a group.
        scales: of each group; every one is a value of bf16, in which it is stored.
        zeros: of each group, 0 throughout if symmetric; values of bf16 too.
    """

    low: int
    high: int
    group: int
    scales: Float[Tensor, "rows groups"]
    zeros: Float[Tensor, "rows groups"]

    def codes(self, weight: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        """Return the codes of the nearest values."""
        scales, zeros = self.spread(self.scales, weight), self.spread(self.zeros, weight)
        return (
            torch.where(scales > 0, weight / scales + zeros, zeros)
            .round()
            .clamp(self.low, self.high)
        )

    def values(self, codes: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        """Return what codes stand for."""
        return (codes - self.spread(self.zeros, codes)) * self.spread(self.scales, codes)

    def columns(self, first: int, last: int) -> "IntegerGrid":
        """Return the grid of the columns from `first` to before `last`, all of one group."""
        part = slice(first // self.group, first // self.group + 1)
        grid = self.scales[:, part], self.zeros[:, part]
        return IntegerGrid(self.low, self.high, last - first, *grid)

    def spread(self, of_groups: Tensor, like: Tensor) -> Tensor:
        """Return a value of each group at each column of `like`."""
        return of_groups.repeat_interleave(self.group, 1)[:, : like.shape[1]]


def code_range(bits: int, *, symmetric: bool) -> tuple[int, int]:
    """Return (smallest, largest) code."""
    top = 2 ** (bits - 1) - 1
    return (-top, top) if symmetric else (0, 2**bits - 1)


def integer_grid(
    weight: Float[Tensor, "rows cols"],
    bits: int,
    group: int | None = None,
    *,
    symmetric: bool = True,
) -> IntegerGrid:
    """Return the grid that spans the weights of each group (None: of each row).

    Relative RMS error of rounding to it, N(0, 1): 8 bits, rows of 1024, .0079; 4 bits in groups of
    32, symmetric .097, asymmetric .078. A zero point is no integer, so that the smallest weight is
    met as the largest is.
    """
    group = weight.shape[1] if group is None else group
    grouped = _groups(weight.float(), group)
    low, high = code_range(bits, symmetric=symmetric)
    if symmetric:
        scales = in_bf16(grouped.abs().amax(dim=2) / high)
        return IntegerGrid(low, high, group, scales, torch.zeros_like(scales))
    least, most = grouped.amin(dim=2).clamp(max=0.0), grouped.amax(dim=2).clamp(min=0.0)
    scales = in_bf16((most - least) / high)
    zeros = in_bf16(torch.where(scales > 0, -least / scales, 0.0))
    return IntegerGrid(low, high, group, scales, zeros)


def ternary_grid(weight: Float[Tensor, "rows cols"], group: int | None = None) -> IntegerGrid:
    """Return -s, 0 and s, s being the mean magnitude of a group (BitNet b1.58, arXiv 2402.17764).

    The paper has one s a matrix. Relative RMS error .513 on N(0, 1), of which 31% become 0.
    """
    group = weight.shape[1] if group is None else group
    grouped = weight.float().abs()
    number = _groups(torch.ones_like(grouped), group).sum(dim=2)
    scales = in_bf16(_groups(grouped, group).sum(dim=2) / number)
    return IntegerGrid(-1, 1, group, scales, torch.zeros_like(scales))


def pack_bits(codes: UInt8[Tensor, "rows cols"], bits: int) -> UInt8[Tensor, "rows bytes"]:
    """Return codes of `bits` bits one after the other, the low bit first, rows in whole bytes."""
    if bits == 8:
        return codes
    if bits == 4:
        return pack(F.pad(codes, (0, codes.shape[1] % 2)))
    spread = (codes[..., None] >> torch.arange(bits, dtype=torch.uint8, device=codes.device)) & 1
    flat = spread.flatten(1)
    flat = F.pad(flat, (0, -flat.shape[1] % 8)).view(len(codes), -1, 8)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (flat * weights).sum(dim=2, dtype=torch.uint8)


def unpack_bits(
    packed: UInt8[Tensor, "rows bytes"], bits: int, cols: int
) -> UInt8[Tensor, "rows cols"]:
    """Return the codes of `pack_bits`."""
    if bits == 8:
        return packed
    if bits == 4:
        return unpack(packed)[:, :cols]
    eight = torch.arange(8, dtype=torch.uint8, device=packed.device)
    spread = ((packed[..., None] >> eight) & 1).flatten(1)[:, : cols * bits]
    codes: Tensor = (spread.view(len(packed), cols, bits) << eight[:bits]).sum(2, dtype=torch.uint8)
    return codes


def int8_rows(x: Float[Tensor, "*batch cols"]) -> tuple[Int8[Tensor, "*batch cols"], Tensor]:
    """Return (codes, scales [*batch, 1]) of each row, which its largest magnitude makes 127."""
    scales = x.abs().amax(dim=-1, keepdim=True).float() / 127.0
    codes = (x.float() / torch.where(scales > 0, scales, 1.0)).round()
    return codes.to(torch.int8), scales


def span_codes(
    x: Float[Tensor, "rows cols"], bits: int
) -> tuple[UInt8[Tensor, "rows cols"], Float16[Tensor, "rows 1"], Float16[Tensor, "rows 1"]]:
    """Return (codes, steps, least): x = least + code x step, from a row's smallest to its largest.

    Unlike `integer_grid` the span need not contain 0: keys have channels far from it (KIVI, arXiv
    2402.02750). Error: half a step, and the rounding of `least` to fp16; beyond fp16's range of
    65,504 it saturates.
    """
    x, top = x.float(), torch.finfo(torch.float16).max
    least, most = (end.clamp(-top, top) for end in x.aminmax(dim=1, keepdim=True))
    least = least.half()
    steps = ((most - least.float()) / (2**bits - 1)).clamp(0.0, top).half()
    usable = torch.where(steps > 0, steps.float(), 1.0)
    codes = ((x - least.float()) / usable).round().clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), steps, least


def span_values(
    codes: UInt8[Tensor, "rows cols"],
    steps: Float16[Tensor, "rows 1"],
    least: Float16[Tensor, "rows 1"],
) -> Float[Tensor, "rows cols"]:
    """Return what `span_codes` stand for, fp32."""
    return codes.float() * steps.float() + least.float()


def in_bf16(x: Tensor) -> Tensor:
    """Return `x` rounded to bf16, in fp32."""
    return x.bfloat16().float()


def _groups(x: Float[Tensor, "rows cols"], group: int) -> Float[Tensor, "rows groups group"]:
    return F.pad(x, (0, -x.shape[1] % group)).view(len(x), -1, group)
