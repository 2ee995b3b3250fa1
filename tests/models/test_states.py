"""A row of any state says what its text says alone, whatever joined, left and went back beside it.

All is in fp64, so that another order of sums does not hide a wrong one.
"""

import copy
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.attention_config import AttentionConfig
from models.bdh_config import BDHConfig
from models.cache import State
from models.contract import logits as logits_of
from models.contract import read, start
from models.convolution_config import ConvolutionConfig
from models.decoder_config import DecoderConfig
from models.engram_config import EngramConfig
from models.experts_config import ExpertsConfig
from models.linear_attention_config import LinearAttentionConfig
from models.mamba_config import MambaConfig
from models.min_gru_config import MinGRUConfig
from models.ngram import Ngram
from models.ngram_config import NgramConfig
from models.stored_keys_values import GroupedKeysValues
from models.streams_config import StreamsConfig
from tests.models.backbone import VOCAB, perturbed, text

CONTEXT = 24


def _decoder(part: Any = None, pattern: str = "xf", **more: Any) -> DecoderConfig:
    parts = more.pop("parts", {} if part is None else {"x": part})
    base = {"depth": 2, "width": 16, "num_heads": 2, "context_length": CONTEXT}
    return DecoderConfig(**base | {"pattern": pattern, "parts": parts} | more)


CONFIGS: dict[str, Any] = {
    "rope": _decoder(pattern="af", num_kv_heads=1, qk_norm=True),
    "learned positions": _decoder(pattern="af", positions="learned", norm="layernorm", bias=True),
    "learned sink": _decoder(AttentionConfig(learned_sink=True)),
    "window": _decoder(AttentionConfig(window=5)),
    "window, sinks": _decoder(AttentionConfig(window=4, sinks=2)),
    "window, reindexed": _decoder(AttentionConfig(window=4, sinks=2, reindex=True)),
    "mamba": _decoder(MambaConfig(state_dim=4, head_dim=8, chunk=4)),
    "delta": _decoder(LinearAttentionConfig(kind="delta", chunk=4)),
    "gated delta": _decoder(LinearAttentionConfig(kind="gated_delta", chunk=8)),
    "gla": _decoder(LinearAttentionConfig(kind="gla", chunk=4)),
    "based": _decoder(LinearAttentionConfig(kind="based", key_dim=4, conv=3)),
    "minGRU": _decoder(MinGRUConfig(expand=1.5)),
    "short conv": _decoder(ConvolutionConfig()),
    "long conv": _decoder(ConvolutionConfig(taps=20)),
    "bdh": BDHConfig(depth=2, width=16, num_heads=2, multiplier=2),
    "bdh, paper": BDHConfig(depth=2, width=16, num_heads=2, multiplier=2, form="paper"),
    "hybrid": _decoder(
        depth=3,
        pattern="nxe wm af",
        streams=StreamsConfig(num_streams=2),
        parts={
            "x": LinearAttentionConfig(kind="gated_delta", chunk=8),
            "m": MambaConfig(state_dim=4, head_dim=8, chunk=4),
            "w": AttentionConfig(window=6, sinks=1),
            "n": EngramConfig(table_size=31, slot_dim=2),
            "e": ExpertsConfig(num_experts=4, hidden=16, balance="none", z_loss=0.0),
        },
    ),
}


class _Foreign(nn.Module):
    """A model of somebody's own without a state."""

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size = VOCAB
        self.embedding = nn.Embedding(VOCAB, 8)
        self.head = nn.Linear(8, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).cumsum(dim=1)
        return self.head(torch.tanh(x))


