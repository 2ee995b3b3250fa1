"""A layer of the decoder: its branches in turn, on one residual stream or several.

Shape legend: batch, seq, dim = model width; streams where there are several.
"""

from typing import Any

from jaxtyping import Float
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
        for number, part in enumerate(branches, first):
            if part.normed:
                norm = make_norm(cfg.norm, cfg.width, cfg.bias, cfg.norm_eps)
                setattr(self, f"{part.name}_norm", norm)
            setattr(self, part.name, part.build(cfg, number, vocab_size))
            if cfg.streams is not None:
                setattr(self, f"{part.name}_streams", cfg.streams.build(cfg, number))

    def forward(
        self, x: Float[Tensor, "batch seq *streams dim"], context: Context
    ) -> tuple[Float[Tensor, "batch seq *streams dim"], Notes]:
        modules: dict[str, Any] = dict(self._modules)
        notes: Notes = {}
        for number, name in enumerate(self.names, self.first):
            norm, streams = modules.get(f"{name}_norm"), modules.get(f"{name}_streams")
            stream, gates = (x, None) if streams is None else streams.read(x, context)
            out = modules[name](stream if norm is None else norm(stream), context)
            out, branch_notes = split_notes(out)
            out = dropout(out, self.drop, context.noise, number + 1)
            x = x + out if streams is None else streams.write(x, out, gates)
            notes |= {f"{name}.{key}": value for key, value in branch_notes.items()}
        return x, notes
