"""Masked diffusion against a Markov chain whose posterior is known."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels.philox import NoiseKey
from models.decoder_config import DecoderConfig
from models.language_model import TokenLoss
from runner.data.corpus import loads, token_id
from runner.data.special_tokens import WithTokens
from runner.data.tokenizers import SymbolTokenizer
from runner.learn.tasks.diffusion import context_weights, draw_times, hide, maskable
from runner.learn.tasks.diffusion_config import DiffusionConfig

CHAIN = torch.tensor([[0.80, 0.15, 0.05], [0.10, 0.70, 0.20], [0.25, 0.25, 0.50]]).double()
LENGTH, ENTROPY = 8, 6.559125 / 8  # nats a token
TOKENIZER = WithTokens(SymbolTokenizer(4), ["<mask>"])  # three states, eos = 3, <mask> = 4


class Posterior(nn.Module):
    """The exact distribution of each state of the chain, given the states that are not hidden."""

    vocab_size = 5

    def __init__(self, *, shift: bool = False) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, tokens: Tensor) -> Tensor:
        seen = nn.functional.one_hot(tokens[:, 1:].clamp(max=2), 3).double()
        seen[tokens[:, 1:] > 2] = 1.0
        forward = [seen[:, 0] / 3]
        for place in range(1, seen.shape[1]):
            forward.append((forward[-1] @ CHAIN) * seen[:, place])
        backward = [torch.ones_like(seen[:, 0])]
        for place in range(seen.shape[1] - 1, 0, -1):
            backward.append((backward[-1] * seen[:, place]) @ CHAIN.T)
        joint = torch.stack(forward, 1) * torch.stack(backward[::-1], 1)
        states = (joint / joint.sum(-1, keepdim=True)).log()
        logits = torch.full((*tokens.shape, 5), -1e3, dtype=torch.float64)
        places = slice(0, -1) if self.shift else slice(1, None)
        logits[:, places, :3] = states.clamp(min=-500)
        return logits


def _samples(count: int, start: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(start)
    states = torch.randint(3, (count, 1), generator=draw)
    for _ in range(LENGTH - 1):
        following = torch.multinomial(CHAIN[states[:, -1]], 1, generator=draw)
        states = torch.cat((states, following), 1)
    tokens = nn.functional.pad(states, (1, 0), value=3)
    targets = nn.functional.pad(states, (0, 1), value=-100)
    return {"tokens": tokens, "targets": targets, "index": torch.arange(start, start + count)}


class Predicts(Posterior):
    """The same in the form that a task calls in training: with targets and weights."""

    def forward(  # type: ignore[override]
        self, tokens: Tensor, targets: Tensor | None = None, weights: Tensor | None = None
    ) -> Any:
        logits = super().forward(tokens)
        if targets is None:
            return logits
        nll = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        nll = nll.view(targets.shape)
        return TokenLoss(total=(weights * nll).sum(), nll=nll)


def _losses(cfg: DiffusionConfig, batch: dict[str, Tensor]) -> Tensor:
    """Return the weighted loss of each sample, nats a token."""
    task = cfg.build(None, TOKENIZER, {})
    noise = NoiseKey(seed=1, step=0, samples=batch["index"])
    hidden = hide(cfg, batch["tokens"], maskable(batch), task.mask, noise)
    out = task.loss(Predicts(shift=cfg.shift), batch, noise)
    nll = out.nll.roll(1, 1) if cfg.shift else out.nll
    assert torch.allclose(out.total.double(), (hidden.weights * nll).sum(), rtol=1e-5)
    weights = hidden.weights
    if cfg.weight == "cart":  # the published value knows no first token
        given = ~hidden.where[:, 1:]
        weights = nn.functional.pad(hidden.where[:, 1:] * context_weights(given, 0.1), (1, 0))
    return (weights * nll).sum(-1) / LENGTH


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 0.820059),
        ({"min_probability": 0.1}, 0.837276),
        ({"weight": "none"}, 0.443322),
        ({"weight": "linear"}, 0.135427),
        ({"weight": "cart"}, 0.037039),
        ({"shift": True}, 0.820059),
        ({"never_mask": True}, 0.820059),
    ],
)
def test_the_objectives_of_the_exact_model(options: dict[str, Any], expected: float) -> None:
    losses = _losses(DiffusionConfig(**options), _samples(40_000))
    error = float(losses.std()) / math.sqrt(len(losses))
    assert abs(float(losses.mean()) - expected) < 4 * error
    assert error < 0.01 * expected


def test_validation_is_the_entropy_and_its_error_is_that_of_the_draws() -> None:
    batch, model = _samples(4_000), Predicts()
    task = DiffusionConfig(draws=8).build(None, TOKENIZER, {})
    values = task.validate(model, batch)
    bound, tokens = values["val_bound"]
    assert tokens == 4_000 * LENGTH
    text = float(batch_entropy(batch["tokens"][:, 1:])) / LENGTH  # of these texts
    error = math.sqrt(values["val_bound_stderr"][0]) / tokens
    assert abs(bound / tokens - text) < 4 * error
    assert abs(text - ENTROPY) < 0.02
    # The estimate of 16 samples by one draw spreads half as much as that at a random time.
    assert error * math.sqrt(8 * 4_000 / 16) == pytest.approx(0.11, abs=0.02)
    halves = [task.validate(model, {k: v[part] for k, v in batch.items()}) for part in _HALVES]
    assert sum(half["val_bound"][0] for half in halves) == pytest.approx(bound, rel=1e-12)


_HALVES = (slice(0, 1_234), slice(1_234, None))


def batch_entropy(states: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of the chain's texts, nats."""
    return math.log(3) - CHAIN.log()[states[:, :-1], states[:, 1:]].sum(-1).mean()


