"""Speculation: the same greedy ids, the same distribution, and the rounds that theory gives."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor, nn

from models.decoder import Decoder
from models.decoder_config import DecoderConfig
from models.mamba_config import MambaConfig
from runner.generate.autoregressive import Autoregressive
from runner.generate.choosing import History, probabilities
from runner.generate.drafts import Draft, DraftModel, PromptLookup, first_layers
from runner.generate.engine import Engine
from runner.generate.generate import completions
from runner.generate.request import Request
from runner.generate.sampling import Sampling
from runner.generate.speculation import Speculative

VOCAB, CONTEXT, LENGTH = 23, 24, 3
RECURRENT = {"pattern": "m", "parts": {"m": MambaConfig(state_dim=4, head_dim=8)}}
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [1, 2, 9, 1, 2], list(range(20)), [3]]


def _built(seed: int = 3, **more: Any) -> Decoder:
    model = DecoderConfig(**{"depth": 2, "width": 16, "num_heads": 2} | more).build(VOCAB, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)  # far from uniform
    return model.double()


class Chain(nn.Module):
    """The next token depends on the last one alone."""

    def __init__(self, seed: int, spread: float) -> None:
        super().__init__()
        self.vocab_size = 5
        table = torch.randn(5, 5, generator=torch.Generator().manual_seed(seed)) * spread
        self.table = nn.Parameter(table.double(), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits, [batch, seq, vocab]."""
        return self.table[tokens]


def _strategy(model: Any, draft: Draft | None, **more: Any) -> Any:
    given = {"context": CONTEXT, "decode": lambda ids: "".join(chr(97 + i) for i in ids)}
    fixed_rows = more.pop("fixed_rows", None)
    plain = Autoregressive(model, ends=(0,), fixed_rows=fixed_rows, **given)
    return plain if draft is None else Speculative(plain, draft, length=LENGTH, **more)


def _ids(strategy: Any, hows: Sequence[Sampling]) -> list[list[int]]:
    engine = Engine(strategy, rows=3, overflow="reread")
    requests = [
        Request(id=f"{index}", prompt=prompt, how=how)
        for index, (prompt, how) in enumerate(zip(PROMPTS, hows, strict=True))
    ]
    texts = [done.ids for done in completions(engine, requests)]
    assert engine.num_running == strategy.num_bytes() == 0
    return texts


@pytest.mark.parametrize(
    ("target", "kind", "fixed_rows"),
    [
        ("attention", "itself", None),
        ("attention", "recurrent", None),
        ("attention", "lookup", 3),
        ("recurrent", "model", 3),
        ("recurrent", "lookup", None),
        ("attention", "early", None),
    ],
)
def test_greedy_ids_are_those_of_plain_decoding(
    target: str, kind: str, fixed_rows: int | None
) -> None:
    model = _built(**RECURRENT if target == "recurrent" else {})
    draft: Draft = {
        "model": lambda: DraftModel(_built(4, depth=1), CONTEXT),
        "itself": lambda: DraftModel(model, CONTEXT),
        "recurrent": lambda: DraftModel(_built(4, **RECURRENT), CONTEXT),
        "lookup": PromptLookup,
        "early": lambda: DraftModel(first_layers(model, 1), CONTEXT),
    }[kind]()
    hows = [
        Sampling(max_new_tokens=number, temperature=0.0, frequency_penalty=penalty, stop=stop)
        for number, penalty, stop in zip(
            (30, 12, 40, 9, 1),
            (0.0, 0.5, 0.0, 0.0, 0.0),
            ((), (), ("ab", "w"), (), ()),
            strict=True,
        )
    ]
    strategy = _strategy(model, draft, fixed_rows=fixed_rows)
    assert _ids(strategy, hows) == _ids(_strategy(model, None, fixed_rows=fixed_rows), hows)
    counts = strategy.counts
    assert counts.accepted <= counts.proposed <= LENGTH * counts.rounds
    if kind == "itself":
        assert counts.accepted == counts.proposed > 0


@pytest.mark.parametrize("kind", ["model", "lookup", "early"])
def test_greedy_ids_of_200_prompts_are_those_of_plain_decoding(kind: str) -> None:
    model, number = _built(), 200
    draft: Draft = {
        "model": lambda: DraftModel(_built(4, depth=1), CONTEXT),
        "lookup": PromptLookup,
        "early": lambda: DraftModel(first_layers(model, 1), CONTEXT),
    }[kind]()
    prompts = torch.randint(0, VOCAB, (number, 8), generator=torch.Generator().manual_seed(0))
    how = Sampling(max_new_tokens=8, temperature=0.0, ends=())
    texts = []
    for strategy in (_strategy(model, draft, most_rows=number), _strategy(model, None)):
        engine = Engine(strategy, rows=number)
        requests = (
            Request(id=f"{row}", prompt=prompt[: 1 + row % 8], how=how)
            for row, prompt in enumerate(prompts.tolist())
        )
        texts.append([done.ids for done in completions(engine, requests)])
        if isinstance(strategy, Speculative):
            assert 0 < strategy.counts.accepted < strategy.counts.proposed
    assert texts[0] == texts[1]


