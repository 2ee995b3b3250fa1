"""How much of a prompt is read while other texts wait for their next token: measured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from runner.generate.engine import Engine, largest_chunk
from runner.generate.request import Request
from runner.generate.sampling import Sampling

# Of a step that reads the first piece of a prompt too, to one that does not; later pieces attend to
# more and take a quarter longer: 95% of the gaps between tokens are below 2.5 then.
_STEPS = 1.75
_TIMED = 6  # steps of each kind, of which the fastest counts
TIMED_TOKENS = 2 * _TIMED + 2  # of a text that is timed: a context must be longer


@dataclass(frozen=True)
class Pace:
    """How many tokens of a prompt are read while others wait for their next token.

    Args:
        chunks: by the number of those that wait.
    """

    chunks: Mapping[int, int]

    def __call__(self, waiting: int) -> int:
        """Return the most tokens: those of the largest number measured up to `waiting`."""
        return self.chunks[max(number for number in self.chunks if number <= waiting)]

    def whole(self, waiting: int) -> int:
        """Return how many tokens of a prompt, if it has no more, are read in one step.

        Those that wait then do so once for as long as five small pieces make them wait, which
        would take more time in all.
        """
        return 5 * self(waiting)


def measured_pace(engine: Engine[Any], vocab: int, most: int, clock: Callable[[], float]) -> Pace:
    """Return the pace at which a step that reads of a prompt takes `_STEPS` of those that do not.

    Args:
        engine: it is idle; its `chunk` is `most`.
        vocab: ids of its model.
        most: the most tokens of a piece.
        clock: returns seconds.
    """
    chunks, running = {0: most}, 1
    while running < engine.rows:  # the last row is the prompt's
        steps = partial(_steps_of, engine, vocab, running, clock)
        # As many tokens as rows are a step's work, whatever a busy machine says.
        least = min(running, most)
        chunks[running] = max(least, largest_chunk(steps, _STEPS, most))
        running *= 2
    return Pace(chunks)


def _steps_of(
    engine: Engine[Any], vocab: int, running: int, clock: Callable[[], float], tokens: int
) -> float:
    """Return what a step of so many texts that reads so many tokens of another one too takes.

    In steps that do not. They are taken in turns: what slows the machine down strikes both.
    """
    how = Sampling(max_new_tokens=TIMED_TOKENS, temperature=0.0, ends=())
    for index in range(running):
        engine.submit(Request(id=f"row {index}", prompt=[index % vocab], how=how))
    while engine.num_decoding < running:
        engine.step()
    once = Sampling(max_new_tokens=1, temperature=0.0)
    plain: list[float] = []
    reading: list[float] = []
    for number in range(_TIMED):
        prompt = [number % vocab] * tokens
        for seconds in (plain, reading):
            if seconds is reading:
                engine.submit(Request(id=f"prompt {number}", prompt=prompt, how=once))
            begin = clock()
            engine.step()
            seconds.append(clock() - begin)
    for id in engine.ids():
        engine.cancel(id)
    engine.step()
    return min(reading) / min(plain)
