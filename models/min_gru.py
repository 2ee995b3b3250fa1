"""minGRU: a GRU whose gate and candidate see the input only, so that a sequence is one scan (arXiv 2410.01201).

    z = sigmoid(x W_z);   c = g(x W_c), g(y) = y + 0.5 above 0 and sigmoid(y) below;   h_t = (1 - z) h_(t-1) + z c

Shape legend: batch, seq, dim = model width, inner = expand x dim.
"""

from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kernels.recurrence import scan
from models.branch import Context
from models.cache import Memory
from models.config import config
from models.flops import linear_flops

if TYPE_CHECKING:
    from models.decoder import DecoderConfig


@config
class MinGRUConfig:
    """A minGRU mixer; `expand`: inner width over the model's."""

    name: ClassVar[str] = "gru"
    normed: ClassVar[bool] = True
    looks_back: ClassVar[bool] = True

    expand: float = 1.0

    def inner(self, host: "DecoderConfig") -> int:
        """Return the inner width."""
        return max(1, round(self.expand * host.width))

    def build(self, host: "DecoderConfig", number: int, vocab_size: int) -> "MinGRU":
        """See `PartConfig`."""
        return MinGRU(host.width, self.inner(host), number)

    def num_parameters(self, host: "DecoderConfig", number: int) -> int:
        """See `PartConfig`."""
        return 3 * host.width * self.inner(host)

    def num_active_parameters(self, host: "DecoderConfig", number: int) -> int:
        """See `PartConfig`."""
        return self.num_parameters(host, number)

    def forward_flops(self, host: "DecoderConfig", seq: int) -> tuple[int, int]:
        """See `PartConfig`; the scan is element by element and counts nothing."""
        found = 3 * linear_flops(seq, host.width, self.inner(host))
        return found, found


class MinGRU(nn.Module):
    """See `MinGRUConfig`."""

    def __init__(self, width: int, inner: int, number: int) -> None:
        super().__init__()
        self.number = number
        self.proj = nn.Linear(width, 2 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)

    def forward(
        self, x: Float[Tensor, "batch seq dim"], context: Context
    ) -> Float[Tensor, "batch seq dim"]:
        gate, candidate = self.proj(x).float().chunk(2, dim=-1)
        z = torch.sigmoid(gate)
        keep = 1.0 - z
        added = z * torch.where(candidate >= 0, candidate + 0.5, torch.sigmoid(candidate))
        if context.documents is not None:  # a document begins with nothing to keep
            begins = context.documents[:, 1:] != context.documents[:, :-1]
            keep = torch.cat((keep[:, :1], keep[:, 1:].masked_fill(begins[..., None], 0.0)), dim=1)
        state = context.state
        if state is None:
            h = scan(keep, added)
        else:
            unread = state.unread()
            if unread is not None:
                keep = keep.masked_fill(unread[..., None], 1.0)
                added = added.masked_fill(unread[..., None], 0.0)
            kept = state.memories.setdefault(self.number, Memory())
            h = scan(keep, added, kept.tensors.get("h"))
            kept["h"] = h[:, -1]
        return self.out(h.to(x.dtype))  # type: ignore[no-any-return]
