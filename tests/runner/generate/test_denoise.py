"""Denoising against the exact posterior of a Markov chain, and the rules of each algorithm."""

import itertools
import math
from collections.abc import Collection, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from runner.generate.denoise import Denoise
from runner.generate.denoising import Denoising
from runner.generate.engine import Engine
from runner.generate.generate import Completion, completions
from runner.generate.request import Request
from runner.generate.sampling import Sampling

CHAIN = torch.tensor([[0.80, 0.15, 0.05], [0.10, 0.70, 0.20], [0.25, 0.25, 0.50]]).double()
LENGTH, BOS, MASK = 6, 3, 4
TEXTS = torch.tensor(list(itertools.product(range(3), repeat=LENGTH)))
TRUE = CHAIN[TEXTS[:, :-1], TEXTS[:, 1:]].prod(-1) / 3


class Posterior(nn.Module):
    """The exact distribution of each state, given those revealed; `shift` moves it one back."""

    vocab_size = 5

    def __init__(self, *, shift: bool = False) -> None:
        super().__init__()
        self.device, self.shift = nn.Parameter(torch.zeros(())), shift

    def forward(self, tokens: Tensor) -> Tensor:
        states = tokens[:, 1:, None]
        fits = ((states == TEXTS.T) | (states == MASK)).all(1).double() * TRUE
        chance = fits @ nn.functional.one_hot(TEXTS, 3).double().flatten(1)
        chance = chance.view(len(tokens), LENGTH, 3) / fits.sum(-1)[:, None, None]
        logits = torch.full((*tokens.shape, 5), -30.0, dtype=torch.float64)
        logits[:, slice(0, -1) if self.shift else slice(1, None), :3] = chance.log().clamp(min=-30)
        logits[..., MASK] = 50.0  # never chosen, whatever the model says
        return logits


def _engine(*, shift: bool = False, rows: int = 500) -> Engine[Any]:
    strategy = Denoise(
        Posterior(shift=shift),
        context=LENGTH + 1,
        decode=lambda ids: " ".join(map(str, ids)),
        mask=MASK,
        shift=shift,
    )
    return Engine(strategy, rows=rows)


def _texts(number: int, *, shift: bool = False, **how: Any) -> list[Completion]:
    requests = (
        Request(
            id=str(sample),
            prompt=[BOS],
            how=Denoising(max_new_tokens=LENGTH, sample=sample, **how),
        )
        for sample in range(number)
    )
    return list(completions(_engine(shift=shift), requests))


def _sampled(steps: int) -> Tensor:
    """Return the probability of each text where `steps` equal parts are revealed at random."""
    part, total = LENGTH // steps, torch.zeros(len(TEXTS)).double()
    orders = set()
    for order in itertools.permutations(range(LENGTH)):
        orders.add(tuple(frozenset(order[i : i + part]) for i in range(0, LENGTH, part)))
    for groups in orders:
        total += _sampled_in(groups) / len(orders)
    return total


def _sampled_in(groups: Sequence[Collection[int]]) -> Tensor:
    """Return the probability of each text where `groups` are revealed one after the other."""
    chance, known = torch.ones(len(TEXTS)).double(), list[int]()
    for group in groups:
        for place in group:  # each on its own, given what was known before the step
            chance *= _given(known, place)
        known += group
    return chance


def _divergence(sampler: Tensor) -> float:
    """Return KL(truth || sampler), nats."""
    return float((TRUE * (TRUE / sampler).log()).sum())


def _assert_drawn_from(expected: Tensor, done: Sequence[Completion]) -> None:
    """Check the first three states of texts by a chi-square test."""
    begin = (torch.tensor([c.ids[:3] for c in done]) * torch.tensor([9, 3, 1])).sum(-1)
    seen, wanted = torch.bincount(begin, minlength=27), expected.view(27, -1).sum(-1) * len(done)
    deviation = float(((seen - wanted) ** 2 / wanted).sum())
    assert deviation < 26 + 4 * math.sqrt(2 * 26)


def _given(known: Sequence[int], place: int) -> Tensor:
    shape = [3] * LENGTH
    joint = TRUE.view(shape)
    rest = [axis for axis in range(LENGTH) if axis not in (*known, place)]
    both = joint.sum(rest, keepdim=True) if rest else joint
    return (both / both.sum(place, keepdim=True)).expand(shape).flatten()


