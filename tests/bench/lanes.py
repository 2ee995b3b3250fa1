"""Lanes that call tools: tokens a second with waiting lanes out of the batch, and waited for.

    python -m tests.bench.lanes [--size 10M] [--lanes 1 4 16 64] [--delay-ms 0 50 500] [--rounds 3]

A lane calls a tool after every 16 tokens, which sleeps and answers with 8. Asynchronous: a lane
that waits leaves the batch. Synchronous: no step is taken while a lane waits. Beside both stands
what a simulation of the queue foretells: measured / foretold should be within 15% of 1. Its costs
(a step and a pass over answers, each by the number of lanes, and a lane that leaves) are measured
within the engine in the run beside which it stands, so that other work on the machine slows both;
who runs and who waits, when, is the simulation's own. The median over rounds is shown, and the
range of the ratios.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mean, median

import numpy as np
import torch

from models.language_model import LanguageModel
from runner.generate.autoregressive import Autoregressive
from runner.generate.engine import Engine
from runner.generate.request import Event, Request
from runner.generate.sampling import Sampling
from runner.generate.text_row import TextRow
from runner.generate.tool_pool import _TOGETHER_S
from runner.generate.tools import Call, Tools
from tests.bench.generate import SIZES, both_models

BETWEEN, ANSWER, PROMPT, TOKENS = 16, 8, 16, 96


class Numbers:
    """A tokenizer of numbers: 7 7 7."""

    def encode(self, text: str) -> np.ndarray:
        return np.array([int(word) for word in text.split()])


@dataclass
class Sleeps:
    """A tool that sleeps and says eight tokens."""

    seconds: float
    timeout_s: float = 60.0

    def __call__(self, text: str) -> str:
        time.sleep(self.seconds)
        return "7 " * ANSWER

    def find(self, turn: Sequence[int]) -> Call | None:
        return Call(self, "") if len(turn) == BETWEEN else None


class Timed(Autoregressive):
    """Notes (lanes, seconds) of each step, each pass over answers, and each lane that leaves."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__(model, context=1024, decode=lambda _: "")
        self.steps: list[tuple[int, float]] = []
        self.answers: list[tuple[int, float]] = []
        self.leaves: list[tuple[int, float]] = []

    def advance(self, rows: Sequence[TextRow]) -> list[Event]:
        with timed(self.steps, len(rows)):
            return super().advance(rows)

    def read(self, rows: Sequence[TextRow], most: int | None) -> list[Event]:
        with timed(self.answers, len(rows)):
            return super().read(rows, most)

    def leave(self, row: TextRow) -> None:
        with timed(self.leaves, 1):
            super().leave(row)

    def costs(self) -> "Costs":
        """Return the mean seconds by the number of lanes, straight between those that occurred."""
        step, answer, call = (by_lanes(s) for s in (self.steps, self.answers, self.leaves))
        return Costs(step=step, answer=answer, call=call(1))


@contextmanager
def timed(notes: list[tuple[int, float]], lanes: int) -> Iterator[None]:
    """Note the seconds of what is done within."""
    begun = time.perf_counter()
    yield
    notes.append((lanes, time.perf_counter() - begun))


def by_lanes(notes: Sequence[tuple[int, float]]) -> Callable[[int], float]:
    """Return the mean seconds as a function of the number of lanes."""
    rows = sorted({lanes for lanes, _ in notes})
    means = [mean(seconds for lanes, seconds in notes if lanes == count) for count in rows]
    return lambda count: float(np.interp(count, rows, means))


@dataclass(frozen=True)
class Costs:
    """Seconds by the number of lanes that take part.

    Args:
        step, answer: of a step, and of a pass over answers.
        call: of one lane that leaves.
    """

    step: Callable[[int], float]
    answer: Callable[[int], float]
    call: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="10M")
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--delay-ms", type=float, nargs="+", default=[0, 50, 500])
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    model = both_models(given.size)[0].for_inference()
    a_run(model, 4, 0.0, waits=True)  # the first passes set up what later ones find
    print(
        "| lanes | delay (ms) | asynchronous (tokens/s) | / foretold | synchronous | / foretold |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for lanes in given.lanes:
        for delay in given.delay_ms:
            rounds = [
                [a_run(model, lanes, delay / 1000, waits=waits) for waits in (False, True)]
                for _ in range(given.rounds)
            ]
            cells = []
            for rates in zip(*rounds, strict=True):
                ratios = sorted(measured / foretold for measured, foretold in rates)
                cells.append(f"{median(measured for measured, _ in rates):.0f}")
                cells.append(f"{median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})")
            print(f"| {lanes} | {delay:g} | {' | '.join(cells)} |", flush=True)
    print(f"load of the last minute: {os.getloadavg()[0]:.1f}")


def a_run(model: LanguageModel, lanes: int, delay: float, *, waits: bool) -> tuple[float, float]:
    """Return (measured, foretold) tokens/s of lanes from their first step; prompts are read."""
    strategy = Timed(model)
    engine = loaded(strategy, lanes, delay)
    strategy.answers.clear()  # the prompts
    begun = time.perf_counter()
    while engine.num_running or engine.num_away:
        while waits and engine.away.pool.num_under_way:
            engine.away.receive(wait=True)
        engine.step()
    took = time.perf_counter() - begun
    foretold = simulate(lanes, delay, strategy.costs(), waits=waits)
    return lanes * TOKENS / took, lanes * TOKENS / foretold


def loaded(strategy: Timed, lanes: int, delay: float) -> Engine[TextRow]:
    """Return an engine whose lanes have read their prompts; its tool sleeps `delay` seconds."""
    tools = Tools([Sleeps(delay)], Numbers(), max_calls=TOKENS)
    engine = Engine(strategy, rows=lanes, max_away=lanes)
    for number in range(lanes):
        prompt = torch.randint(0, 9999, (PROMPT,), generator=torch.Generator().manual_seed(number))
        how = Sampling(max_new_tokens=TOKENS + 1, temperature=0.0, ends=())
        engine.submit(Request(id=str(number), prompt=prompt.tolist(), how=how, tools=tools))
    engine.step()
    return engine


def simulate(lanes: int, delay: float, costs: Costs, *, waits: bool) -> float:
    """Return the seconds that a queue of lanes takes: a step at a time, each at its cost."""
    now, written, turn = 0.0, [1] * lanes, [1] * lanes  # the prompt's pass has given one
    running, back = set(range(lanes)), dict[int, float]()
    while running or back:
        if running:
            now += costs.step(len(running))
        for lane in sorted(running):
            written[lane] += 1
            turn[lane] += 1
            if written[lane] > TOKENS:
                running.discard(lane)
            elif turn[lane] == BETWEEN:
                running.discard(lane)
                now += costs.call
                back[lane] = now + delay
        if back and waits:
            now = max(now, *back.values())
        elif back and not running:
            now = together(now, sorted(back.values()))
        come = [lane for lane, when in back.items() if when <= now]
        for lane in come:
            del back[lane]
            written[lane], turn[lane] = written[lane] + ANSWER, 0
        going = [lane for lane in come if written[lane] <= TOKENS]
        if going:
            now += costs.answer(len(going))
            for lane in going:  # the pass over the answer gives the next token
                written[lane], turn[lane] = written[lane] + 1, 1
        running |= {lane for lane in going if written[lane] <= TOKENS}
    return now


def together(now: float, answers: Sequence[float]) -> float:
    """Return when an engine without a running lane goes on: answers at one moment count as one."""
    now = max(now, answers[0])
    for when in answers:
        if when <= now + _TOGETHER_S:
            now = max(now, when)
    return now


if __name__ == "__main__":
    main()
