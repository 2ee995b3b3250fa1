"""minGRU: a GRU whose gate and candidate depend on the input only, so a sequence is one scan.

(arXiv 2410.01201.) With g(y) = y + 0.5 where y >= 0, else sigmoid(y):

    z = sigmoid(x W_z);   c = g(x W_c);   h_t = (1 - z) h_(t-1) + z c

Shape legend: batch, seq, dim = model width, inner = expand x dim.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kernels.at_least_fp32 import at_least_fp32
from kernels.recurrence import scan
from models.branch import Context
from models.cache import Memory


class MinGRU(nn.Module):
    """The branch of a `MinGRUConfig`."""

    def __init__(self, width: int, inner: int, number: int) -> None:
        super().__init__()
        self.number = number
        self.proj = nn.Linear(width, 2 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)

    def forward(
        self, x: Float[Tensor, "batch seq dim"], context: Context
    ) -> Float[Tensor, "batch seq dim"]:
        gate, candidate = at_least_fp32(self.proj(x)).chunk(2, dim=-1)
        z = torch.sigmoid(gate)
        keep = 1.0 - z
        added = z * torch.where(candidate >= 0, candidate + 0.5, torch.sigmoid(candidate))
        if context.documents is not None:  # a document starts from a state of 0
            begins = context.documents[:, 1:] != context.documents[:, :-1]
            keep = torch.cat((keep[:, :1], keep[:, 1:].masked_fill(begins[..., None], 0.0)), dim=1)
        state = context.state
        if state is None:
            h = scan(keep, added)
        else:
            padding = state.padding()
            if padding is not None:
                keep = keep.masked_fill(padding[..., None], 1.0)
                added = added.masked_fill(padding[..., None], 0.0)
            memory = state.memories.setdefault(self.number, Memory())
            h = scan(keep, added, memory.tensors.get("h"))
            memory["h"] = h[:, -1].clone()  # a view would keep all of `h`
        return self.out(h.to(x.dtype))  # type: ignore[no-any-return]
