"""The engine: what joins and leaves changes no text, nothing leaks, bad requests disturb no one."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor, nn

from models.attention_config import AttentionConfig, Stored
from models.decoder import Decoder
from models.decoder_config import DecoderConfig
from models.mamba_config import MambaConfig
from runner.generate.autoregressive import Autoregressive
from runner.generate.engine import Engine, QueueFull, largest_chunk
from runner.generate.generate import generate
from runner.generate.request import Event, Request
from runner.generate.sampling import Sampling

VOCAB, CONTEXT = 23, 24


def _letters(ids: Iterable[int]) -> str:
    return "".join(chr(97 + index) for index in ids)


def _built(**more: Any) -> Decoder:
    model = DecoderConfig(**{"depth": 1, "width": 16, "num_heads": 2} | more).build(VOCAB, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)  # far from uniform
    return model


MODEL = _built().double()
# Keys and values of a window, a recurrent state and its convolution, side by side.
MIXED = _built(
    pattern="wm",
    parts={"w": AttentionConfig(window=5, sinks=1), "m": MambaConfig(state_dim=4, head_dim=8)},
).double()


def _engine(model: Any = MODEL, ends: Sequence[int] = (0,), **more: Any) -> Engine[Any]:
    fixed_rows = more.pop("fixed_rows", None)
    strategy = Autoregressive(
        model, context=CONTEXT, decode=_letters, ends=ends, fixed_rows=fixed_rows
    )
    return Engine(strategy, **{"rows": 3, "overflow": "reread"} | more)


def _texts(events: Iterable[Event]) -> dict[str, tuple[str, str]]:
    """Return (text, finish) of each request that has ended."""
    texts: dict[str, str] = {}
    done = {}
    for event in events:
        texts[event.id] = texts.get(event.id, "") + event.text
        if event.finish:
            done[event.id] = texts.pop(event.id), event.finish
    assert not texts
    return done


HOWS = st.builds(
    Sampling,
    max_new_tokens=st.integers(0, 30),
    temperature=st.sampled_from([0.0, 1.0, 2.0]),
    top_p=st.sampled_from([None, 0.8]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    stop=st.sampled_from([(), ("ab", "q")]),
    seed=st.integers(0, 3),
    sample=st.integers(0, 1),
)
# Prompts of one length are read together, equal ones once.
PROMPTS = st.one_of(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=CONTEXT),
    st.sampled_from([[1, 2, 3], [4, 5, 6], [7, 8, 9]]),
)


class Traffic(RuleBasedStateMachine):
    """Random requests, cancels and steps."""

    @rule(
        model=st.sampled_from([MODEL, MIXED]),
        chunk=st.sampled_from([None, 1, 5]),
        whole=st.sampled_from([None, 6]),
        fixed=st.booleans(),
        most=st.sampled_from([None, CONTEXT + 10]),
    )
    @precondition(lambda self: not hasattr(self, "engine"))
    def start(
        self,
        model: Decoder,
        chunk: int | None,
        whole: int | None,
        fixed: bool,
        most: int | None,
    ) -> None:
        self.model = model
        limits = {"chunk": chunk, "whole": whole, "max_tokens": most}
        self.engine = _engine(model, fixed_rows=3 if fixed else None, **limits)
        self.asked: dict[str, Request] = {}
        self.cancelled: set[str] = set()
        self.events: list[Event] = []

    @rule(wanted=st.lists(st.tuples(PROMPTS, HOWS, st.booleans(), st.booleans()), max_size=3))
    @precondition(lambda self: hasattr(self, "engine"))
    def submit(self, wanted: list[tuple[list[int], Sampling, bool, bool]]) -> None:
        for prompt, how, score, separate in wanted:
            name = str(len(self.asked))
            first = len(prompt) // 2 + 1 if score and len(prompt) > 1 else None
            self.asked[name] = Request(
                id=name, prompt=prompt, how=how, score_from=first, separate=separate
            )
            self.engine.submit(self.asked[name])

    @rule(data=st.data())
    @precondition(lambda self: getattr(self, "asked", None))
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.asked)))
        ended = {event.id for event in self.events if event.finish}
        self.engine.cancel(name)
        self.cancelled |= {name} - ended

    @rule(data=st.data(), paused=st.booleans())
    @precondition(lambda self: getattr(self, "asked", None))
    def pause(self, data: st.DataObject, paused: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.asked)))
        (self.engine.pause if paused else self.engine.resume)(name)

    @rule(steps=st.integers(1, 9))
    @precondition(lambda self: hasattr(self, "engine"))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.events += self.engine.step()

    @invariant()
    @precondition(lambda self: hasattr(self, "engine"))
    def nothing_is_promised_twice(self) -> None:
        assert self.engine.num_running <= 3
        assert self.engine.num_reserved <= self.engine.max_tokens

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for name in self.asked:
            self.engine.resume(name)
        was_idle, empty = self.engine.is_idle, not self.engine.ids()
        last = self.engine.step() if empty else []
        assert was_idle == (empty and not last)
        self.events += last  # of what was cancelled just now
        self.events += self.engine.run([])
        assert self.engine.num_running == self.engine.num_waiting == 0
        assert self.engine.strategy.num_bytes() == 0
        done = _texts(self.events)
        assert done.keys() == self.asked.keys()
        for name, request in self.asked.items():
            if name in self.cancelled:
                assert done[name][1] == "cancelled"
            else:
                alone = _engine(self.model, rows=1)
                assert _texts(alone.run([request])) == {name: done[name]}


Traffic.TestCase.settings = settings(max_examples=10, stateful_step_count=12, deadline=None)
test_company_changes_no_text_and_nothing_leaks = pytest.mark.slow(Traffic.TestCase)


def _request(name: str, prompt: Sequence[int] = (1, 2, 3), **more: Any) -> Request:
    how = Sampling(**{"max_new_tokens": 6, "ends": ()} | more.pop("how", {}))
    return Request(id=name, prompt=prompt, how=how, **more)


def test_a_short_prompt_is_read_in_one_step_and_a_long_one_in_pieces_to_its_end() -> None:
    engine = _engine(chunk=2, whole=5, rows=2)
    engine.submit(_request("running", how={"max_new_tokens": 20}))
    engine.step()
    engine.submit(_request("short", prompt=[1] * 5))
    engine.submit(_request("long", prompt=[2] * 9))
    first = {"short": 0, "long": 0}
    for step in range(1, 20):
        for event in engine.step():
            if event.id in first:
                first[event.id] = first[event.id] or step
    # "long" begins in step 6, in which "short" ends: 1, 2, 2, 2 and 2 of its tokens.
    assert first == {"short": 1, "long": 10}


def test_a_step_reads_one_chunk_and_a_request_is_gone_a_step_after_its_cancel() -> None:
    engine = _engine(chunk=2, rows=2)
    for name in "abc":
        engine.submit(_request(name, prompt=[ord(name) % 5] * 4))
    assert [event.id for _ in range(3) for event in engine.step()] == ["a", "a"]
    assert (engine.num_running, engine.num_waiting) == (2, 1)
    engine.cancel("a")
    engine.cancel("c")
    engine.cancel("never")
    events = engine.step()
    assert [(event.id, event.finish) for event in events[:2]] == [
        ("a", "cancelled"),
        ("c", "cancelled"),
    ]
    assert {event.id for event in engine.run([])} == {"b"}


@pytest.mark.parametrize("chunk", [None, 2])
def test_a_paused_request_stands_still_and_the_others_go_on(chunk: int | None) -> None:
    engine = _engine(MIXED, chunk=chunk, rows=2)
    requests = [_request("slow", [1, 2, 3, 4]), _request("fast", [5]), _request("later", [6])]
    for request in requests:
        engine.submit(request)
    events = engine.step()
    engine.pause("slow")
    engine.pause("never")
    while not engine.is_idle:
        events += engine.step()
    assert engine.has_admitted("slow")
    assert engine.step() == []
    assert {event.id for event in events if event.finish} == {"fast", "later"}
    engine.resume("slow")
    texts = _texts([*events, *engine.run([])])
    assert texts == _texts(_engine(MIXED, rows=1).run(requests))
    assert engine.is_idle


def test_requests_run_in_the_order_of_arrival_within_what_is_reserved() -> None:
    engine = _engine(rows=3, max_tokens=20, max_waiting=3)
    engine.submit(_request("small"))
    engine.step()
    engine.submit(_request("large", prompt=[1] * 14))
    engine.submit(_request("small too"))
    engine.submit(_request("third"))
    with pytest.raises(QueueFull, match="3 requests wait, as many as max_waiting allows"):
        engine.submit(_request("fourth"))
    ended = [event.id for event in engine.run([]) if event.finish]
    assert ended == ["small", "large", "small too", "third"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [1, VOCAB]}, "the prompt has the id 23; those of this model are 0 to 22"),
        ({"prompt": [-1]}, "the prompt has the id -1"),
        ({"prompt": [1] * 25}, "the prompt has 25 tokens, more than the context of 24"),
        ({"prompt": [1] * 20}, "20 tokens and 6 new ones pass the context of 24; ask for fewer"),
        ({"prompt": [1] * 9}, "prompt and new tokens together are 15, more than max_tokens=14"),
        ({"how": {"ends": (99,)}}, "ends has the id 99"),
        ({"how": {"logit_bias": ((-1, 1.0),)}}, "logit_bias has the id -1"),
        ({"how": {"top_logprobs": 24}}, "top_logprobs=24 is more than the vocabulary of 23"),
        ({"score_from": 0}, "score_from=0 must be in 1 to 3"),
        ({"name": "good"}, "a request 'good' is not ended yet"),
    ],
)
def test_a_bad_request_is_refused_and_disturbs_no_other(wrong: Any, message: str) -> None:
    engine = _engine(overflow="refuse", max_tokens=14)
    engine.submit(_request("good"))
    events = engine.step()
    with pytest.raises(ValueError, match=message):
        engine.submit(_request(**{"name": "bad"} | wrong))
    assert _texts([*events, *engine.run([])]) == _texts(_engine().run([_request("good")]))


def test_a_constraint_masks_its_request_and_its_exception_ends_no_other() -> None:
    def digits(ids: Sequence[int]) -> Tensor | None:
        if len(ids) == 2:
            raise KeyError("no rule")
        return torch.arange(VOCAB) == 7 + len(ids)

    requests = [_request("free"), _request("bound", constraint=digits), _request("last")]
    events = list(_engine().run(requests))
    bound = [event for event in events if event.id == "bound"]
    assert [event.ids for event in bound] == [(7,), (8,), ()]
    assert isinstance(bound[-1].error, KeyError)
    others = [event for event in events if event.id != "bound"]
    assert _texts(others) == _texts(_engine().run([_request("free"), _request("last")]))


@torch.no_grad()
@pytest.mark.parametrize("chunk", [None, 3])
def test_scores_of_a_prompt_are_those_of_a_full_pass(chunk: int | None) -> None:
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    expected = torch.log_softmax(MODEL(torch.tensor([prompt]))[0].double(), dim=-1)
    requests = [
        _request("a", prompt, score_from=1, how={"max_new_tokens": 0, "top_logprobs": 2}),
        _request("b", prompt, score_from=6),
    ]
    events = list(_engine(chunk=chunk).run(requests))
    scores = {event.id: event.prompt_scores for event in events if event.prompt_scores}
    for name, first in (("a", 1), ("b", 6)):
        found = scores[name]
        places = range(first - 1, len(prompt) - 1)
        wanted = [float(expected[place, prompt[place + 1]]) for place in places]
        assert found.logprobs == pytest.approx(wanted, abs=1e-5)
        assert list(found.best) == expected[first - 1 : -1].argmax(dim=-1).tolist()
    assert [top[0][0] for top in scores["a"].top] == list(scores["a"].best)
    assert scores["b"].top == ()
    assert [event.finish for event in events if event.id == "a"] == ["length"]
    assert len([event for event in events if event.id == "b"]) == 6


class _Counting(nn.Module):
    """A model that keeps no state, and counts the shapes that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.vocab_size = MODEL, VOCAB
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, tokens: Tensor) -> Tensor:
        self.shapes.append(tuple(tokens.shape))
        return self.inner(tokens)  # type: ignore[no-any-return]


