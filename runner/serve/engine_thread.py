"""The thread that owns the model: it steps the engine, the event loop only asks and listens.

A `Call` is one HTTP request's requests to the engine. Its events come in order through one queue;
while more of them wait there than a reader should leave, its rows stand still and no others.
"""

import asyncio
import math
import os
import queue
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from models.prefix_cache import PrefixCache
from runner.generate.engine import Engine, QueueFull
from runner.generate.request import Event, Request
from runner.generate.speculation import Counts, Speculative
from runner.serve.errors import ApiError, draining
from runner.serve.metrics import Clock, Metrics
from runner.serve.pace import Pace

_RATE_WEIGHT = 0.05  # of the newest step in the measured tokens/s
_LEAD = 4  # steps that the thread may be ahead of the event loop
_HANDOVER_S = 0.002  # the longest that the thread waits for the event loop to take a step's events
_GAUGES_S = 0.1  # between two looks at what the engine holds while it is at work


@dataclass
class _Step:
    """What the engine's thread tells the event loop after a step."""

    events: list[Event]
    admitted: dict[str, float]  # when
    began_at: float
    ended_at: float
    holds: dict[str, float] | None  # by the name of a gauge; None: as before, or about so
    speculated: Counts | None  # since the beginning
    num_tokens: int  # read of prompts, and generated
    has_read: bool  # some of a prompt