class _OwnState(nn.Module):
    """Another, with a state, from before `every`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.vocab_size = model_of("gla"), VOCAB

    def forward(self, tokens: Tensor, state: Any = None, counts: Any = None) -> Tensor:
        return self.inner(tokens, state=state, counts=counts)

    def start(self, batch: int, capacity: int, *, static: bool = False) -> State:
        return self.inner.start(batch, capacity, static=static)


def model_of(kind: str) -> Any:
    """Return the model of a kind, in fp64, far from its initialisation."""
    if kind == "foreign":
        torch.manual_seed(0)
        return _Foreign().double()
    if kind == "foreign, own state":
        return _OwnState()
    if kind in STORED:
        model = perturbed(CONFIGS["rope"]).double()
        model.stored = STORED[kind]
        return model
    if kind == "ngram":
        return Ngram(NgramConfig(order=3), VOCAB).fit(text(500).numpy())
    return perturbed(CONFIGS[kind]).double()


STORED = {"values in int8": "int8", "values in NVFP4": "nvfp4", "values in int4": "int4"}
KINDS = [*CONFIGS, *STORED, "ngram", "foreign", "foreign, own state"]


@dataclass
class _Simulation:
    """A batch of rows beside the texts that they have read."""

    model: Any
    static: bool
    random: random.Random
    rows: int = 3
    texts: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.texts = [[] for _ in range(self.rows)]
        self.state = start(self.model, self.rows, CONTEXT if self.static else 2, static=self.static)

    def tokens(self, count: int) -> list[int]:
        return [self.random.randrange(VOCAB) for _ in range(count)]

    def alone(self, ids: list[int]) -> Tensor:
        tokens = torch.tensor([ids])
        if getattr(self.model, "stored", None) is not None:  # what is rounded is in a state only
            return read(self.model, tokens, start(self.model, 1, 1), every=True)[0]
        with torch.no_grad():
            return logits_of(self.model, tokens)[0]

    def check(self, logits: Tensor, row: int, ids: list[int]) -> None:
        """Assert that these logits are those at the end of a text read at once."""
        torch.testing.assert_close(logits, self.alone(ids)[-len(logits) :], rtol=1e-11, atol=1e-11)

    def read(self) -> None:
        """Read some tokens in some rows, none in others."""
        counts = [min(self.random.choice((0, 1, 1, 5)), CONTEXT - len(t)) for t in self.texts]
        new = [self.tokens(count) for count in counts]
        padded = torch.full((self.rows, max(1, *counts)), 7)
        for row, ids in enumerate(new):
            padded[row, : len(ids)] = torch.tensor(ids)
        idle = torch.tensor([row for row, count in enumerate(counts) if count == 0])
        before = _tensors(self.state.select(idle.long()))
        every = self.random.random() < 0.5
        given = None if min(counts) == padded.shape[1] else torch.tensor(counts)
        logits = read(self.model, padded, self.state, counts=given, every=every)
        after = _tensors(self.state.select(idle.long()))
        for name, tensor in before.items():
            _assert_untouched(tensor, after[name], name)
        for row, ids in enumerate(new):
            self.texts[row] += ids
            if ids:
                own = logits[row, : len(ids)] if every else logits[row][None]
                self.check(own, row, self.texts[row])

    def join(self) -> None:
        """Put a row prefilled on its own, in chunks, in the place of another."""
        ids = self.tokens(self.random.randrange(0, CONTEXT))
        alone = start(self.model, 1, self.random.choice((1, 40)))
        for first in range(0, len(ids), 7):
            read(self.model, torch.tensor([ids[first : first + 7]]), alone)
        row = self.random.randrange(self.rows)
        self.state.put(torch.tensor([row]), alone)
        self.texts[row] = ids

    def move(self) -> None:
        """Select rows, perhaps one of them twice."""
        if self.static:  # its shape stays
            return
        rows = [self.random.randrange(self.rows) for _ in range(self.rows)]
        self.state = self.state.select(torch.tensor(rows))
        self.texts = [list(self.texts[row]) for row in rows]

    def go_back(self) -> None:
        """Forget tokens: by `truncate` where the state can, else by a snapshot."""
        if self.state.can_truncate:
            lengths = [self.random.randint(max(0, len(t) - 4), len(t)) for t in self.texts]
            self.state.truncate(torch.tensor(lengths))
            self.texts = [t[:n] for t, n in zip(self.texts, lengths, strict=True)]
            return
        snapshot, texts = self.state.select(torch.arange(self.rows)), copy.deepcopy(self.texts)
        self.read()
        row = self.random.randrange(self.rows)
        self.state.put(torch.tensor([row]), snapshot.select(torch.tensor([row])))
        self.texts[row] = texts[row]


def _tensors(state: Any) -> dict[str, Tensor]:
    if not hasattr(state, "memories"):
        return {"ids": state.ids, "lengths": state.lengths}
    return {"lengths": state.lengths} | {
        f"{number}.{name}": tensor
        for number, memory in state.memories.items()
        for name, tensor in memory.tensors.items()
    }


def _assert_untouched(before: Tensor, after: Tensor, name: str) -> None:
    if before.shape != after.shape:  # the capacity grew
        axis = next(i for i in range(before.ndim) if before.shape[i] != after.shape[i])
        after = after.narrow(axis, 0, before.shape[axis])
    assert torch.equal(before, after), name


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_says_what_its_text_says_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("group", "recent"):  # so that texts of these lengths are rounded
        monkeypatch.setattr(GroupedKeysValues, name, 4)
    model = model_of(kind)
    for static in (False, True):
        simulation = _Simulation(model, static, random.Random(f"{kind} {static}"))
        steps = [simulation.join, simulation.move, simulation.go_back] * 2
        simulation.random.shuffle(steps)
        for step in steps:
            simulation.read()
            step()
        simulation.read()
        none, one = torch.zeros(0, dtype=torch.int64), torch.tensor([1])
        assert simulation.state.select(none).num_bytes() == 0
        alone = simulation.state.select(one)
        assert alone.num_bytes() * 3 == simulation.state.num_bytes() > 0
        assert alone.to(torch.device("cpu")).num_bytes() == alone.num_bytes()


@torch.no_grad()
def test_what_a_state_cannot_do_is_refused() -> None:
    recurrent, attending = model_of("gla"), model_of("learned positions")
    state = start(recurrent, 1, 8)
    assert state.can_truncate  # it has read nothing
    read(recurrent, text(1, 5), state)
    state.truncate(torch.tensor([5]))
    with pytest.raises(ValueError, match="row 0 cannot go back from 5 tokens to 4"):
        state.truncate(torch.tensor([4]))
    static, longer = start(attending, 2, 8, static=True), start(attending, 1, 1)
    read(attending, text(1, 9), longer)
    with pytest.raises(ValueError, match="a row of 9 tokens does not fit a static state of 8"):
        static.put(torch.tensor([0]), longer)
    with pytest.raises(ValueError, match="2 rows cannot be replaced by 1"):
        static.put(torch.tensor([0, 1]), longer)
    with pytest.raises(ValueError, match="row 0 has 9 tokens; 10 of them cannot be kept"):
        longer.truncate(torch.tensor([10]))
    padded, counts = text(2, 9), torch.tensor([8, 2])
    with pytest.raises(ValueError, match="a row of 9 tokens does not fit a static state of 8"):
        read(attending, padded, static)
    logits = read(attending, padded, static, counts=counts)  # only padding passes the end
    torch.testing.assert_close(logits[0], logits_of(attending, padded[:1, :8])[0, -1])
    torch.testing.assert_close(logits[1], logits_of(attending, padded[1:, :2])[0, -1])