@pytest.mark.parametrize("cut", [{"top_k": 4}, {"top_p": 0.8}, {"top_k": 4, "top_p": 0.9}])
@pytest.mark.parametrize("kind", ["model", "lookup"])
def test_drawn_texts_are_distributed_as_without_a_draft(kind: str, cut: dict[str, Any]) -> None:
    """Of 5 ids, under a temperature and what cuts, the first three new ones: 125 cells."""
    model, number = Chain(0, 1.5), 1000
    draft = DraftModel(Chain(1, 1.5), CONTEXT) if kind == "model" else PromptLookup()
    how: dict[str, Any] = {"max_new_tokens": 4, "temperature": 0.9, "ends": ()} | cut
    engine = Engine(_strategy(model, draft, most_rows=number), rows=number)
    requests = [
        Request(id=f"{sample}", prompt=[2, 1, 2], how=Sampling(**how, sample=sample))
        for sample in range(number)
    ]
    texts = np.array([done.ids for done in completions(engine, requests)])
    history = History(Sampling(**how), (), [2], None, 5, torch.device("cpu"))
    p = probabilities(model.table.data, [history] * 5).numpy()
    expected = np.einsum("a,ab,bc->abc", p[2], p, p).flatten() * number
    seen = np.bincount(texts[:, :3] @ np.array([25, 5, 1]), minlength=125)
    assert not seen[expected == 0].any()
    likely = expected > 5
    cells = np.array([np.append(x[likely], x[~likely].sum()) for x in (seen, expected)])
    assert chisquare(*cells[:, cells[1] > 0]).pvalue > 0.01
    assert engine.strategy.counts.accepted > 0


def test_rounds_add_the_tokens_that_markov_chains_are_expected_to_accept() -> None:
    """E = sum over k = 0..g of pi M^k 1, M[s, t] = min(p, q)(t | s), to 3 standard errors."""
    target, other, number = Chain(0, 1.5), Chain(2, 1.5), 1000
    strategy = _strategy(target, DraftModel(other, CONTEXT), most_rows=number)
    engine = Engine(strategy, rows=number)
    for sample in range(number):
        how = Sampling(max_new_tokens=2 + LENGTH, ends=(), sample=sample)
        engine.submit(Request(id=f"{sample}", prompt=[2], how=how))
    assert len(engine.step()) == number  # the first tokens, drawn from p(. | 2)
    events = engine.step()
    added = np.bincount([int(event.id) for event in events], minlength=number)
    p, q = (chain.table.softmax(dim=-1).numpy() for chain in (target, other))
    both, left, expected = np.minimum(p, q), p[2], 0.0
    for _ in range(LENGTH + 1):
        expected, left = expected + left.sum(), left @ both
    assert abs(added.mean() - expected) < 3 * added.std() / number**0.5
    assert (strategy.counts.rounds, strategy.counts.new) == (number, added.sum())


def test_what_followed_the_last_ids_before_is_copied_as_often_as_it_takes() -> None:
    lookup = PromptLookup()
    for tokens, number, copied in (
        ([1, 2, 3, 4, 5, 1, 2, 3], 4, [4, 5, 1, 2]),
        ([7, 7, 7], 3, [7, 7, 7]),
        ([1, 2, 1, 2], 3, [1, 2, 1]),
        ([1, 2, 3], 2, []),
    ):
        assert lookup._after(tokens, number) == copied


def test_a_draft_that_cannot_be_is_refused_and_many_rows_go_on_without() -> None:
    with pytest.raises(ValueError, match="layers=2 must be in 1 to 1"):
        first_layers(_built(), 2)
    with pytest.raises(ValueError, match="Chain cannot be left after a layer"):
        first_layers(Chain(0, 1.0), 1)
    with pytest.raises(ValueError, match="length=0 must be at least 1"):
        Speculative(_strategy(_built(), None), PromptLookup(), length=0)
    busy = _strategy(_built(), PromptLookup(), most_rows=1)
    engine = Engine(busy, rows=2, overflow="reread")
    how = Sampling(max_new_tokens=8, temperature=0.0, ends=())
    list(engine.run(Request(id=f"{i}", prompt=[1, 2, 1, 2], how=how) for i in range(2)))
    assert busy.counts.rounds == 0