def test_equal_prompts_are_read_once_and_prompts_are_never_padded() -> None:
    model, prompts = _Counting(), [[1, 2, 3], [1, 2, 3], [4, 5, 6], [7]]
    requests = [
        _request(str(i), prompt, how={"max_new_tokens": 4, "sample": i})
        for i, prompt in enumerate(prompts)
    ]
    texts = _texts(_engine(model, rows=4).run(requests))
    assert sorted(model.shapes[:2]) == [(1, 1), (2, 3)]
    assert texts == _texts(_engine(rows=1).run(requests))
    assert texts["0"] != texts["1"]


@pytest.mark.parametrize("model", [MODEL, MIXED])
def test_rows_that_join_and_leave_together_keep_their_own_texts(model: Decoder) -> None:
    engine = _engine(model, rows=4)
    requests = [
        _request(str(i), [i, i + 1, 9 - i], how={"max_new_tokens": length, "temperature": 0.0})
        for i, length in enumerate((12, 3, 6, 3, 9, 9, 9))
    ]
    engine.submit(requests[0])
    events = [event for _ in range(3) for event in engine.step()]
    texts = _texts([*events, *engine.run(requests[1:])])
    assert len(set(texts.values())) == 7
    for request in requests:
        assert _texts(_engine(model, rows=1).run([request]))[request.id] == texts[request.id]


