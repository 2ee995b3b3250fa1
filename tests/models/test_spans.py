"""Tokens of a given stretch see each other: in training, in the cache, and in generation."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from kernels.attention import span_reach
from models.attention_config import AttentionConfig
from models.contract import batch_logits, logits, read, start
from models.decoder import Decoder
from models.decoder_config import DecoderConfig
from models.mamba_config import MambaConfig
from models.prefix_cache import PrefixCache
from runner.data.dialogue_format import given_spans
from runner.data.people_config import PeopleConfig
from runner.data.people_corpus import PeopleCorpus
from runner.data.tokenizers_config import TokenizerConfig
from runner.generate.autoregressive import Autoregressive
from runner.generate.engine import Engine
from runner.generate.generate import completions
from runner.generate.request import Request
from runner.generate.sampling import Sampling
from runner.generate.tools import Call, Tools
from runner.learn.tasks.language_modelling import LanguageModelling
from runner.machine.errors import ConfigError
from runner.records.config import validate

Compose = Callable[..., dict[str, Any]]
VOCAB = 24
SPANS = torch.tensor([[1, 1, 1, 0, 0, 2, 2, 3, 0, 0, 0], [0, 1, 1, 1, 1, 0, 2, 0, 0, 3, 3]])
IDS = torch.randint(0, VOCAB, SPANS.shape, generator=torch.Generator().manual_seed(1))
SHAPES = {
    "plain": {},
    "grouped, sink": {
        "num_kv_heads": 1,
        "pattern": "sf",
        "parts": {"s": AttentionConfig(learned_sink=True)},
    },
    "learned positions": {"positions": "learned", "context_length": 32},
}


def _model(seed: int = 3, **more: Any) -> Decoder:
    model = DecoderConfig(**{"depth": 2, "width": 16, "num_heads": 2} | more).build(VOCAB, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model.double()


def _sees(spans: Sequence[int], i: int, j: int) -> bool:
    """Return whether token i sees token j, by the definition."""
    together = spans[i] != 0 and all(s == spans[i] for s in spans[min(i, j) : max(i, j) + 1])
    return j <= i or together


def test_a_token_reaches_to_the_end_of_its_span() -> None:
    for row, spans in zip(span_reach(SPANS).tolist(), SPANS.tolist(), strict=True):
        for i, reach in enumerate(row):
            assert reach == max(j for j in range(len(spans)) if _sees(spans, i, j))


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_it_depends_on_what_it_sees_and_on_nothing_else(shape: str) -> None:
    """One layer: a changed token changes the logits of those who see it, and no others."""
    model = _model(**SHAPES[shape] | {"depth": 1})  # type: ignore[operator]
    before = logits(model, IDS, spans=SPANS)
    for j in range(IDS.shape[1]):
        other = IDS.clone()
        other[:, j] = (other[:, j] + 1) % VOCAB
        changed = (logits(model, other, spans=SPANS) - before).abs().amax(-1) > 1e-9
        for row, spans in enumerate(SPANS.tolist()):
            assert changed[row].tolist() == [_sees(spans, i, j) for i in range(len(spans))]


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_one_span_is_a_model_without_order_and_none_is_a_causal_one(shape: str) -> None:
    model, without = _model(**SHAPES[shape]), _model(**SHAPES[shape] | {"causal": False})  # type: ignore[arg-type, operator]
    torch.testing.assert_close(logits(model, IDS, spans=torch.ones_like(IDS)), logits(without, IDS))
    torch.testing.assert_close(logits(model, IDS, spans=torch.zeros_like(IDS)), logits(model, IDS))
    documents = torch.tensor([[0] * 5 + [1] * 6, [0] * 9 + [1] * 2])
    packed = batch_logits(model, {"tokens": IDS, "spans": SPANS, "documents": documents})
    for row, cut in enumerate((5, 9)):
        for part in (slice(0, cut), slice(cut, None)):
            alone = logits(model, IDS[row : row + 1, part], spans=SPANS[row : row + 1, part])
            if shape != "learned positions":  # they count from the beginning of the sequence
                near = {"atol": 1e-5, "rtol": 1e-5}  # angles of rotation are fp32
                torch.testing.assert_close(packed[row : row + 1, part], alone, **near)


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_cache_gives_the_logits_of_training(shape: str, static: bool) -> None:
    model = _model(**SHAPES[shape])  # type: ignore[arg-type]
    whole = logits(model, IDS, spans=SPANS)
    cuts = [[3, 2, 3, 3], [5, 1, 3, 2]]  # each span whole; rows of a pass have different lengths
    state, at = start(model, 2, 16, static=static), [0, 0]
    for sizes in zip(*cuts, strict=True):
        longest, counts = max(sizes), torch.tensor(sizes)
        tokens, spans = (
            torch.zeros(2, longest, dtype=torch.int64),
            torch.zeros(2, longest, dtype=torch.int64),
        )
        for row, size in enumerate(sizes):
            tokens[row, :size] = IDS[row, at[row] : at[row] + size]
            spans[row, :size] = SPANS[row, at[row] : at[row] + size]
        got = read(model, tokens, state, counts=counts, every=True, spans=spans)
        for row, size in enumerate(sizes):
            torch.testing.assert_close(got[row, :size], whole[row, at[row] : at[row] + size])
            at[row] += size


@torch.no_grad()
def test_generation_reads_a_prompt_whole_and_goes_on_causally() -> None:
    model = _model()
    prompts = [[1, 2, 3, 4, 5], [7, 8], [9, 1, 2, 7, 5], [1, 2, 3, 4, 6]]
    requests = [
        Request(id=str(n), prompt=p, how=Sampling(max_new_tokens=9, temperature=0.0))
        for n, p in enumerate(prompts)
    ]
    begun = PrefixCache(
        block=2, max_bytes=1 << 20
    )  # a span that another one continues is not shared
    for more in ({}, {"fixed_rows": 2}, {"prefixes": begun}):
        strategy = Autoregressive(
            model,
            context=32,
            decode=_letters,
            bidirectional=True,
            **more,  # type: ignore[arg-type]
        )
        for done in completions(Engine(strategy, rows=2, chunk=2), requests):
            text = [*done.prompt, *done.ids]
            spans = torch.tensor([[1] * len(done.prompt) + [0] * len(done.ids)])
            best = logits(model, torch.tensor([text]), spans=spans)[0].argmax(-1).tolist()
            assert done.ids == best[len(done.prompt) - 1 : -1]
    scored = Request(id="s", prompt=[1, 2], how=Sampling(max_new_tokens=1), score_from=1)
    with pytest.raises(ValueError, match="predicts none of them"):
        strategy.check(scored)


class _Calls:
    """A call after every three tokens of the model's own."""

    def find(self, turn: Sequence[int]) -> Call | None:
        return Call(lambda text: text[::-1], _letters(turn)) if len(turn) == 3 else None


