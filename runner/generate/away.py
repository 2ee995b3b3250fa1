"""The rows of an engine that wait for tools, and those whose answers have come."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from runner.generate.request import Event, Request
from runner.generate.tool_pool import ToolPool


class Away:
    """Rows that have left the batch.

    Args:
        strategy: with `leave(row)` and `resume(row, ids)`, see `Autoregressive`.
        pool: runs the calls.
    """

    def __init__(self, strategy: Any, pool: ToolPool) -> None:
        self.strategy, self.pool = strategy, pool
        self._rows: dict[str, Any] = {}
        self._back: deque[tuple[Any, Sequence[int]]] = deque()

    def __len__(self) -> int:
        return len(self._rows) + len(self._back)

    def __contains__(self, id: object) -> bool:
        return id in set(self.ids())

    def ids(self) -> Iterator[str]:
        """Yield the names of the requests whose rows are away."""
        yield from self._rows
        yield from (row.request.id for row, _ in self._back)

    def send(self, row: Any, event: Event) -> None:
        """Let a row wait for the call that an event of it makes."""
        assert event.call is not None
        self.strategy.leave(row)
        self._rows[event.id] = row
        self.pool.submit(event.id, event.call)

    def receive(self, *, wait: bool = False) -> None:
        """Take the answers that have come; with `wait`, until one has."""
        for answer in self.pool.collect(wait=wait and not self._back):
            row = self._rows.pop(answer.id)
            self._back.append((row, row.request.tools.answer(answer.call, answer.text)))

    @property
    def next(self) -> Request | None:
        """The request whose row comes back next; None if no answer is there."""
        return self._back[0][0].request if self._back else None

    def bring_back(self) -> tuple[Any, Event]:
        """Return the row that comes back next, and the event of its answer."""
        row, ids = self._back.popleft()
        return row, self.strategy.resume(row, ids)

    def forget(self, id: str) -> Any:
        """Drop a request; return its row, None if it is not away."""
        self.pool.forget(id)
        for entry in self._back:
            if entry[0].request.id == id:
                self._back.remove(entry)
                return entry[0]
        return self._rows.pop(id, None)
