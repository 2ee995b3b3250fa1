"""The thread of the engine without HTTP: readers that are slow, leave or come too late."""

import asyncio
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from models.decoder_config import DecoderConfig
from runner.generate.autoregressive import Autoregressive
from runner.generate.drafts import DraftModel
from runner.generate.engine import Engine
from runner.generate.request import Event, Request
from runner.generate.sampling import Sampling
from runner.generate.speculation import Speculative
from runner.serve.engine_thread import _LEAD, Call, EngineThread
from runner.serve.errors import ApiError
from runner.serve.metrics import Metrics
from runner.serve.pace import Pace

VOCAB, CONTEXT = 23, 64
MODEL = DecoderConfig(depth=1, width=16, num_heads=2).build(VOCAB, 3)


def _thread(**more: Any) -> EngineThread:
    strategy = Autoregressive(MODEL, context=CONTEXT, decode=lambda ids: "x" * len(ids))
    engine = Engine(strategy, rows=2, chunk=4)
    given = {"max_waiting": 2, "most_pending": 8} | more
    return EngineThread(engine, Metrics("m"), **given)


def _requests(*names: str, new: int = 40) -> list[Request]:
    how = Sampling(max_new_tokens=new, ends=())
    return [Request(id=name, prompt=[1, 2, 3], how=how) for name in names]


def _run(thread: EngineThread, work: Callable[[], Awaitable[None]]) -> None:
    """Run `work` beside the thread; nothing is left behind it."""

    async def both() -> None:
        thread.start()
        await work()
        thread.stop()  # after what it was told before: cancels

    asyncio.run(both())
    assert thread.num_open == 0
    assert thread.engine.strategy.num_bytes() == 0


async def _rest(events: AsyncIterator[tuple[int, Event]]) -> list[Event]:
    return [event async for _, event in events]


async def _all(call: Call) -> list[Event]:
    return await _rest(aiter(call))


def _submit(thread: EngineThread, requests: Sequence[Request]) -> Call:
    return thread.submit(requests, time.monotonic())


def test_a_slow_reader_stands_still_alone_and_goes_on_when_it_reads() -> None:
    thread = _thread(slow_reader_s=1e6)

    async def work() -> None:
        slow = _submit(thread, _requests("slow"))
        for name in "abcd":
            events = await _all(_submit(thread, _requests(name)))
            assert len(events) == 40
        # While the others had 160 tokens, the slow one's events stopped above what may wait.
        assert 8 < slow._events.qsize() <= 8 + 2 * (_LEAD + 2)
        assert thread.engine.has_admitted("slow")
        assert len(await _all(slow)) == 40

    _run(thread, work)


def test_who_reads_nothing_is_cancelled_and_told_why() -> None:
    thread = _thread(slow_reader_s=0.01)

    async def work() -> None:
        call = _submit(thread, _requests("slow"))
        while call.ids:
            await asyncio.sleep(0.001)
        with pytest.raises(ApiError, match=r"nothing was read for 0.01 s") as caught:
            await _all(call)
        assert caught.value.status == 408

    _run(thread, work)


def test_a_call_that_is_closed_late_or_full_leaves_nothing_behind() -> None:
    thread = _thread()

    async def work() -> None:
        left = _submit(thread, _requests("a", "b", "c"))
        async for _ in left:
            break
        left.close()
        late = _submit(thread, _requests("late"))
        late.fail_after("deadline", 0.0, ApiError(408, "too late"))
        with pytest.raises(ApiError, match="too late"):
            await _all(late)
        calls = [_submit(thread, _requests(f"{i}", f"{i}'")) for i in range(2)]
        with pytest.raises(ApiError, match="4 requests wait or run, and 2 may wait") as full:
            _submit(thread, _requests("one too many"))
        assert full.value.status == 429
        assert int(full.value.headers["Retry-After"]) >= 1
        for call in calls:
            assert len(await _all(call)) == 80
        # A call that alone is more than may wait is not refused for ever.
        many = await _all(_submit(thread, _requests(*"abcdefgh", new=2)))
        assert len(many) == 16
        thread.is_draining = True
        with pytest.raises(ApiError, match="about to end"):
            _submit(thread, _requests("after"))

    _run(thread, work)
    text = thread.metrics.text().decode()
    for reason, number in {"cancelled": 4.0, "length": 12.0}.items():
        line = f'request_success_total{{finished_reason="{reason}",model_name="m"}} {number}'
        assert line in text, text


