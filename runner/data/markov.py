"""A Markov chain as data: the next token depends on the last `order` ones, by a random table.

The least loss of any model is known, the entropy of the chain. With `in_context` each sequence has
a table of its own, so that a model can only learn to count what followed the same tokens earlier
in the sequence, as induction heads do (Edelman et al., arXiv 2402.11004).
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch.utils.data import Dataset

from runner.data.corpus import Sample
from runner.data.markov_config import MarkovConfig
from runner.data.order import to_sample
from runner.data.synthetic import SyntheticCorpus, generator
from runner.data.tokenizers import SymbolTokenizer


@dataclass(frozen=True)
class Chain:
    """Probability of each token after each context, [vocab^order, vocab]."""

    order: int
    table: np.ndarray

    @cached_property
    def _sums(self) -> np.ndarray:
        sums: np.ndarray = np.cumsum(self.table, axis=1)
        return sums

    def walk(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """Return a sequence, [length] int64, whose first `order` tokens are uniform."""
        vocab = self.table.shape[1]
        ids = np.empty(length, dtype=np.int64)
        ids[: self.order] = rng.integers(0, vocab, min(self.order, length))
        draws = rng.random(length)
        for position in range(self.order, length):
            context = _context(ids[position - self.order : position], vocab)
            token = np.searchsorted(self._sums[context], draws[position], side="right")
            ids[position] = min(token, vocab - 1)
        return ids

    def nats(self, ids: np.ndarray) -> np.ndarray:
        """Return -log p of all tokens of `ids`, [rows, length], but the first: [rows, length - 1].

        It is log(vocab) for those with fewer than `order` tokens before them.
        """
        vocab, length = self.table.shape[1], ids.shape[1]
        losses = np.full((len(ids), length - 1), np.log(vocab))
        context = np.zeros((len(ids), length - self.order), dtype=np.int64)
        for back in range(self.order):
            context = context * vocab + ids[:, back : length - self.order + back]
        losses[:, self.order - 1 :] = -np.log(self.table[context, ids[:, self.order :]])
        return losses


class MarkovSamples(Dataset[Sample]):
    """The dataset whose sample i is a function of (address, i)."""

    def __init__(
        self, cfg: MarkovConfig, vocab_size: int, seq: int, address: tuple[int, ...]
    ) -> None:
        self.cfg, self.vocab_size, self.seq, self.address = cfg, vocab_size, seq, address

    def __getitem__(self, index: int) -> Sample:
        rng = generator(*self.address, index)
        chain = (
            draw_chain(self.cfg, self.vocab_size, rng)
            if self.cfg.in_context
            else shared_chain(self.cfg, self.vocab_size)
        )
        ids = chain.walk(self.seq + 1, rng)
        return to_sample(ids, np.zeros(self.seq + 1, dtype=np.int64), index)


@lru_cache(maxsize=1)
def shared_chain(cfg: MarkovConfig, vocab_size: int) -> Chain:
    """Return the chain that all sequences of a config without `in_context` share."""
    return draw_chain(cfg, vocab_size, generator(cfg.data_seed, 0))


def draw_chain(cfg: MarkovConfig, vocab_size: int, rng: np.random.Generator) -> Chain:
    """Return a chain whose rows `rng` draws from a symmetric Dirichlet distribution."""
    alphas = np.full(vocab_size, cfg.concentration)
    return Chain(cfg.order, rng.dirichlet(alphas, vocab_size**cfg.order))


def _context(tokens: np.ndarray, vocab: int) -> int:
    """Return the index of the table's row for these last tokens."""
    row = 0
    for token in tokens.tolist():
        row = row * vocab + token
    return row


def entropy(cfg: MarkovConfig, vocab_size: int, seq: int, max_tokens: int) -> float:
    """Return the least possible mean loss on the validation sequences, in nats per token.

    It is that of the true table; with `in_context`, that of the posterior mean of the table given
    its distribution and the sequence so far.
    """
    if cfg.in_context:
        return counting_loss(cfg, vocab_size, seq, max_tokens, order=cfg.order)
    ids = _held_out(cfg, vocab_size, seq, max_tokens)
    return float(shared_chain(cfg, vocab_size).nats(ids).mean())


def counting_loss(
    cfg: MarkovConfig,
    vocab_size: int,
    seq: int,
    max_tokens: int,
    *,
    order: int,
    start: float | None = None,
) -> float:
    """Return the mean loss on the validation sequences, in nats per token, of predicting by counts.

    Counts are of what followed the same `order` tokens earlier in the sequence (order 0: of all its
    tokens). Each starts at `start`, by default `concentration`.
    """
    initial = cfg.concentration if start is None else start
    losses = []
    for ids in _held_out(cfg, vocab_size, seq, max_tokens):
        table = np.full((vocab_size**order, vocab_size), initial)
        losses += [np.log(vocab_size)] * (order - 1)  # too few tokens before these
        for position in range(max(order, 1), len(ids)):
            counts = table[_context(ids[position - order : position], vocab_size)]
            losses.append(np.log(counts.sum() / counts[ids[position]]))
            counts[ids[position]] += 1
    return float(np.mean(losses))


def _held_out(cfg: MarkovConfig, vocab_size: int, seq: int, max_tokens: int) -> np.ndarray:
    """Return the validation sequences, each with its last target: [rows, seq + 1]."""
    corpus = SyntheticCorpus(cfg, SymbolTokenizer(vocab_size))
    batches = corpus.held_out(seq, cfg.num_val, max_tokens)
    ids = torch.cat([torch.cat((b["tokens"], b["targets"][:, -1:]), dim=1) for b in batches])
    return ids.numpy()
