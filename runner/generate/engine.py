"""The generation engine: requests join and leave a running batch between its steps.

It has neither thread nor clock (those of tools are in their pool): whoever holds it calls `step`.
What a step computes is the business of a `Strategy`; the engine decides which requests take part.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Generic, Literal, Protocol, TypeVar, runtime_checkable

from runner.generate.away import Away
from runner.generate.request import Event, Request
from runner.generate.tool_pool import ToolPool

Overflow = Literal["refuse", "reread"]


@runtime_checkable
class Row(Protocol):
    """A request that a strategy has admitted."""

    request: Request

    @property
    def unread(self) -> int:
        """The number of tokens to read before the row can advance."""
        ...


R = TypeVar("R", bound=Row)
T = TypeVar("T")
Given = TypeVar("Given", bound=Row, contravariant=True)


@runtime_checkable
class Strategy(Protocol[R]):
    """How rows advance: token by token, by speculation, by denoising.

    An event with a `finish` is the last of its row; the engine then releases the row.

    Args:
        context: the most tokens that the model reads.
    """

    context: int

    def check(self, request: Request) -> None:
        """Raise ValueError if the request cannot be done, whatever else runs."""
        ...

    def admit(self, request: Request) -> R:
        """Return the row of a request, with its prompt unread."""
        ...

    def read(self, rows: Sequence[R], most: int | None) -> list[Event]:
        """Read unread tokens, and join the rows that are read; they may have an event at once.

        Args:
            most: read at most so many, of the first row and those with the same text (None: all
                unread tokens of all rows).
        """
        ...

    def advance(self, rows: Sequence[R]) -> list[Event]:
        """Take one step with rows that are read; the others stay as they are, bit for bit.

        A row that outgrows the context has unread tokens again.
        """
        ...

    def release(self, row: R) -> None:
        """Forget a row and give back its memory."""
        ...

    def num_bytes(self) -> int:
        """Return the size of the state of all rows; 0 if there is none."""
        ...


@runtime_checkable
class ReadsBeside(Protocol[Given]):
    """A strategy that can advance rows and read of another in one pass, which costs less."""

    def advance_and_read(
        self, rows: Sequence[Given], unread: Sequence[Given], most: int
    ) -> list[Event] | None:
        """Do what `advance` and then `read` would; None: it cannot, and has done nothing."""
        ...


class QueueFull(RuntimeError):
    """As many requests wait as may; submit again after some steps."""


class Engine(Generic[R]):
    """Runs requests in the order of their arrival, as many at a time as fit.

    A request is admitted once a row is free and its prompt and `max_new_tokens` fit beside those
    of the requests that run: what runs is never interrupted for want of memory. Its ids do not
    depend on what else runs, but for `Event.near_ties` in fp32.

    A request that calls a tool leaves the batch, and another takes its row; with the answer, which
    is read in one pass, it comes back before those that wait. When an answer comes changes no text.
    A step blocks where all that run wait for tools.

    Args:
        strategy: computes; it belongs to this engine alone.
        rows: the most requests that run at a time.
        max_tokens: the most tokens of all running requests together, prompts and new ones
            (None: `rows` contexts).
        chunk: the most tokens of a prompt that one step reads, so that the others wait no longer
            than that; see `largest_chunk`. None reads the prompts of all that are admitted whole,
            before the others go on: for throughput.
        whole: a prompt of no more tokens is read in one step nevertheless, since a step more costs
            more than its tokens (None: `chunk`). A longer one begins with half a `chunk`.
        overflow: of a text that outgrows the context: refuse the request, or read the last half of
            the context again and go on from there.
        max_waiting: the most requests that wait (None: any number).
        max_away: the most requests that wait for tools beside those of `rows` (None: `rows`). Their
            tokens do not count among `max_tokens`.
        pool: runs the calls of tools (None: one of its own).

    Raises:
        ValueError: a number is below 1.
    """

    def __init__(
        self,
        strategy: Strategy[R],
        *,
        rows: int,
        max_tokens: int | None = None,
        chunk: int | None = None,
        whole: int | None = None,
        overflow: Overflow = "refuse",
        max_waiting: int | None = None,
        max_away: int | None = None,
        pool: ToolPool | None = None,
    ) -> None:
        limits = {"rows": rows, "max_tokens": max_tokens, "chunk": chunk, "max_away": max_away}
        limits |= {"whole": whole}
        for name, value in (limits | {"max_waiting": max_waiting}).items():
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.strategy, self.rows, self.overflow = strategy, rows, overflow
        self._beside = strategy if isinstance(strategy, ReadsBeside) else None
        self.chunk, self.whole = chunk, whole
        self._in_pieces: R | None = None
        self.max_tokens = rows * strategy.context if max_tokens is None else max_tokens
        self.max_waiting = max_waiting
        self.max_away = rows if max_away is None else max_away
        self.away = Away(strategy, ToolPool() if pool is None else pool)
        self._waiting: deque[Request] = deque()
        self._admitted: dict[str, R] = {}
        self._paused: set[str] = set()
        self._ended: list[Event] = []  # outside a step
        self.num_read = 0  # tokens of prompts and of tools' answers, since the beginning

    @property
    def num_running(self) -> int:
        """The number of requests admitted."""
        return len(self._admitted)

    @property
    def num_decoding(self) -> int:
        """The number of requests that the next step advances."""
        return sum(not row.unread for row in self._unpaused())

    @property
    def num_away(self) -> int:
        """The number of requests that wait for tools."""
        return len(self.away)

    @property
    def num_waiting(self) -> int:
        """The number of requests submitted and not admitted."""
        return len(self._waiting)

    @property
    def num_reserved(self) -> int:
        """The number of tokens that the running requests may come to hold."""
        return sum(self._needs(row.request) for row in self._admitted.values())

    @property
    def is_idle(self) -> bool:
        """Whether a step would do nothing: all that run are paused, and no other can join."""
        if self._ended or self.away or self._next_fits():
            return False
        return self._admitted.keys() <= self._paused

    def ids(self) -> list[str]:
        """Return the ids of the requests that wait, run or are away for a tool."""
        waiting = (request.id for request in self._waiting)
        return [*waiting, *self._admitted, *self.away.ids()]

    def has_admitted(self, id: str) -> bool:
        """Return whether a request runs: it waits no longer and has not ended."""
        return id in self._admitted

    def check(self, request: Request) -> None:
        """Raise ValueError if the request can never run here: its prompt, length or settings."""
        self.strategy.check(request)
        prompt, new = request.num_read, request.how.max_new_tokens
        context = self.strategy.context
        if prompt > context:
            raise ValueError(
                f"the prompt has {prompt} tokens, more than the context of {context}; shorten it, "
                "or let it slide (only the end is read)"
            )
        if self.overflow == "refuse" and prompt + new > context:
            raise ValueError(
                f"a prompt of {prompt} tokens and {new} new ones pass the context of {context}; "
                "ask for fewer tokens, shorten the prompt, or use overflow='reread'"
            )
        if self._needs(request) > self.max_tokens:
            raise ValueError(
                f"prompt and new tokens together are {self._needs(request)}, more than "
                f"max_tokens={self.max_tokens} of all requests; ask for fewer, or raise it"
            )

    def submit(self, request: Request) -> None:
        """Put a request behind those that wait; a refused one disturbs no other.

        Raises:
            ValueError: it can never run here, or its id is that of a request that waits or runs.
            QueueFull: `max_waiting` requests wait.
        """
        waits = any(r.id == request.id for r in self._waiting)
        if waits or request.id in self._admitted or request.id in self.away:
            raise ValueError(f"a request {request.id!r} is not ended yet; give another id")
        self.check(request)
        if self.max_waiting is not None and len(self._waiting) >= self.max_waiting:
            raise QueueFull(
                f"{len(self._waiting)} requests wait, as many as max_waiting allows; submit "
                f"{request.id!r} again after some steps"
            )
        self._waiting.append(request)

    def cancel(self, id: str) -> None:
        """End a request now; the next step returns its last event. An ended one is left alone."""
        row = self._admitted.pop(id, None) or self.away.forget(id)
        self._paused.discard(id)
        if row is not None:
            self.strategy.release(row)
        waiting = next((request for request in self._waiting if request.id == id), None)
        if waiting is not None:
            self._waiting.remove(waiting)
        if row is not None or waiting is not None:
            self._ended.append(Event(id=id, finish="cancelled"))

    def pause(self, id: str) -> None:
        """Let an admitted request stand still, for a reader that is slow; it keeps its row."""
        if id in self._admitted:
            self._paused.add(id)

    def resume(self, id: str) -> None:
        """Let a paused request go on; any other is left alone."""
        self._paused.discard(id)

    def step(self) -> list[Event]:
        """Advance every running row by one step, then read of the prompts what `chunk` allows.

        It returns what that has added, in the order of admission, and [] if there is nothing to do.
        """
        events, self._ended = self._ended, []
        if self.chunk is not None and self._beside is not None:
            self.away.receive()
            events += self._admit()
            together = self._advance_and_read(self._beside)
            if together is not None:
                return events + together
        running = [row for row in self._unpaused() if not row.unread]
        if running:
            events += self._settle(self.strategy.advance(running))
        self.away.receive()
        events += self._admit()
        if not events and not self._admitted and self.away:
            self.away.receive(wait=True)
            events += self._admit()
        unread = [row for row in self._unpaused() if row.unread]
        if unread:
            events += self._settle(
                self._counted(unread, lambda: self.strategy.read(unread, self._most(unread)))
            )
        return events

    def _most(self, unread: Sequence[R]) -> int | None:
        """Return how many tokens to read of the first of these prompts."""
        first = unread[0]
        if self.chunk is None or self.whole is None:
            return self.chunk
        if first.unread > self.whole and first is not self._in_pieces:
            self._in_pieces = first  # to its end: the last one holds nobody up for longer
            return max(1, self.chunk // 2)  # to begin takes time too
        return self.chunk if first is self._in_pieces else max(self.chunk, first.unread)

    def _advance_and_read(self, strategy: ReadsBeside[R]) -> list[Event] | None:
        """Take a step in one forward pass; None if there are not both, texts and a prompt."""
        running = [row for row in self._unpaused() if not row.unread]
        unread = [row for row in self._unpaused() if row.unread]
        if not (running and unread):
            return None
        most = self._most(unread)
        assert most is not None
        events = self._counted(unread, lambda: strategy.advance_and_read(running, unread, most))
        return None if events is None else self._settle(events)

    def _counted(self, unread: Sequence[R], read: Callable[[], T]) -> T:
        """Return what `read` returns; count what it has read of `unread`."""
        before = sum(row.unread for row in unread)
        result = read()
        self.num_read += before - sum(row.unread for row in unread)
        return result

    def run(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Yield the events of requests, taken from `requests` no sooner than they are needed.

        If it is closed or fails, whatever the engine holds is cancelled.

        Raises:
            ValueError: a request is refused; those before it have not ended.
        """
        left = iter(requests)
        try:
            while True:
                for request in islice(left, max(0, self.rows - self.num_waiting)):
                    self.submit(request)
                if not (self._waiting or self._admitted or self._ended or self.away):
                    return
                yield from self.step()
        finally:
            for id in self.ids():
                self.cancel(id)
            self._ended = []

    def _needs(self, request: Request) -> int:
        needed = request.num_read + request.how.max_new_tokens
        return min(needed, self.strategy.context)

    def _unpaused(self) -> list[R]:
        return [row for id, row in self._admitted.items() if id not in self._paused]

    def _next_fits(self) -> bool:
        """Return whether the request that has waited longest can be admitted."""
        return bool(self._waiting) and self._fits(self._waiting[0])

    def _admit(self) -> list[Event]:
        """Let come back whose answers are there, then admit those that wait, as far as they fit."""
        events: list[Event] = []
        while self._fits(self.away.next):
            row, event = self.away.bring_back()
            self._admitted[event.id] = row
            events += self._settle([event])
        while self.away.next is None and len(self.away) < self.max_away:
            if not self._next_fits():
                break
            request = self._waiting.popleft()
            self._admitted[request.id] = self.strategy.admit(request)
        return events

    def _fits(self, request: Request | None) -> bool:
        if request is None or len(self._admitted) >= self.rows:
            return False
        return self.num_reserved + self._needs(request) <= self.max_tokens

    def _settle(self, events: list[Event]) -> list[Event]:
        """Release the rows whose last event is among `events`; let go those that call a tool."""
        for event in events:
            if event.finish:
                self._paused.discard(event.id)
                self.strategy.release(self._admitted.pop(event.id))
            elif event.call is not None:
                self.away.send(self._admitted.pop(event.id), event)
        return events


def largest_chunk(measure: Callable[[int], float], limit: float, most: int) -> int:
    """Return the most tokens for which `measure` gives at most `limit`, to within a quarter.

    Args:
        measure: what a step that reads so many tokens of a prompt takes, by the caller's clock.
        limit: in the same unit: 1.5 plain steps, say.
        most: the largest that is tried.
    """
    chunk = 1
    while 2 * chunk <= most and measure(2 * chunk) <= limit:
        chunk *= 2
    for more in (chunk // 2, chunk // 4):
        if more and chunk + more <= most and measure(chunk + more) <= limit:
            chunk += more
    return chunk
