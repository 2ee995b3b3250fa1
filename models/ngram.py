"""An n-gram model, the baseline of counting alone: interpolated Kneser-Ney (Chen & Goodman 1998).

Counts are exact and lie in sorted arrays; an n-gram is one int64 whose digits to the base of the
vocabulary's size are its ids.

Shape legend: batch, seq, vocab.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from models.cache import DecoderState, State, with_history
from models.language_model import LanguageModel, TokenLoss
from models.ngram_config import NgramConfig

Array = np.ndarray


@dataclass(frozen=True)
class _Level:
    """The n-grams of one length: the tokens that follow each context.

    Args:
        keys: contexts, sorted.
        starts: index of each context's first follower, and at the end the number of followers.
        followers, counts: ids after the contexts, and their counts.
        total: sum of each context's counts.
        discount: subtracted from each count.
    """

    keys: Array
    starts: Array
    followers: Array
    counts: Array
    total: Array
    discount: float


class Ngram(LanguageModel):
    """The model of an `NgramConfig`: it is fitted to ids, and its logits are log-probabilities."""

    def __init__(self, cfg: NgramConfig, vocab_size: int) -> None:
        super().__init__()
        if vocab_size**cfg.order >= 2**63:
            raise ValueError(
                f"order={cfg.order} of a vocabulary of {vocab_size} does not fit 64 bits; "
                "lower the order"
            )
        self.order, self.discount, self.vocab_size = cfg.order, cfg.discount, vocab_size
        self.on_device = nn.Parameter(torch.zeros(0))  # shows which device the model is on
        self.levels: list[_Level] = []

    def fit(self, ids: Array) -> "Ngram":
        """Count the n-grams of `ids`; return self."""
        text, order = ids.astype(np.int64), self.order
        keys = text.copy()
        powers = [keys]
        for n in range(2, order + 1):  # the n tokens that end at each position from n-1 on
            keys = powers[-1][:-1] * self.vocab_size + text[n - 1 :]
            powers.append(keys)
        grams, counts = np.unique(powers[-1], return_counts=True)
        levels = [self._level(grams, counts)]
        for n in range(order - 1, 0, -1):  # lower orders count different predecessors
            size = self.vocab_size**n
            longer = np.unique(powers[n]) if n < order - 1 else grams
            grams, counts = np.unique(longer % size, return_counts=True)
            levels.append(self._level(grams, counts))
        self.levels = levels[::-1]
        return self

    def _level(self, grams: Array, counts: Array) -> _Level:
        contexts, followers = grams // self.vocab_size, grams % self.vocab_size
        keys, starts = np.unique(contexts, return_index=True)
        ones, twos = int((counts == 1).sum()), int((counts == 2).sum())
        discount = self.discount or min(0.95, max(0.05, ones / max(1, ones + 2 * twos)))
        total = np.add.reduceat(counts, starts)
        return _Level(keys, np.append(starts, len(grams)), followers, counts, total, discount)

    def probabilities(self, contexts: Array) -> Float[Tensor, "rows vocab"]:
        """Return P(next | the last order-1 ids) in fp64.

        Args:
            contexts: ids [rows, at least order-1], -1 before the start of the text.
        """
        rows = len(contexts)
        result = np.full((rows, self.vocab_size), 1.0 / self.vocab_size)
        for n, level in enumerate(self.levels):  # n ids of context
            context = contexts[:, contexts.shape[1] - n :]
            known = (context >= 0).all(axis=1)
            weights = self.vocab_size ** np.arange(n - 1, -1, -1, dtype=np.int64)
            key = (context * weights).sum(axis=1)
            at = np.minimum(np.searchsorted(level.keys, key), len(level.keys) - 1)
            known &= level.keys[at] == key
            for row in np.flatnonzero(known):
                first, last = level.starts[at[row]], level.starts[at[row] + 1]
                total = level.total[at[row]]
                share = (level.counts[first:last] - level.discount) / total
                result[row] *= level.discount * (last - first) / total
                result[row, level.followers[first:last]] += share
        return torch.from_numpy(result)

    def forward(
        self,
        tokens: Int64[Tensor, "batch seq"],
        targets: Int64[Tensor, "batch seq"] | None = None,
        *,
        state: State | None = None,
        counts: Int64[Tensor, " batch"] | None = None,
        every: bool = False,
        **_: object,
    ) -> Float[Tensor, "batch *seq vocab"] | TokenLoss:
        """Return log-probabilities, or with `targets` the loss; see `LanguageModel.forward`."""
        assert state is None or isinstance(state, DecoderState)
        width = self.order - 1
        if state is not None:
            state.begin(tokens.shape[1], counts)
        padded = with_history(state, 0, "ids", tokens, width, fill=-1)
        windows = padded.unfold(1, width + 1, 1)[:, :, 1:]
        if state is not None:
            added = state.finish()
            if not every:
                windows = windows[torch.arange(len(tokens), device=tokens.device), added - 1]
        contexts = windows.flatten(0, -2).cpu().numpy()
        flat = self.probabilities(contexts).log().to(torch.float32)
        logits = flat.view(*windows.shape[:-1], self.vocab_size).to(tokens.device)
        if targets is None:
            return logits
        nll = nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none"
        )
        return TokenLoss(total=nll.sum(), nll=nll.view(targets.shape))

    def start(self, batch: int, capacity: int, *, static: bool = False) -> DecoderState:
        """See `LanguageModel.start`; the state is the last order-1 ids."""
        device = self.on_device.device
        return DecoderState(batch, capacity=capacity, device=device, static=static)
