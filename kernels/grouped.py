"""Matrix products of groups of rows, each with its own matrix, in one kernel where there is one.

Shape legend: rows, sorted by group; groups; k = inputs, n = outputs, half = n after `activate`.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def can_group(x: Float[Tensor, "rows k"], hidden: int) -> bool:
    """Return whether torch has a grouped product: bf16 on Hopper or later, widths of 16 bytes."""
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or x.shape[-1] % 8 or hidden % 8:
        return False
    return torch.cuda.get_device_capability(x.device) >= (9, 0) and hasattr(
        torch.nn.functional, "grouped_mm"
    )


def grouped_feed_forward(
    x: Float[Tensor, "rows k"],
    up: Float[Tensor, "groups n k"],
    down: Float[Tensor, "groups k half"],
    counts: Int64[Tensor, " groups"],
    activate: Callable[[Tensor], Tensor],
) -> Float[Tensor, "rows k"]:
    """Return down[g] activate(up[g] x) of each row x, g being its group.

    Args:
        counts: rows of each group; the first counts[0] rows are those of group 0.
    """
    ends = counts.cumsum(0).to(torch.int32)
    h = torch.nn.functional.grouped_mm(x, up.transpose(1, 2), offs=ends)
    y: Tensor = torch.nn.functional.grouped_mm(activate(h), down.transpose(1, 2), offs=ends)
    return y