def test_a_prompt_is_read_in_small_pieces_only_while_others_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pace = Pace({0: 64, 1: 4, 2: 2})
    thread = _thread(pace=pace)
    strategy, pieces = thread.engine.strategy, []
    read, both = strategy.read, strategy.advance_and_read

    def noted(rows: Any, most: int | None) -> list[Event]:
        pieces.append(most)
        return read(rows, most)  # type: ignore[no-any-return]

    def noted_too(rows: Any, unread: Any, most: int) -> Any:
        pieces.append(most)
        return both(rows, unread, most)

    monkeypatch.setattr(strategy, "read", noted)
    monkeypatch.setattr(strategy, "advance_and_read", noted_too)

    async def work() -> None:
        first = aiter(_submit(thread, _requests("first")))
        await anext(first)
        (long,) = _requests("second")
        second = _submit(thread, [replace(long, prompt=[1] * 20)])
        rest, whole = await asyncio.gather(_rest(first), _all(second))
        assert (len(rest), len(whole)) == (39, 40)
        longer = aiter(_submit(thread, [replace(long, id="third", prompt=[1] * 3)]))
        await anext(longer)
        await _all(_submit(thread, [replace(long, id="fourth", prompt=[1] * 21)]))
        await _rest(longer)

    _run(thread, work)
    assert pieces == [64, 20, 64, 2, *[4] * 5]  # 20 tokens are short enough to be read at once
    assert [pace(waiting) for waiting in (1, 2, 9)] == [4, 2, 2]
    assert [pace.whole(waiting) for waiting in (1, 2, 9)] == [20, 10, 10]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no policy for batches")
def test_the_engine_interrupts_no_thread_that_answers() -> None:
    thread, policies = _thread(), set[int]()
    step = thread.engine.step

    def noted() -> list[Event]:
        policies.add(os.sched_getscheduler(0))
        return step()

    thread.engine.step = noted  # type: ignore[method-assign]

    async def work() -> None:
        await _all(_submit(thread, _requests("a", new=2)))

    _run(thread, work)
    assert policies == {os.SCHED_BATCH}
    assert os.sched_getscheduler(0) != os.SCHED_BATCH


def test_a_step_that_fails_ends_its_requests_and_not_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    thread = _thread()
    advance, fails = thread.engine.strategy.advance, [True]

    def broken(rows: Any) -> list[Event]:
        if fails.pop():
            raise RuntimeError("out of memory")
        fails.append(False)
        return advance(rows)  # type: ignore[no-any-return]

    monkeypatch.setattr(thread.engine.strategy, "advance", broken)

    async def work() -> None:
        events = await _all(_submit(thread, _requests("a", "b", "c")))
        errors = [event for event in events if event.finish]
        assert {event.id for event in errors} == {"a", "b", "c"}
        assert all(isinstance(event.error, RuntimeError) for event in errors)
        fails.append(False)
        assert len(await _all(_submit(thread, _requests("d")))) == 40

    _run(thread, work)


def test_metrics_count_what_a_draft_proposes_and_what_of_it_is_accepted() -> None:
    strategy = Autoregressive(MODEL, context=CONTEXT, decode=lambda ids: "x" * len(ids))
    speculative = Speculative(strategy, DraftModel(MODEL, CONTEXT), length=3)
    engine = Engine(speculative, rows=2, chunk=4)
    thread = EngineThread(engine, Metrics("m", speculates=True), max_waiting=2)
    assert set(_speculated(thread).values()) == {0.0}

    async def work() -> None:
        await _all(_submit(thread, _requests("a", "b", new=21)))

    _run(thread, work)
    # A draft equal to the model is always right: the first token comes with the prompt, and a
    # round gives 3 proposed tokens and one more.
    assert _speculated(thread) == {"drafts": 10.0, "draft_tokens": 30.0, "accepted_tokens": 30.0}
    assert "spec_decode" not in _thread().metrics.text().decode()


def _speculated(thread: EngineThread) -> dict[str, float]:
    text = thread.metrics.text().decode()
    found = re.findall(r"^espalier:spec_decode_num_(\w+)_total\S* (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}
