"""The product of a few rows in bf16 with a weight in 4 bits, by torch's own kernel for CPUs.

It reads half a byte a weight. On one thread of an x86 CPU, groups of 32, against bf16 in oneDNN's
layout: 1.3 times as fast for one row of 1024 x 1024, 3 times where weights do not fit the cache;
as fast for two rows, and slower beyond. In fp32 torch has a loop that is a hundred times slower.

Shape legend: rows, n = outputs, k = inputs; groups of k.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

MOST_ROWS = 2
_GROUPS = (32, 64, 128, 256)
ZERO = 8  # the code that stands for 0


def has_int4(device: torch.device) -> bool:
    """Return whether torch has the kernel on `device`, and vector instructions for it."""
    names = ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu")
    known = all(hasattr(torch.ops.aten, name) for name in names)
    return known and device.type == "cpu" and "AVX" in torch.backends.cpu.get_cpu_capability()


def fits_int4(n: int, k: int, group: int) -> bool:
    """Return whether the kernel takes a matrix of these sizes."""
    return group in _GROUPS and k % group == 0 and n % 16 == 0


def pack_int4(
    codes: UInt8[Tensor, "n k"], scales: Float[Tensor, "n groups"]
) -> tuple[Tensor, Tensor]:
    """Return what `int4_linear` reads of codes from 0 to 15, of which 8 is 0, and their scales."""
    both = torch.stack((scales.T, torch.zeros_like(scales.T)), dim=-1)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int().contiguous(), 1)
    return packed, both.bfloat16().contiguous()


def int4_linear(
    x: Float[Tensor, "*rows k"], packed: Tensor, scales: Tensor, group: int
) -> Float[Tensor, "*rows n"]:
    """Return x W^T in bf16, summed in fp32."""
    flat = x.flatten(0, -2).bfloat16()
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, packed, group, scales)
    return y.view(*x.shape[:-1], -1)
