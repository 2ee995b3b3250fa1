"""A Markov chain as data: every next token depends on the last few and on nothing else, by a table drawn at random.

What a model can at best reach is known: the entropy of the chain. Order 2 is the tri-gram toy of n-gram memories. With
`in_context` each sequence has a table of its own, which nothing but its own past tells: what can be learnt is to count
what followed before, the work of an induction head (Edelman et al., arXiv 2402.11004).
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
        """Return `length` tokens; the first `order` are drawn evenly."""
        vocab = self.table.shape[1]
        ids = np.empty(length, dtype=np.int64)
        ids[: self.order] = rng.integers(0, vocab, min(self.order, length))
        throws = rng.random(length)
        for place in range(self.order, length):
            context = _context(ids[place - self.order : place], vocab)
            ids[place] = min(
                np.searchsorted(self._sums[context], throws[place], side="right"), vocab - 1
            )
        return ids

    def nats(self, ids: np.ndarray) -> np.ndarray:
        """Return -log p of each token of [rows, length] but the first, those without a context even: log(vocab)."""
        vocab, length = self.table.shape[1], ids.shape[1]
        found = np.full((len(ids), length - 1), np.log(vocab))
        context = np.zeros((len(ids), length - self.order), dtype=np.int64)
        for back in range(self.order):
            context = context * vocab + ids[:, back : length - self.order + back]
        found[:, self.order - 1 :] = -np.log(self.table[context, ids[:, self.order :]])
        return found


class MarkovSamples(Dataset[Sample]):
    """Sample i is a function of (address, i)."""

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
    """Return the one chain of a config, drawn once."""
    return draw_chain(cfg, vocab_size, generator(cfg.data_seed, 0))


def draw_chain(cfg: MarkovConfig, vocab_size: int, rng: np.random.Generator) -> Chain:
    """Return a chain whose rows are drawn by `rng`."""
    alphas = np.full(vocab_size, cfg.concentration)
    return Chain(cfg.order, rng.dirichlet(alphas, vocab_size**cfg.order))


def _context(tokens: np.ndarray, vocab: int) -> int:
    """Return the row of the table for the last tokens."""
    row = 0
    for token in tokens.tolist():
        row = row * vocab + token
    return row


def entropy(cfg: MarkovConfig, vocab_size: int, seq: int, max_tokens: int) -> float:
    """Return the least loss on the validation sequences, in nats per token.

    It is that of the table itself; with `in_context`, of who knows the distribution of tables and has read the
    sequence so far (the posterior mean).
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
    """Return the loss on the validation sequences of who counts what followed the same `order` tokens before.

    Each count starts at `start`, `concentration` where it is not given; order 0 counts the tokens of the sequence.
    """
    first = cfg.concentration if start is None else start
    found = []
    for text in _held_out(cfg, vocab_size, seq, max_tokens):
        seen = np.full((vocab_size**order, vocab_size), first)
        found += [np.log(vocab_size)] * (order - 1)  # there nothing is known
        for place in range(max(order, 1), len(text)):
            counts = seen[_context(text[place - order : place], vocab_size)]
            found.append(np.log(counts.sum() / counts[text[place]]))
            counts[text[place]] += 1
    return float(np.mean(found))


def _held_out(cfg: MarkovConfig, vocab_size: int, seq: int, max_tokens: int) -> np.ndarray:
    """Return the validation sequences with the last target of each."""
    corpus = SyntheticCorpus(cfg, SymbolTokenizer(vocab_size))
    batches = corpus.held_out(seq, cfg.num_val, max_tokens)
    ids = torch.cat([torch.cat((b["tokens"], b["targets"][:, -1:]), dim=1) for b in batches])
    return ids.numpy()
