"""A model: an embedding, a causal depthwise convolution and linear layers; no formulas of sizes."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class ConvNetConfig:
    """A plain dataclass; `build` is its only method."""

    width: int = 16
    depth: int = 2
    taps: int = 3

    def build(self, vocab_size: int, seed: int) -> "ConvNet":
        """Return the initialised model."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return ConvNet(self, vocab_size)


class ConvNet(nn.Module):
    """Reads the last `taps` tokens at each position."""

    def __init__(self, cfg: ConvNetConfig, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size, self.taps = vocab_size, cfg.taps
        self.wte = nn.Embedding(vocab_size, cfg.width)
        self.mix = nn.Conv1d(cfg.width, cfg.width, cfg.taps, groups=cfg.width)
        self.layers = nn.ModuleList(nn.Linear(cfg.width, cfg.width) for _ in range(cfg.depth))
        self.lm_head = nn.Linear(cfg.width, vocab_size, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return logits, [batch, seq, vocab]; `targets` are ignored."""
        x = self.wte(tokens)
        padded = nn.functional.pad(x.transpose(1, 2), (self.taps - 1, 0))
        x = x + self.mix(padded).transpose(1, 2)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.lm_head(x)