def test_times_are_shared_out_whatever_the_micro_batch() -> None:
    noise = NoiseKey(seed=3, step=5, samples=torch.arange(64))
    for cfg in (DiffusionConfig(strata=16), DiffusionConfig(strata=16, times="shifted")):
        times = draw_times(cfg, noise)
        in_strata = (times.view(4, 16) * 16).floor().sort(-1).values
        assert torch.equal(in_strata, torch.arange(16.0).double().expand(4, 16))
        part = replace(noise, samples=noise.samples[20:30])
        assert torch.equal(draw_times(cfg, part), times[20:30])
    gaps = times[:16].diff() % 1.0
    assert torch.allclose(gaps, torch.full_like(gaps, 1 / 16)), "one draw for all"


def test_the_first_token_and_those_without_a_target_are_never_hidden() -> None:
    batch = _samples(256)
    batch["targets"][:, 2] = -100
    noise = NoiseKey(seed=0, step=0, samples=batch["index"])
    hidden = hide(
        DiffusionConfig(min_probability=0.999), batch["tokens"], maskable(batch), 4, noise
    )
    assert hidden.where.any(0).tolist() == [False, True, True, False, *[True] * 5]
    assert torch.equal(hidden.tokens == 4, hidden.where)


def test_what_does_not_fit_is_refused() -> None:
    model = DecoderConfig(depth=1, width=8, num_heads=1)
    run: Any = SimpleNamespace(model=model, train=SimpleNamespace(batch_size=16))
    with pytest.raises(ValueError, match=r"model\.causal=false"):
        DiffusionConfig().check(run)
    run.model = replace(model, causal=False)
    DiffusionConfig(strata=8).check(run)
    with pytest.raises(ValueError, match=r"divide train\.batch_size=16"):
        DiffusionConfig(strata=5).check(run)
    with pytest.raises(ValueError, match="draws=1"):
        DiffusionConfig(draws=1)


def test_the_tokenizer_with_a_mask_survives_a_run_folder() -> None:
    again = loads(TOKENIZER.dumps())
    assert (again.vocab_size, again.eos, token_id(again, "<mask>")) == (5, 3, 4)
    assert again.decode([2, 4, 1]) == " 2 1"
    assert again.bytes_per_id().tolist() == [2, 2, 2, 0, 0]
