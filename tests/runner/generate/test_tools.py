"""Tools in generation: what is forced is what was answered, and nothing else changes any text."""

import random
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.attention_config import AttentionConfig
from models.contract import logits
from models.decoder_config import DecoderConfig
from models.linear_attention_config import LinearAttentionConfig
from models.mamba_config import MambaConfig
from models.prefix_cache import PrefixCache
from runner.data.tokenizers import ByteTokenizer, CharTokenizer
from runner.generate import tool_pool
from runner.generate.autoregressive import Autoregressive
from runner.generate.calculator_tool import CalculatorConfig
from runner.generate.engine import Engine
from runner.generate.generate import Completion, completions, generate
from runner.generate.request import Event, Request
from runner.generate.sampling import Sampling
from runner.generate.tool_pool import InTurn, ToolPool
from runner.generate.tools import Call, Tools, tools_for
from runner.machine.errors import ConfigError

CONTEXT = 64
VOCAB = 24


class Letters:
    """A tokenizer of the letters a to x."""

    vocab_size, eos = VOCAB, 0

    def encode(self, text: str) -> np.ndarray:
        return np.array([ord(c) - 97 for c in text])

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(97 + i) for i in ids)


def _calls(turn: Sequence[int]) -> bool:
    """Return whether a turn has come to a call: the sooner, the smaller its last id modulo 5."""
    return len(turn) > 1 + turn[-1] % 5


class Often:
    """A call every few ids."""

    def __init__(self, tool: Any) -> None:
        self.tool = tool

    def find(self, turn: Sequence[int]) -> Call | None:
        return Call(self.tool, Letters().decode(turn)) if _calls(turn) else None


class Backwards:
    """Answers a text by its end, backwards; it may dawdle, fail, or never answer."""

    timeout_s = 60.0

    def __init__(self, seconds: float = 0.0) -> None:
        self.random, self.seconds = random.Random(0), seconds

    def __call__(self, text: str) -> str:
        time.sleep(self.random.random() * self.seconds)
        return text[::-1][:7]