@pytest.mark.parametrize(("steps", "nats"), [(1, 1.383502), (2, 0.262799), (3, 0.073801), (6, 0.0)])
def test_tokens_revealed_together_cost_what_they_are_correlated(steps: int, nats: float) -> None:
    """The distance between sampler and truth; the sampler draws from the former (chi-square)."""
    expected = _sampled(steps)
    assert _divergence(expected) == pytest.approx(nats, abs=1e-6)
    how = {"steps": steps, "algorithm": "random", "temperature": 1.0}
    _assert_drawn_from(expected, _texts(200, shift=steps == 3, **how))


def test_pairs_far_apart_cost_less_than_neighbours() -> None:
    for groups, nats in (
        ([(0, 1), (2, 3), (4, 5)], 0.624841),
        ([(0, 3), (1, 4), (2, 5)], 0.034428),
        ([(0, 4), (2, 5), (1, 3)], 0.013682),
    ):
        assert _divergence(_sampled_in(groups)) == pytest.approx(nats, abs=1e-6)


def test_a_text_does_not_depend_on_its_company() -> None:
    how = {"steps": 3, "algorithm": "entropy", "temperature": 0.7, "order_temperature": 0.5}
    together = _texts(12, **how)
    assert len({tuple(c.ids) for c in together}) > 3
    alone = completions(
        _engine(),
        [Request(id="x", prompt=[BOS], how=Denoising(max_new_tokens=LENGTH, sample=7, **how))],
    )
    assert next(alone).ids == together[7].ids


@pytest.mark.parametrize(
    ("how", "revealed"),
    [
        ({"steps": 6, "algorithm": "low_confidence"}, [1, 1, 1, 1, 1, 1]),
        ({"steps": 4, "algorithm": "low_confidence"}, [2, 2, 1, 1]),
        (
            {"steps": 3, "algorithm": "maskgit_plus"},
            [1, 2, 3],
        ),  # int(6 / 3), int(5 * (1 - 1/2)), rest
        ({"block": 2, "steps": 3, "algorithm": "entropy"}, [2, 2, 2]),
        ({"block": 4, "algorithm": "topk_margin"}, [0, 1, 1, 2, 0, 2]),  # int(4 * 0.24975) = 0
        ({"threshold": 1e-9, "algorithm": "maskgit_plus"}, [6]),
        ({"threshold": 1.0, "algorithm": "maskgit_plus", "block": 3}, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_how_many_tokens_a_step_reveals(how: dict[str, Any], revealed: list[int]) -> None:
    engine = _engine()
    engine.submit(Request(id="x", prompt=[BOS], how=Denoising(max_new_tokens=LENGTH, **how)))
    engine.step()
    (row,) = engine._admitted.values()
    while engine.num_running:
        engine.step()
    at = row.revealed_at
    assert torch.bincount(at).tolist() == revealed
    (done,) = _texts(1, **how)
    assert done.num_passes == len(revealed)
    (guided,) = _texts(1, **how, guidance=1.0)
    assert guided.num_passes == 2 * len(torch.bincount(torch.tensor(guided.revealed_at)))
    if "block" in how:
        size = how["block"]
        ends = [int(at[i : i + size].max()) for i in range(0, LENGTH, size)]
        begins = [int(at[i : i + size].min()) for i in range(0, LENGTH, size)]
        assert all(begin > end for end, begin in zip(ends[:-1], begins[1:], strict=True))


def test_the_text_streams_as_its_beginning_settles_and_ends_where_it_says() -> None:
    how = Denoising(max_new_tokens=LENGTH, ends=(2,), algorithm="random", temperature=1.0, seed=4)
    engine = _engine()
    events = list(engine.run([Request(id="x", prompt=[BOS], how=how)]))
    ids = [token for event in events for token in event.ids]
    assert 2 not in ids
    assert events[-1].finish == ("stop" if len(ids) < LENGTH else "length")
    assert "".join(event.text for event in events) == "".join(f" {token}" for token in ids)
    assert engine.strategy.num_bytes() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": [MASK]}, "stands for a token to fill in"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [9]}, "ids from 9 to 9"),
        ({"prompt": [0, 1]}, "pass the context of 7"),
        ({"how": Sampling()}, "fills in a canvas"),
        ({"score_from": 1}, "scores no prompt"),
    ],
)
def test_requests_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    request = {"id": "x", "prompt": [BOS], "how": Denoising(max_new_tokens=LENGTH)} | change
    with pytest.raises(ValueError, match=message):
        _engine().submit(Request(**request))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 8, "block": 2, "steps": 3}, "steps=3 must be in 4"),
        ({"steps": 65}, "max_new_tokens=64"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"threshold": 0.9}, "algorithm=entropy has not"),
        ({"algorithm": "best"}, "one of origin, maskgit_plus"),
    ],
)
def test_settings_that_contradict_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Denoising(**wrong)
