"""A layer of the decoder: its branches in turn, on one residual stream or several.

Shape legend: batch, seq, dim = model width; streams where there are several; left = tokens that are
wanted, or all.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from kernels.philox import dropout
from models.branch import Context, Notes, split_notes
from models.branch_config import BranchConfig
from models.decoder_config import DecoderConfig
from models.layers import make_norm


class Block(nn.Module):
    """One layer: each branch reads the normed residual stream and adds its output to it."""

    def __init__(
        self, cfg: DecoderConfig, branches: list[BranchConfig], first: int, vocab_size: int
    ) -> None:
        super().__init__()
        self.first, self.drop = first, cfg.dropout
        self.names = [part.name for part in branches]
        self._last_is_apart = getattr(branches[-1], "token_by_token", False)
        for number, part in enumerate(branches, first):
            if part.normed:
                norm = make_norm(cfg.norm, cfg.width, cfg.bias, cfg.norm_eps)
                setattr(self, f"{part.name}_norm", norm)
            setattr(self, part.name, part.build(cfg, number, vocab_size))
            if cfg.streams is not None:
                setattr(self, f"{part.name}_streams", cfg.streams.build(cfg, number))

    def forward(
        self,
        x: Float[Tensor, "batch seq *streams dim"],
        context: Context,
        wanted: Int64[Tensor, "batch wanted"] | None = None,
    ) -> tuple[Float[Tensor, "batch left *streams dim"], Notes]:
        """Return (the stream after the layer, notes of its branches).

        Args:
            wanted: the indices of the tokens to return (None: all). With one stream only.
        """
        modules: dict[str, Any] = dict(self._modules)
        notes: Notes = {}
        for number, name in enumerate(self.names, self.first):
            if wanted is not None and self._last_is_apart and name == self.names[-1]:
                x, wanted = tokens_of(x, wanted), None
            norm, streams = modules.get(f"{name}_norm"), modules.get(f"{name}_streams")
            stream, gates = (x, None) if streams is None else streams.read(x, context)
            out = modules[name](stream if norm is None else norm(stream), context)
            out, branch_notes = split_notes(out)
            out = dropout(out, self.drop, context.noise, number + 1)
            x = x + out if streams is None else streams.write(x, out, gates)
            notes |= {f"{name}.{key}": value for key, value in branch_notes.items()}
        return x if wanted is None else tokens_of(x, wanted), notes


def tokens_of(
    x: Float[Tensor, "batch seq dim"], wanted: Int64[Tensor, "batch wanted"]
) -> Float[Tensor, "batch wanted dim"]:
    """Return the tokens with these indices, of each row its own."""
    return x[torch.arange(len(x), device=x.device)[:, None], wanted]
