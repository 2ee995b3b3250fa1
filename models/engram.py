"""Engram: a memory looked up by the last two or three tokens.

(arXiv 2601.07372; github.com/deepseek-ai/Engram.) Each n-gram that ends at a token is hashed to a
row of a table, once for each of several heads; the rows together are the memory e. Its agreement
with the residual stream h gates how much enters it:

    k = W_K e;  v = W_V e
    gate = sigmoid(rms(h) . rms(k) / sqrt(dim))
    h += silu(conv(rms(gate v))) + gate v

Shape legend: batch, seq, dim = model width, orders = n-gram lengths, slots = orders x heads.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from kernels.short_conv import short_conv
from models.branch import Context, Notes
from models.branch_config import Host
from models.cache import with_history
from models.engram_config import EngramConfig
from models.layers import RMSNorm

_NOTHING = -1  # id before the text, and beyond the start of a document


class Engram(nn.Module):
    """The branch of an `EngramConfig`."""

    lookups = ("table",)
    filters = ("conv",)

    def __init__(self, cfg: EngramConfig, host: Host, number: int, vocab_size: int) -> None:
        super().__init__()
        self.cfg, self.number = cfg, number
        self.sizes = cfg.sizes(host, number)
        self.multipliers = _multipliers(cfg, number)
        self.table = nn.Parameter(torch.empty(sum(self.sizes), cfg.slot_dim))
        self.key = nn.Linear(cfg.slots * cfg.slot_dim, host.width, bias=False)
        self.value = nn.Linear(cfg.slots * cfg.slot_dim, host.width, bias=False)
        self.stream_norm, self.key_norm, self.conv_norm = (
            RMSNorm(host.width, host.norm_eps) for _ in range(3)
        )
        self.conv = nn.Parameter(torch.zeros(host.width, cfg.kernel))
        self.initial_std = {"conv": 0.0}
        self.learning_rate_scale = {"table": cfg.learning_rate_scale}
        # The id that each token counts as: until `read_vocabulary`, its own.
        self.canonical: Tensor
        self.register_buffer("canonical", torch.arange(vocab_size))

    def forward(
        self, x: Float[Tensor, "batch seq dim"], context: Context
    ) -> tuple[Float[Tensor, "batch seq dim"], Notes]:
        cfg = self.cfg
        remembered = self._remembered(x, context)
        gate = self._gate(x, remembered)
        value = gate * self.value(remembered)
        dilation = max(cfg.orders)
        past = with_history(
            context.state, self.number, "conv", self.conv_norm(value), (cfg.kernel - 1) * dilation
        )
        mixed = short_conv(past, self.conv, dilation=dilation, documents=context.documents)
        return F.silu(mixed) + value, {"gate": gate.detach().float().mean()}

    def gates(
        self, x: Float[Tensor, "batch seq dim"], context: Context
    ) -> Float[Tensor, "batch seq"]:
        """Return the gate of each token, between 0 and 1."""
        return self._gate(x, self._remembered(x, context))[..., 0]

    def _remembered(
        self, x: Float[Tensor, "batch seq dim"], context: Context
    ) -> Float[Tensor, "batch seq memory"]:
        return self.table[self.rows(context)].flatten(2).to(x.dtype)

    def _gate(
        self, x: Float[Tensor, "batch seq dim"], remembered: Float[Tensor, "batch seq memory"]
    ) -> Float[Tensor, "batch seq 1"]:
        agreement = self.stream_norm(x) * self.key_norm(self.key(remembered))
        return torch.sigmoid(agreement.sum(dim=-1, keepdim=True) * x.shape[-1] ** -0.5)

    def rows(self, context: Context) -> Int64[Tensor, "batch seq slots"]:
        """Return the table row that each head of each order looks up for each token."""
        ids = self.canonical[context.tokens]
        longest = max(self.cfg.orders)
        past = with_history(context.state, self.number, "ids", ids, longest - 1, fill=_NOTHING)
        seq, first = ids.shape[1], 0
        rows: list[Tensor] = []
        for order in self.cfg.orders:
            mixed = None
            for back in range(order):
                earlier = past[:, longest - 1 - back : longest - 1 - back + seq]
                if back and context.documents is not None:
                    document = F.pad(context.documents, (back, 0), value=_NOTHING)[:, :seq]
                    earlier = earlier.masked_fill(document != context.documents, _NOTHING)
                product = (earlier + 1) * self.multipliers[back]  # 0 for _NOTHING
                mixed = product if mixed is None else mixed ^ product
            assert mixed is not None
            for _ in range(self.cfg.num_heads):
                size = self.sizes[len(rows)]
                rows.append(first + mixed % size)
                first += size
        return torch.stack(rows, dim=-1)

    def read_vocabulary(self, texts: Sequence[str]) -> None:
        """Make tokens count as one whose texts differ only in case, accents and spaces.

        `texts` are the texts of all ids, in order.
        """
        if not self.cfg.compress:
            return
        first: dict[str, int] = {}
        ids = [first.setdefault(_compressed(text), index) for index, text in enumerate(texts)]
        self.canonical.copy_(torch.tensor(ids))


def _compressed(text: str) -> str:
    """Return `text` in lower case without accents and without spaces at its ends.

    As in the published code: NFKC, NFD, accents off, lower case, each run of spaces, tabs and line
    ends one space; text of nothing else is that space. What would be empty stays as it is.
    """
    fold, strip = _normalisers()
    folded = fold.normalize_str(text)
    return folded if folded == " " else strip.normalize_str(folded) or text


@lru_cache
def _normalisers() -> tuple[Any, Any]:
    from tokenizers import Regex, normalizers  # noqa: PLC0415

    unicode = [normalizers.NFKC(), normalizers.NFD(), normalizers.StripAccents()]
    spaces = normalizers.Replace(Regex(r"[ \t\r\n]+"), " ")
    return normalizers.Sequence([*unicode, normalizers.Lowercase(), spaces]), normalizers.Strip()


def _multipliers(cfg: EngramConfig, number: int) -> list[int]:
    """Return an odd number below 2^40 for each position in an n-gram.

    Its product with an id below 2^22 does not overflow an int64.
    """
    random = np.random.default_rng([cfg.hash_seed, number])
    return [int(m) * 2 + 1 for m in random.integers(2**38, 2**39, max(cfg.orders))]