class Call:
    """Requests to the engine on their way, and what they have given.

    Attributes:
        ids: of those that have not ended, and their number within the call.
    """

    def __init__(
        self, service: "EngineThread", requests: Sequence[Request], arrived: float
    ) -> None:
        self._service, self.requests = service, requests
        self.ids = {request.id: number for number, request in enumerate(requests)}
        now = time.monotonic()
        self.clocks = [Clock(arrived, now) for _ in requests]
        self._events: asyncio.Queue[tuple[int, Event] | ApiError] = asyncio.Queue()
        self._paused = False
        self._timers: dict[str, asyncio.TimerHandle] = {}

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield (number of the request, event) until all have ended.

        Raises:
            ApiError: what ended the call before.
        """
        left = len(self.requests)
        while left:
            given = await self._events.get()
            if isinstance(given, ApiError):
                raise given
            if self._paused and self._events.qsize() <= self._service.most_pending // 2:
                self._pause(False)
            left -= bool(given[1].finish)
            yield given

    def put(self, number: int, event: Event) -> None:
        """Take an event; it belongs to the event loop."""
        self._events.put_nowait((number, event))
        if event.finish:
            self.ids.pop(event.id, None)
        if not self.ids:
            self._stop_timers()
        elif self._paused and not event.finish:  # it was admitted meanwhile
            self._service.pause(event.id, True)
        elif self._events.qsize() > self._service.most_pending:
            self._pause(True)

    def fail(self, error: ApiError) -> None:
        """End the call by an error; what runs is cancelled."""
        self._events.put_nowait(error)
        self.close()

    def close(self) -> None:
        """Cancel what has not ended; nobody reads it any more."""
        self._stop_timers()
        for id in list(self.ids):
            self._service.cancel(id)
        self.ids.clear()

    def fail_after(self, name: str, seconds: float, error: ApiError) -> None:
        """End the call by an error after so many seconds, unless it has ended."""
        self._timers[name] = asyncio.get_running_loop().call_later(seconds, self.fail, error)

    def _pause(self, paused: bool) -> None:
        self._paused = paused
        for id in self.ids:
            self._service.pause(id, paused)
        if paused:
            limit = self._service.slow_reader_s
            message = f"nothing was read for {limit:g} s; read faster"
            late = ApiError(408, message, code="slow_reader")
            self.fail_after("reader", limit, late)
        elif "reader" in self._timers:
            self._timers.pop("reader").cancel()

    def _stop_timers(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()


@dataclass
class EngineThread:
    """Steps an engine in a thread of its own, from `start` to `stop`.

    All but `engine` belongs to the event loop that `start` is called in.

    Args:
        max_waiting: the most requests that wait for a row.
        most_pending: so many events of a call may wait for its reader; then its rows stand still.
        slow_reader_s: a call that stands still for longer is cancelled.
        pace: how much of a prompt a step reads, by the number of requests that it advances (None:
            the engine's `chunk`).
        prefixes: what the engine keeps of earlier prompts.
    """

    engine: Engine[Any]
    metrics: Metrics
    max_waiting: int
    most_pending: int = 64
    slow_reader_s: float = 30.0
    pace: Pace | None = None
    prefixes: PrefixCache | None = None
    is_draining: bool = False
    tokens_per_s: float = 0.0
    _calls: dict[str, Call] = field(default_factory=dict)
    _orders: "queue.SimpleQueue[Callable[[], object]]" = field(default_factory=queue.SimpleQueue)
    _unadmitted: set[str] = field(default_factory=set)  # of the thread
    _refused: list[Event] = field(default_factory=list)  # of the thread
    _is_running: bool = True
    _looked_at: float = 0.0
    _lead: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(_LEAD))
    _taken: threading.Event = field(default_factory=threading.Event)  # the last step's events are

    def start(self) -> None:
        """Start the thread."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step that it is in."""
        self._orders.put(self._end)
        self._lead.release()  # nothing is delivered while this waits
        self._thread.join()

    @property
    def num_open(self) -> int:
        """The number of requests that wait or run."""
        return len(self._calls)

    def check_draining(self) -> None:
        """Raise ApiError if the server is about to end."""
        if self.is_draining:
            raise draining()

    def check_room(self, number: int) -> None:
        """Raise ApiError if so many requests more can not wait now."""
        self.check_draining()
        waiting = max(0, self.num_open + number - self.engine.rows)
        if waiting > self.max_waiting and self.num_open:
            raise ApiError(
                429,
                f"{self.num_open} requests wait or run, and {self.max_waiting} may wait; try again",
                code="overloaded",
                retry_after_s=self.retry_after_s(),
            )

    def retry_after_s(self) -> int:
        """Return the seconds after which what is queued should have been generated, 1 to 60."""
        owed = sum(
            request.how.max_new_tokens
            for call in {id(call): call for call in self._calls.values()}.values()
            for request in call.requests
            if request.id in call.ids
        )
        return min(60, max(1, math.ceil(owed / self.tokens_per_s))) if self.tokens_per_s else 1

    def submit(self, requests: Sequence[Request], arrived: float) -> Call:
        """Hand requests, which the engine has checked, to the engine.

        Raises:
            ApiError: the server is full, or about to end.
        """
        self.check_room(len(requests))
        call = Call(self, requests, arrived)
        for request in requests:
            self._calls[request.id] = call
            self._orders.put(partial(self._submit, request))
        return call

    def cancel(self, id: str) -> None:
        """Free the row of a request before the next step."""
        call = self._calls.pop(id, None)
        if call is not None:
            number = call.ids[id]
            prompt = len(call.requests[number].prompt)
            self.metrics.ended(call.clocks[number], prompt, "cancelled", time.monotonic())
            self._orders.put(partial(self._cancel, id))

    def pause(self, id: str, paused: bool) -> None:
        """Let a request stand still, or go on."""
        self._orders.put(partial(self.engine.pause if paused else self.engine.resume, id))

    def fail_all(self, error: ApiError) -> None:
        """End all calls by an error."""
        for call in list(self._calls.values()):
            call.fail(error)

    # What follows runs in the thread, but for `_deliver`.

    def _run(self) -> None:
        _let_others_answer_first()
        while self._is_running:
            try:
                while True:
                    idle = self.engine.is_idle and not self._refused and self._is_running
                    self._orders.get(block=idle)()
            except queue.Empty:
                pass
            if not self._is_running:
                return
            step = self._step()
            self._lead.acquire()
            self._taken.clear()
            try:
                self._loop.call_soon_threadsafe(self._deliver, step)
            except RuntimeError:  # the loop is closed
                return
            if step.has_read:
                # It took long; on a shared core its tokens would wait for a slice to end too.
                self._taken.wait(_HANDOVER_S)

    def _end(self) -> None:
        self._is_running = False
        raise queue.Empty

    def _submit(self, request: Request) -> None:
        try:
            self.engine.submit(request)
            self._unadmitted.add(request.id)
        except (ValueError, QueueFull) as error:
            self._refused.append(Event(id=request.id, finish="error", error=error))

    def _cancel(self, id: str) -> None:
        self._unadmitted.discard(id)
        self.engine.cancel(id)

    def _step(self) -> _Step:
        if self.pace is not None:
            waiting = self.engine.num_decoding
            self.engine.chunk, self.engine.whole = self.pace(waiting), self.pace.whole(waiting)
        began, read = time.monotonic(), self.engine.num_read
        try:
            events = self.engine.step()
        except Exception as error:
            events = self._give_up(error)
        events, self._refused = self._refused + events, []
        read = self.engine.num_read - read
        num_tokens = read + sum(len(event.ids) for event in events)
        ended = {event.id for event in events if event.finish}
        seen = {i for i in self._unadmitted if i in ended or self.engine.has_admitted(i)}
        self._unadmitted -= seen
        strategy, ended_at, holds = self.engine.strategy, time.monotonic(), None
        if self.engine.is_idle or ended_at - self._looked_at >= _GAUGES_S:
            holds, self._looked_at = self._holds(), ended_at
        return _Step(
            events,
            dict.fromkeys(seen, began),
            began,
            ended_at,
            holds,
            replace(strategy.counts) if isinstance(strategy, Speculative) else None,
            num_tokens,
            read > 0,
        )

    def _holds(self) -> dict[str, float]:
        engine = self.engine
        return {
            "num_requests_running": engine.num_running,
            "num_requests_waiting": engine.num_waiting,
            "kv_cache_usage_perc": engine.num_reserved / engine.max_tokens,
            "state_bytes": engine.strategy.num_bytes(),
            "prefix_cache_bytes": 0 if self.prefixes is None else self.prefixes.num_bytes(),
        }

    def _give_up(self, error: Exception) -> list[Event]:
        """End every request by the error of a step, which may have left none as it was."""
        ids = self.engine.ids()
        for id in ids:
            self.engine.cancel(id)
        self.engine.step()
        return [Event(id=id, finish="error", error=error) for id in ids]

    def _deliver(self, step: _Step) -> None:
        self._lead.release()
        self._taken.set()
        for id, moment in step.admitted.items():
            if id in self._calls:
                self._clock(id).admitted = moment
        for event in step.events:
            if event.id not in self._calls:  # cancelled meanwhile
                continue
            call, clock = self._calls[event.id], self._clock(event.id)
            number = call.ids[event.id]
            self.metrics.added(clock, event, step.ended_at)
            if event.finish:
                del self._calls[event.id]
                prompt = len(call.requests[number].prompt)
                self.metrics.ended(clock, prompt, event.finish, step.ended_at)
            call.put(number, event)
        self.metrics.stepped(step.holds, step.num_tokens)
        if step.speculated is not None:
            self.metrics.speculated(step.speculated)
        tokens = sum(len(event.ids) for event in step.events)
        if tokens:
            rate = tokens / (step.ended_at - step.began_at)
            weight = _RATE_WEIGHT if self.tokens_per_s else 1.0
            self.tokens_per_s += weight * (rate - self.tokens_per_s)

    def _clock(self, id: str) -> Clock:
        call = self._calls[id]
        return call.clocks[call.ids[id]]


def _let_others_answer_first() -> None:
    """Mark this thread as one that computes: when it wakes it interrupts no other, at its share."""
    if sys.platform == "linux":
        with suppress(OSError):  # forbidden here
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