def _model(**more: Any) -> nn.Module:
    model = DecoderConfig(**{"depth": 1, "width": 16, "num_heads": 2} | more).build(VOCAB, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model.double()


class NoState(nn.Module):
    """A model that keeps no state, and reads each text anew."""

    vocab_size = VOCAB

    def __init__(self) -> None:
        super().__init__()
        self.inner = _model()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(tokens)  # type: ignore[no-any-return]


MODELS = {
    "keys": _model(),
    "window": _model(pattern="w", parts={"w": AttentionConfig(window=5, sinks=1)}),
    "mamba": _model(pattern="m", parts={"m": MambaConfig(state_dim=4, head_dim=8)}),
    "delta": _model(
        pattern="d", parts={"d": LinearAttentionConfig(kind="gated_delta", key_dim=4, conv=3)}
    ),
    "no state": NoState(),
}


def _tools(tool: Any = None, **more: Any) -> Tools:
    return Tools([Often(tool or Backwards())], Letters(), **{"error": "xx"} | more)


def _requests(tools: Tools, count: int = 6, **how: Any) -> list[Request]:
    return [
        Request(
            id=str(n),
            prompt=[1 + (3 * n + k) % 23 for k in range(2 + n % 4)],
            how=Sampling(**{"max_new_tokens": 18, "temperature": 0.0, "sample": n} | how),
            tools=tools,
        )
        for n in range(count)
    ]


def _engine(model: Any, **more: Any) -> Engine[Any]:
    own = {k: more.pop(k) for k in ("fixed_rows", "prefixes") if k in more}
    strategy = Autoregressive(model, context=CONTEXT, decode=Letters().decode, ends=(0,), **own)
    return Engine(strategy, **{"rows": 3, "overflow": "reread"} | more)


def _run(engine: Engine[Any], requests: Sequence[Request]) -> list[Completion]:
    return list(completions(engine, requests))


@pytest.mark.parametrize("kind", list(MODELS))
def test_what_is_forced_was_answered_and_what_is_chosen_follows_from_all_before(kind: str) -> None:
    """By whole passes over each text; alone, in company, dawdling, in one shape: one text."""
    model, requests = MODELS[kind], _requests(_tools())
    alone = _run(_engine(model, rows=1, pool=InTurn()), requests)
    assert sum(c.num_calls for c in alone) > 6
    for completion in alone:
        text = [*completion.prompt, *completion.ids]
        with torch.no_grad():
            scores = logits(model, torch.tensor([text]))[0].log_softmax(-1)
        turn: list[int] = []
        due: list[int] = []
        for place, (index, forced) in enumerate(
            zip(completion.ids, completion.forced, strict=True), start=len(completion.prompt)
        ):
            assert forced == bool(due)
            if forced:
                assert index == due.pop(0)
                assert completion.logprobs[place - len(completion.prompt)] == 0.0
                continue
            assert index == int(scores[place - 1].argmax())
            logprob = completion.logprobs[place - len(completion.prompt)]
            assert logprob == pytest.approx(float(scores[place - 1, index]), abs=1e-9)
            turn.append(index)
            if _calls(turn):
                due, turn = turn[::-1][:7], []
    dawdling = _requests(_tools(Backwards(seconds=0.003)))
    variants = [
        _run(_engine(model), requests[::-1])[::-1],
        _run(_engine(model, rows=2, max_away=1), dawdling),
        _run(_engine(model, fixed_rows=3, chunk=2), requests),
    ]
    for other in variants:
        assert [c.ids for c in other] == [c.ids for c in alone]
        assert [c.forced for c in other] == [c.forced for c in alone]
        assert [c.text for c in other] == [c.text for c in alone]


def test_samples_are_drawn_by_seed_and_place_whatever_the_tools_do() -> None:
    how = {"temperature": 1.0, "seed": 5}
    quick = _run(_engine(MODELS["keys"], rows=6), _requests(_tools(), **how))
    slow = _run(_engine(MODELS["keys"]), _requests(_tools(Backwards(0.003)), **how))
    assert [c.ids for c in quick] == [c.ids for c in slow]
    assert len({tuple(c.ids) for c in quick}) == 6


class Never:
    """A tool that hangs until it is hurried."""

    timeout_s = 0.0

    def __init__(self) -> None:
        self.hurry = threading.Event()

    def __call__(self, text: str) -> str:
        self.hurry.wait()
        return "a"


def test_a_tool_that_fails_or_never_answers_is_an_error_and_is_counted() -> None:
    never = Never()

    class Fails:
        def __call__(self, text: str) -> str:
            raise KeyError(text)

    for tool in (never, Fails()):
        pool = ToolPool()
        done = _run(_engine(MODELS["keys"], pool=pool), _requests(_tools(tool)))
        assert pool.num_failed == pool.num_calls == sum(c.num_calls for c in done) > 0
        for completion in done:
            given = [i for i, f in zip(completion.ids, completion.forced, strict=True) if f]
            assert set(given) <= {23}  # x
    never.hurry.set()


def test_where_no_text_goes_on_without_its_answer_a_tool_that_hangs_ends_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    never = Never()
    monkeypatch.setattr(tool_pool, "_PATIENCE_S", 0.05)
    with pytest.raises(ConfigError, match=r"has not answered 'a' within 0 s.*leave it out"):
        InTurn().submit("one", Call(never, "a"))
    never.hurry.set()


@pytest.mark.parametrize("said", [None, b"abc", True, ["a"]])
def test_what_a_tool_returns_that_is_no_text_is_not_read(said: Any) -> None:
    pool = InTurn()
    pool.submit("one", Call(lambda _: said, "a"))
    (answer,) = pool.collect()
    assert answer.text is None
    assert f"it returned {type(said).__name__}, not text" in answer.why


def test_a_tool_of_which_many_calls_hang_is_called_no_more() -> None:
    begun, let = [0], threading.Event()

    class Hangs:
        timeout_s = 0.0

        def __call__(self, text: str) -> str:
            begun[0] += 1
            let.wait()
            return "a"

    pool, tool = ToolPool(), Hangs()
    whys = []
    for number in range(tool_pool._MAX_HANGING + 3):
        pool.submit(str(number), Call(tool, "a"))
        whys += [answer.why for answer in pool.collect(wait=True)]
    assert whys[: tool_pool._MAX_HANGING] == ["it took too long"] * tool_pool._MAX_HANGING
    assert all("64 earlier calls of this tool hang" in why for why in whys[-3:])
    assert begun == [tool_pool._MAX_HANGING]
    pool.submit("another", Call(Backwards(), "abc"))
    assert [answer.text for answer in pool.collect(wait=True)] == ["cba"]
    let.set()  # they end, are dropped, and the tool is called again
    tool.timeout_s = 60.0
    while pool._hanging[id(tool)] >= tool_pool._MAX_HANGING:
        pool.collect()
    pool.submit("last", Call(tool, "a"))
    assert [answer.text for answer in pool.collect(wait=True)] == ["a"]


def test_whatever_a_tool_says_is_read_as_far_as_there_is_room_and_ends_nothing() -> None:
    """Megabytes, half a character, a stop string, an exit of the process."""

    class Says:
        def __init__(self, text: str | None) -> None:
            self.text = text

        def __call__(self, text: str) -> str:
            if self.text is None:
                raise SystemExit(3)
            return self.text

    tools = Tools([Often(Says("a" * (1 << 22)))], Letters(), error="xx", max_characters=5)
    for completion in _run(_engine(MODELS["keys"]), _requests(tools)):
        given = [i for i, f in zip(completion.ids, completion.forced, strict=True) if f]
        assert set(given) <= {0}
        assert len(given) <= 5 * completion.num_calls
    stops = _run(_engine(MODELS["keys"]), _requests(_tools(Says("vwx")), stop=("vwx",)))
    assert any(completion.text.count("vwx") > 1 for completion in stops)
    pool = InTurn()
    _run(_engine(MODELS["keys"], pool=pool), _requests(_tools(Says(None))))
    assert pool.num_failed == pool.num_calls > 0
    subwords = ByteTokenizer()
    half = Tools([], subwords).answer(Call(Says(""), ""), "a\ud800b")
    assert subwords.decode(half) == "a?b"
    sums = CharTokenizer("0123456789+=<>")
    call = Call(CalculatorConfig(), "", after=(3,))
    given = [Tools([], sums).answer(call, said) for said in ("12", "half", None)]
    assert [sums.decode(ids) for ids in given] == ["123", "3", "3"], "it has no ids for error"


def test_budgets_of_tokens_and_of_calls_end_a_text() -> None:
    for most in (1, 2):
        done = _run(_engine(MODELS["keys"]), _requests(_tools(max_calls=most)))
        assert max(c.num_calls for c in done) == most
        assert all(c.finish in ("length", "stop") for c in done)
    short = _run(_engine(MODELS["keys"]), _requests(_tools(), max_new_tokens=7))
    assert all(len(c.ids) <= 7 for c in short)
    assert any(c.forced[-1] and c.finish == "length" for c in short if c.ids)
    with pytest.raises(ValueError, match="max_calls=0"):
        tools_for([], Letters(), max_calls=0)


def test_a_row_that_waits_is_out_of_the_batch_and_another_takes_its_place() -> None:
    let = threading.Event()

    class Waits(Backwards):
        def __call__(self, text: str) -> str:
            let.wait()
            return super().__call__(text)

    engine = _engine(MODELS["keys"], rows=2, max_away=3)
    requests = _requests(_tools(Waits()))
    for request in requests:
        engine.submit(request)
    events: list[Event] = []
    while engine.num_away < 3:
        events += engine.step()
    assert engine.num_running + engine.num_waiting == 3
    batch = engine.strategy.num_bytes()
    away = next(event.id for event in events if event.call)
    engine.cancel(away)
    assert engine.num_away == 2
    with pytest.raises(ValueError, match="is not ended yet"):
        engine.submit(next(r for r in requests if r.id in set(engine.away.ids())))
    let.set()
    events += list(engine.run([]))
    finishes = {event.id: event.finish for event in events if event.finish}
    assert finishes.pop(away) == "cancelled"
    assert len(finishes) == 5
    assert engine.strategy.num_bytes() == 0 < batch
    assert not engine.away


def test_dialogues_branch_from_what_was_said_before() -> None:
    prefixes = PrefixCache(block=4, max_bytes=1 << 20)
    (first,) = _run(_engine(MODELS["keys"], prefixes=prefixes), _requests(_tools(), 1))
    said = [*first.prompt, *first.ids]
    read: list[int] = []

    class Counting(Autoregressive):
        def read(self, rows: Any, most: Any) -> list[Event]:
            read.extend(row.unread for row in rows)
            return super().read(rows, most)

    for branch in ([3, 4], [6]):
        prompt, how = [*said, *branch], Sampling(max_new_tokens=5, temperature=0.0)
        known = Counting(
            MODELS["keys"], context=CONTEXT, decode=Letters().decode, prefixes=prefixes
        )
        request = Request(id="a", prompt=prompt, how=how)
        (with_store,) = _run(Engine(known, rows=1), [request])
        (without,) = _run(_engine(MODELS["keys"]), [request])
        assert with_store.ids == without.ids
    assert max(read) < 4 + 4  # the block that was not full, and the branch
    strategy = Counting(MODELS["keys"], context=CONTEXT, decode=Letters().decode, prefixes=prefixes)
    _run(Engine(strategy, rows=1), [Request(id="b", prompt=said, how=how, salt="another's")])
    assert max(read) == len(said)  # nothing is known to another


def test_generate_takes_tools() -> None:
    done = generate(
        MODELS["keys"],
        [torch.tensor([1, 2, 3])],
        Sampling(max_new_tokens=20, temperature=0.0),
        context=CONTEXT,
        decode=Letters().decode,
        ends=(),
        tools=_tools(),
    )
    assert done[0].num_calls > 0
    assert any(done[0].forced)
