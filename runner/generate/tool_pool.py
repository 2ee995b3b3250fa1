"""Calls of tools that are under way, each in a thread, with a limit of time.

Python cannot end a thread: a call that passes its limit is abandoned, and its thread, a daemon,
does not keep the process from ending. A tool of which many calls hang is called no more.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Number
from queue import Empty, SimpleQueue
from typing import Any

from runner.generate.tools import Call, Tool, timeout_s
from runner.machine.errors import ConfigError

_IDLE_S = 5.0  # a thread without a call ends after so long
_TOGETHER_S = 0.0005  # answers this near to each other are read in one pass, which takes longer
_MAX_HANGING = 64  # calls of one tool
_PATIENCE_S = 60.0  # of `InTurn`


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
        self._threads = _Threads()
        self._begun = False  # a call, since the last time that answers were collected
        self._hanging: Counter[int] = Counter()  # given up and not ended, by the tool's id()

    @property
    def num_under_way(self) -> int:
        """The number of calls that have not ended."""
        return len(self._under_way)

    def submit(self, id: str, call: Call) -> None:
        """Begin a call of request `id`, which has no other under way."""
        self._under_way[id] = call, self.clock() + timeout_s(call.tool)
        self._begun = True
        hanging = self._hanging[_key(call.tool)]
        if hanging >= _MAX_HANGING:
            why = f"{hanging} earlier calls of this tool hang"
            self._ended.put(Answer(id, call, None, why))
            return
        try:
            self._threads.run(lambda: self._ended.put(_answer(id, call)))
        except RuntimeError as error:  # the system gives no further thread
            self._ended.put(Answer(id, call, None, repr(error)))

    def forget(self, id: str) -> None:
        """Abandon the call of a request; its answer will be dropped."""
        self._give_up(id)

    def collect(self, *, wait: bool = False) -> list[Answer]:
        """Return the calls that have ended since the last time, by answer or by time.

        Where calls have begun since, those that end at once are among them.

        Args:
            wait: until one has, if any is under way, and those that end at the same moment.
        """
        answers: list[Answer] = []
        while True:
            answers += self._arrived()
            answers += self._too_late()
            if answers or not wait or not self._under_way:
                break
            earliest = min(limit for _, limit in self._under_way.values())
            self._wait(max(0.0, earliest - self.clock()), answers)
        together, self._begun = wait or self._begun, False
        while together and self._under_way and self._wait(_TOGETHER_S, answers):
            pass
        self.num_calls += len(answers)
        self.num_failed += sum(answer.text is None for answer in answers)
        return answers

    def _wait(self, seconds: float, answers: list[Answer]) -> bool:
        """Wait for a call to end; return whether one has."""
        try:
            self._take(self._ended.get(timeout=min(seconds, threading.TIMEOUT_MAX)), answers)
        except Empty:
            return False
        return True

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
        else:
            self._hanging[_key(answer.call.tool)] -= 1

    def _too_late(self) -> list[Answer]:
        now = self.clock()
        late = [(id, call) for id, (call, limit) in self._under_way.items() if limit <= now]
        for id, _ in late:
            self._give_up(id)
        return [Answer(id, call, None, "it took too long") for id, call in late]

    def _give_up(self, id: str) -> None:
        given_up = self._under_way.pop(id, None)
        if given_up is not None:
            self._hanging[_key(given_up[0].tool)] += 1


class InTurn(ToolPool):
    """Calls a tool at once and waits for it: what comes next is certain.

    For ranks that must take the same steps, as those of a sharded model. An answer that came too
    late would make another text of the same seed: a tool that hangs ends the run instead.
    """

    def submit(self, id: str, call: Call) -> None:
        """See `ToolPool`.

        Raises:
            ConfigError: the tool has not answered within ten times its limit, or a minute.
        """
        self._under_way[id] = call, float("inf")
        ended = threading.Event()

        def answer() -> None:
            self._ended.put(_answer(id, call))
            ended.set()

        self._threads.run(answer)
        seconds = max(_PATIENCE_S, 10 * timeout_s(call.tool))
        if not ended.wait(min(seconds, threading.TIMEOUT_MAX)):
            raise ConfigError(
                f"{call.tool} has not answered {call.text[:80]!r} within {seconds:.0f} s, and here "
                "no text goes on without its answer; let the tool give up by itself, or leave it "
                "out of tools"
            )


class _Threads:
    """Threads that run one thing after another, as many as are busy at a time."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()
        self._num_idle = 0  # threads that wait for a task, less the tasks that wait for them

    def run(self, task: Callable[[], None]) -> None:
        """Run a task in a thread that is idle, or in a new one."""
        with self._lock:
            idle = self._num_idle > 0
            self._num_idle -= idle
        if idle:
            self._tasks.put(task)
        else:
            threading.Thread(target=self._work, args=(task,), daemon=True).start()

    def _work(self, task: Callable[[], None]) -> None:
        while True:
            task()
            with self._lock:
                self._num_idle += 1
            try:
                task = self._tasks.get(timeout=_IDLE_S)
            except Empty:
                with self._lock:
                    if self._num_idle > 0:  # else a task is on its way to this one
                        self._num_idle -= 1
                        return
                task = self._tasks.get()


def _key(tool: Tool) -> int:
    """Return what tells tools apart."""
    return id(tool)


def _answer(id: str, call: Call) -> Answer:
    try:
        said: Any = call.tool(call.text)
    except BaseException as error:  # whatever a tool raises is its answer, in a thread of its own
        return Answer(id, call, None, repr(error))
    if isinstance(said, bool) or not isinstance(said, str | Number):  # "None" is no answer
        return Answer(id, call, None, f"it returned {type(said).__name__}, not text")
    return Answer(id, call, str(said))
