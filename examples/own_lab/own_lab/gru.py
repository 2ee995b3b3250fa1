"""A language model of GRU layers."""

import torch
from torch import Tensor, nn

from models.config import config


@config
class GRUConfig:
    """Layers of torch's GRU between an embedding and a head.

    Args:
        width: of the embedding and of the states.
        depth: number of layers.
    """

    width: int = 64
    depth: int = 1

    def build(self, vocab_size: int, seed: int) -> "GRU":
        """Return the initialised model; the same seed gives the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return GRU(self, vocab_size)


class GRU(nn.Module):
    """See `GRUConfig`."""

    def __init__(self, cfg: GRUConfig, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.embedding = nn.Embedding(vocab_size, cfg.width)
        self.layers = nn.GRU(cfg.width, cfg.width, cfg.depth, batch_first=True)
        self.head = nn.Linear(cfg.width, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [batch, seq, vocab] for ids [batch, seq]."""
        states, _ = self.layers(self.embedding(tokens))
        return self.head(states)
