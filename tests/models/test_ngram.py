"""Kneser-Ney: probabilities add up, and are those of the formula written out."""

from collections import defaultdict

import numpy as np
import pytest
import torch

from models.ngram import Ngram
from models.ngram_config import NgramConfig

TEXT = np.random.default_rng(0).choice(6, 400, p=[0.4, 0.25, 0.15, 0.1, 0.06, 0.04])


def _by_hand(
    context: list[int], token: int, order: int, discount: float, vocab: int, *, top: bool = True
) -> float:
    """Return P(token | context) by the recursion of Chen & Goodman, from dictionaries."""
    n = order
    counts: dict[tuple[int, ...], float] = defaultdict(float)
    grams = [tuple(TEXT[i : i + n]) for i in range(len(TEXT) - n + 1)]
    if top:
        for gram in grams:
            counts[gram] += 1
    else:  # the number of different tokens that it follows
        longer = {tuple(TEXT[i : i + n + 1]) for i in range(len(TEXT) - n)}
        for gram in longer:
            counts[gram[1:]] += 1
    before = tuple(context[len(context) - n + 1 :])
    mine = {gram: c for gram, c in counts.items() if gram[:-1] == before}
    lower = (
        _by_hand(context[1:], token, n - 1, discount, vocab, top=False) if n > 1 else 1.0 / vocab
    )
    if not mine:
        return lower
    total = sum(mine.values())
    own = max(0.0, mine.get((*before, token), 0.0) - discount) / total
    return own + discount * len(mine) / total * lower


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_probabilities_are_those_of_the_formula(order: int) -> None:
    model = Ngram(NgramConfig(order=order, discount=0.6), 7).fit(TEXT)
    contexts = np.array([TEXT[10 : 10 + order - 1], TEXT[50 : 50 + order - 1], [6] * (order - 1)])
    probabilities = model.probabilities(contexts.reshape(3, order - 1)).numpy()
    for row, context in zip(probabilities, contexts, strict=True):
        expected = [_by_hand([int(c) for c in context], token, order, 0.6, 7) for token in range(7)]
        np.testing.assert_allclose(row, expected, rtol=1e-9)
        assert row.sum() == pytest.approx(1.0)


def test_logits_and_losses_agree_and_beat_a_uniform_guess() -> None:
    text = np.tile([0, 1, 2, 3, 2, 1], 60)
    model = Ngram(NgramConfig(order=3), 5).fit(text)
    tokens = torch.from_numpy(text[:40].astype("int64"))[None]
    logits = model(tokens[:, :-1])
    assert logits.exp().sum(dim=-1) == pytest.approx(torch.ones(1, 39))
    loss = model(tokens[:, :-1], tokens[:, 1:])
    own = -logits.gather(2, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(loss.nll, own)
    assert float(loss.nll[:, 2:].mean()) < 0.1
    assert float(model(tokens[:, :1], tokens[:, 1:2]).nll) < np.log(5)  # no context: the unigram


def test_orders_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        NgramConfig(order=0)
    with pytest.raises(ValueError, match="does not fit 64 bits"):
        Ngram(NgramConfig(order=6), 4096)
