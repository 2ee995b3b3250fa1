"""The Markov chain: sequences follow its table, and its entropy is the least loss."""

from pathlib import Path

import numpy as np
import pytest
import torch

from runner.data.markov import Chain, counting_loss, entropy, shared_chain
from runner.data.markov_config import MarkovConfig
from runner.data.synthetic import SyntheticCorpus
from runner.data.tokenizers_config import TokenizerConfig

SYMBOLS = TokenizerConfig(kind="symbols", vocab_size=4)


def _cfg(**options: float) -> MarkovConfig:
    return MarkovConfig(**options)  # type: ignore[arg-type]


def _corpus(cfg: MarkovConfig) -> SyntheticCorpus:
    return cfg.build(SYMBOLS, Path("unused"))


def test_text_follows_the_table() -> None:
    chain = shared_chain(_cfg(order=2, concentration=0.5), 4)
    ids = chain.walk(60000, np.random.default_rng(0))
    context = ids[:-2] * 4 + ids[1:-1]
    for row in range(16):
        seen = ids[2:][context == row]
        if len(seen) > 500:
            frequencies = np.bincount(seen, minlength=4) / len(seen)
            bound = 4 * (0.25 / len(seen)) ** 0.5
            np.testing.assert_allclose(frequencies, chain.table[row], atol=bound)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_entropy_is_what_a_model_that_knows_the_table_pays(order: int) -> None:
    cfg = _cfg(order=order, num_val=8)
    total, count = 0.0, 0
    for batch in _corpus(cfg).held_out(32, 3, 10**6):
        rows = zip(batch["tokens"].tolist(), batch["targets"].tolist(), strict=True)
        for tokens, targets in rows:
            assert tokens[1:] == targets[:-1]
            text = [*tokens, targets[-1]]
            for i in range(1, len(text)):
                row = 0
                for token in text[max(0, i - order) : i]:
                    row = row * 4 + token
                p = shared_chain(cfg, 4).table[row, text[i]] if i >= order else 0.25
                total -= np.log(p)
                count += 1
    assert count == 8 * 32
    assert entropy(cfg, 4, 32, 10**6) == pytest.approx(total / count)


@pytest.mark.parametrize("order", [1, 2])
def test_in_context_the_least_loss_is_that_of_counting(order: int) -> None:
    """Written out: the posterior mean of a Dirichlet row, where each sequence has its own table."""
    cfg = _cfg(order=order, num_val=6, concentration=0.3, in_context=True)
    losses = []
    for batch in _corpus(cfg).held_out(24, 4, 10**6):
        for tokens, targets in zip(
            batch["tokens"].tolist(), batch["targets"].tolist(), strict=True
        ):
            text = [*tokens, targets[-1]]
            for i in range(1, len(text)):
                context = text[i - order : i]
                same = [j for j in range(order, i) if text[j - order : j] == context]
                hits = sum(text[j] == text[i] for j in same)
                p = (hits + 0.3) / (len(same) + 1.2) if i >= order else 0.25
                losses.append(-np.log(p))
    assert len(losses) == 6 * 24
    assert entropy(cfg, 4, 24, 10**6) == pytest.approx(np.mean(losses))


def test_counting_tokens_is_worse_than_counting_pairs_where_pairs_tell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = _cfg(order=1, num_val=32, concentration=0.05, in_context=True)
    alone = counting_loss(cfg, 4, 48, 10**6, order=0)
    assert entropy(cfg, 4, 48, 10**6) < alone < np.log(4)
    text = np.array([0, 1, 1, 0])  # of four symbols the first 1 is new, the second is not, 0 is
    fixed = MarkovConfig(in_context=True)
    monkeypatch.setattr("runner.data.markov._held_out", lambda *_: text[None])
    assert counting_loss(fixed, 4, 3, 3, order=0, start=0.5) == pytest.approx(
        -np.log([0.5 / 2, 1.5 / 3, 0.5 / 4]).mean()
    )


def test_tables_of_sequences_differ_in_context() -> None:
    certain = _corpus(_cfg(order=1, concentration=0.001, in_context=True)).samples(64, 0)
    follows = [
        dict(zip(s["tokens"].tolist()[-8:], s["targets"].tolist()[-8:], strict=True))
        for s in (certain[i] for i in range(40))
    ]
    seen = {(token, after) for pairs in follows for token, after in pairs.items()}
    assert len(seen) > 4  # one table of certain rows has one successor of each of four tokens


def test_samples_are_functions_of_seed_and_number_and_validation_is_apart() -> None:
    corpus = _corpus(_cfg(num_val=4, concentration=0.5))
    one, again, other = corpus.samples(24, 0), corpus.samples(24, 0), corpus.samples(24, 1)
    assert torch.equal(one[7]["tokens"], again[7]["tokens"])
    assert not torch.equal(one[7]["tokens"], one[8]["tokens"])
    assert not torch.equal(one[7]["tokens"], other[7]["tokens"])
    (held,) = corpus.held_out(24, 8, 10**6)
    assert held["tokens"].shape == (4, 24)
    assert not any(torch.equal(row, one[i]["tokens"]) for row in held["tokens"] for i in range(8))


def test_certain_rows_are_cheap() -> None:
    assert entropy(_cfg(concentration=0.01), 4, 64, 10**6) < entropy(
        _cfg(concentration=1.0), 4, 64, 10**6
    )


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="order=0"):
        MarkovConfig(order=0)
    with pytest.raises(ValueError, match="concentration=0"):
        MarkovConfig(concentration=0)
    with pytest.raises(ValueError, match="tokenizer=symbols"):
        MarkovConfig().check(TokenizerConfig(), 16)
    with pytest.raises(ValueError, match="vocab_size=1024 at order=2"):
        MarkovConfig().check(TokenizerConfig(kind="symbols", vocab_size=1024), 16)
    with pytest.raises(ValueError, match="for each sequence"):
        MarkovConfig(in_context=True).check(TokenizerConfig(kind="symbols", vocab_size=100), 16)


def test_a_walk_shorter_than_the_order_is_drawn_evenly() -> None:
    assert len(Chain(3, np.full((64, 4), 0.25)).walk(2, np.random.default_rng(0))) == 2