def test_a_fixed_shape_gives_the_same_bits_in_any_company() -> None:
    model = _built(width=64, depth=2)
    prompts = [torch.tensor([i, 2 * i % VOCAB, 5][: 1 + i % 3]) for i in range(4)]
    hows = [Sampling(max_new_tokens=3 + 5 * i, seed=i) for i in range(4)]
    about: Any = {"context": CONTEXT, "decode": _letters, "ends": (), "rows": 3}
    together = generate(model, prompts, hows, **about, invariant=True)
    for index in range(4):
        alone = generate(model, [prompts[index]], hows[index], **about, invariant=True)
        assert alone[0].ids == together[index].ids
        assert alone[0].logprobs == together[index].logprobs


@pytest.mark.parametrize("stored", [None, "int4"])
def test_a_fixed_shape_follows_the_longest_text_and_changes_no_bit(stored: Stored | None) -> None:
    model = _built()
    model.stored = stored
    strategy = Autoregressive(model, context=1000, decode=_letters, fixed_rows=3)
    engine = Engine(strategy, rows=3)
    short = Request(
        id="short", prompt=[1, 2, 3], how=Sampling(max_new_tokens=80, temperature=0.0, ends=())
    )

    def logprobs(*others: Request) -> tuple[list[float], list[int]]:
        for request in (short, *others):
            engine.submit(request)
        nats, sizes = [], []
        while engine.num_running or engine.num_waiting:
            events = [event for event in engine.step() if event.id == "short"]
            nats += [nat for event in events for nat in event.logprobs]
            sizes.append(strategy.num_bytes())
        return nats, sizes

    alone, sizes = logprobs()
    how = Sampling(max_new_tokens=9, temperature=0.0, ends=())
    beside, others = logprobs(Request(id="long", prompt=[5] * 600, how=how))
    assert beside == alone
    assert len(set(sizes[1:-1])) == 2  # 64 tokens, then 128
    assert others[20:-1] == sizes[20:-1]  # as without the long text, once it has gone
    assert max(others) > 2 * max(sizes)


def test_leaving_a_run_cancels_what_it_has_submitted() -> None:
    engine = _engine(rows=1)
    events = engine.run(_request(str(i)) for i in range(50))
    assert next(events).id == "0"
    assert engine.num_waiting <= 1
    events.close()
    assert engine.num_running == engine.num_waiting == engine.strategy.num_bytes() == 0
    assert engine.step() == []


def test_the_largest_chunk_is_found_by_the_callers_clock() -> None:
    assert largest_chunk(lambda tokens: 0.1 * tokens, limit=1.5, most=512) == 14
    assert largest_chunk(lambda tokens: 0.0, limit=1.5, most=100) == 96
    assert largest_chunk(lambda tokens: 9.0, limit=1.5, most=100) == 1
