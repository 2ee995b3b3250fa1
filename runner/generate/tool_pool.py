"""Calls of tools that are under way, each in a thread, with a limit of time.

Python cannot end a thread: a call that passes its limit is abandoned, and its thread, a daemon,
does not keep the process from ending.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from runner.generate.tools import Call, timeout_s


@dataclass(frozen=True)
class Answer:
    """How a call has ended.

    Args:
        id: of the request.
        text: what the tool said; None if it failed.
        why: what it raised, or that it took too long; "" if it did neither.
    """

    id: str
    call: Call
    text: str | None
    why: str = ""


class ToolPool:
    """Runs the calls of one engine.

    Args:
        clock: seconds; see `time.monotonic`.

    Attributes:
        num_calls, num_failed: calls that have ended, and those of them that gave no answer.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.num_calls = self.num_failed = 0
        self._under_way: dict[str, tuple[Call, float]] = {}  # the call, when it is given up
        self._ended: SimpleQueue[Answer] = SimpleQueue()

    @property
    def num_under_way(self) -> int:
        """The number of calls that have not ended."""
        return len(self._under_way)

    def submit(self, id: str, call: Call) -> None:
        """Begin a call of request `id`, which has no other under way."""
        self._under_way[id] = call, self.clock() + timeout_s(call.tool)
        threading.Thread(target=self._run, args=(id, call), daemon=True).start()

    def forget(self, id: str) -> None:
        """Abandon the call of a request; its answer will be dropped."""
        self._under_way.pop(id, None)

    def collect(self, *, wait: bool = False) -> list[Answer]:
        """Return the calls that have ended since the last time, by answer or by time.

        Args:
            wait: until one has, if any is under way.
        """
        answers: list[Answer] = []
        while True:
            answers += self._arrived()
            answers += self._too_late()
            if answers or not wait or not self._under_way:
                break
            earliest = min(limit for _, limit in self._under_way.values())
            self._wait(max(0.0, earliest - self.clock()), answers)
        self.num_calls += len(answers)
        self.num_failed += sum(answer.text is None for answer in answers)
        return answers

    def _run(self, id: str, call: Call) -> None:
        self._ended.put(_answer(id, call))

    def _wait(self, seconds: float, answers: list[Answer]) -> None:
        try:
            self._take(self._ended.get(timeout=seconds), answers)
        except Empty:
            return

    def _arrived(self) -> list[Answer]:
        answers: list[Answer] = []
        while not self._ended.empty():
            self._take(self._ended.get(), answers)
        return answers

    def _take(self, answer: Answer, answers: list[Answer]) -> None:
        """Keep an answer that is still awaited."""
        awaited = self._under_way.get(answer.id)
        if awaited is not None and awaited[0] is answer.call:
            del self._under_way[answer.id]
            answers.append(answer)

    def _too_late(self) -> list[Answer]:
        now = self.clock()
        late = [(id, call) for id, (call, limit) in self._under_way.items() if limit <= now]
        for id, _ in late:
            del self._under_way[id]
        return [Answer(id, call, None, "it took too long") for id, call in late]


class InTurn(ToolPool):
    """Calls a tool at once and waits for it, however long it takes: what comes next is certain.

    For ranks that must take the same steps, as those of a sharded model.
    """

    def submit(self, id: str, call: Call) -> None:
        """See `ToolPool`."""
        self._under_way[id] = call, float("inf")
        self._ended.put(_answer(id, call))


def _answer(id: str, call: Call) -> Answer:
    try:
        return Answer(id, call, str(call.tool(call.text)))
    except Exception as error:  # whatever a tool raises is its answer
        return Answer(id, call, None, repr(error))