class _Letters:
    def encode(self, text: str) -> np.ndarray:
        return np.array([ord(letter) - 97 for letter in text])


@torch.no_grad()
def test_what_a_tool_says_is_a_span_of_its_own_that_later_ones_do_not_see() -> None:
    """Whatever runs beside: each text is the likeliest of a whole pass under its spans."""
    model = _model()
    tools = Tools([_Calls()], _Letters())
    requests = [
        Request(
            id=str(n),
            prompt=[1 + n, 2, 3, 4, 5][: 2 + n],
            how=Sampling(max_new_tokens=14, temperature=0.0),
            tools=tools,
        )
        for n in range(3)
    ]
    more: dict[str, Any]
    for more in ({}, {"fixed_rows": 2}, {"prefixes": PrefixCache(block=2, max_bytes=1 << 20)}):
        strategy = Autoregressive(model, context=32, decode=_letters, bidirectional=True, **more)
        engine = Engine(strategy, rows=2, chunk=2 if "fixed_rows" in more else None)
        for done in completions(engine, requests):
            ids = torch.tensor([[*done.prompt, *done.ids]])
            chosen = np.array([False] * len(done.prompt) + [not forced for forced in done.forced])
            spans = torch.from_numpy(given_spans(chosen))[None]
            assert spans.max() > 2
            best = logits(model, ids, spans=spans)[0].argmax(-1)
            own = torch.from_numpy(chosen[1:])
            assert torch.equal(best[:-1][own], ids[0, 1:][own])


def _letters(ids: Sequence[int]) -> str:
    return "".join(chr(97 + index) for index in ids)


def test_what_reads_from_left_to_right_refuses(compose: Compose) -> None:
    for part in (MambaConfig(state_dim=4, head_dim=8), AttentionConfig(window=4)):
        model = _model(pattern="x", parts={"x": part})
        with pytest.raises(ValueError, match="reads from left to right"):
            logits(model, IDS, spans=SPANS)
    people = ["data=people", "tokenizer=dialogue", "~data.split", "~data.sources"]
    people += ["train.sequence_length=160", "data.bidirectional_prompt=true"]
    validate(compose(*people))
    for override, message in (
        ("model=bdh", "needs a decoder of attention"),
        ("model=hybrid", "reads from left to right"),
        ("data.condition=biography", "has no prompt"),
        ("data.loss_on=[user]", "cannot be learnt"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate(compose(*people, override))


def test_training_takes_the_spans_of_what_was_given() -> None:
    learnt = torch.tensor([0, 0, 1, 1, 0, 0, 1]).bool().numpy()
    assert given_spans(learnt).tolist() == [1, 1, 0, 0, 2, 2, 0]
    cfg = PeopleConfig(num_people=4, condition="in_tool", bidirectional_prompt=True)
    corpus = PeopleCorpus(cfg, TokenizerConfig(kind="dialogue").build(()))
    (batch,) = corpus.held_out(160, 4, 640)
    task = LanguageModelling(corpus.tokenizer)
    model = DecoderConfig(depth=2, width=16, num_heads=2, init_std=0.5).build(260, 0)
    losses = [
        float(task.loss(model, given, None).total.detach())
        for given in (batch, {k: v for k, v in batch.items() if k != "spans"})
    ]
    assert losses[0] != losses[1]
    value = (batch["spans"] == 2).sum(dim=1)
    for tokens, length in zip(batch["tokens"], value.tolist(), strict=True):
        told = tokens.tolist()
        assert length == told.index(258, told.index(259)) - told.index(259)
