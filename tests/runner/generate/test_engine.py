"""The engine: what joins and leaves changes no text, nothing leaks, bad requests disturb no one."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor, nn

from models.decoder import Decoder
from models.decoder_config import DecoderConfig
from runner.generate.autoregressive import Autoregressive
from runner.generate.engine import Engine, QueueFull, largest_chunk
from runner.generate.generate import generate
from runner.generate.request import Event, Request
from runner.generate.sampling import Sampling

VOCAB, CONTEXT = 23, 24


def _letters(ids: Iterable[int]) -> str:
    return "".join(chr(97 + index) for index in ids)


def _built(seed: int = 3) -> Decoder:
    model = DecoderConfig(depth=2, width=16, num_heads=2).build(VOCAB, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)  # far from uniform
    return model


MODEL = _built().double()


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
    max_new_tokens=st.integers(0, 40),
    temperature=st.sampled_from([0.0, 1.0, 2.0]),
    top_p=st.sampled_from([None, 0.8]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    stop=st.sampled_from([(), ("ab", "q")]),
    seed=st.integers(0, 3),
    sample=st.integers(0, 1),
)
PROMPTS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=CONTEXT)


class Traffic(RuleBasedStateMachine):
    """Random requests, cancels and steps."""

    @rule(
        chunk=st.sampled_from([None, 1, 5]),
        fixed=st.booleans(),
        most=st.sampled_from([None, CONTEXT + 10]),
    )
    @precondition(lambda self: not hasattr(self, "engine"))
    def start(self, chunk: int | None, fixed: bool, most: int | None) -> None:
        self.engine = _engine(chunk=chunk, max_tokens=most, fixed_rows=3 if fixed else None)
        self.asked: dict[str, Request] = {}
        self.cancelled: set[str] = set()
        self.events: list[Event] = []

    @rule(prompt=PROMPTS, how=HOWS, score=st.booleans(), separate=st.booleans())
    @precondition(lambda self: hasattr(self, "engine"))
    def submit(self, prompt: list[int], how: Sampling, score: bool, separate: bool) -> None:
        name, first = str(len(self.asked)), len(prompt) // 2 + 1 if score else None
        if first is not None and first > len(prompt):
            first = None
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

    @rule(steps=st.integers(1, 12))
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
        self.events += self.engine.run([])
        assert self.engine.num_running == self.engine.num_waiting == 0
        assert self.engine.strategy.num_bytes() == 0
        done = _texts(self.events)
        assert done.keys() == self.asked.keys()
        for name, request in self.asked.items():
            if name in self.cancelled:
                assert done[name][1] == "cancelled"
            else:
                alone = _engine(rows=1)
                assert _texts(alone.run([request])) == {name: done[name]}


Traffic.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
test_company_changes_no_text_and_nothing_leaks = Traffic.TestCase
