"""Lanes that call tools: tokens a second with waiting lanes out of the batch, and waited for.

    python -m tests.bench.lanes [--size 10M] [--lanes 1 4 16 64] [--delay-ms 0 50 500] [--rounds 3]

A lane calls a tool after every 16 tokens, which sleeps and answers with 8. Asynchronous: a lane
that waits leaves the batch. Synchronous: no step is taken while a lane waits. Beside both stands
what a simulation of the queue foretells from the measured cost of a step and of a pass over answers
by rows: measured / foretold should be within 15% of 1 on a quiet machine. A round measures the
costs and both ways in turn; the median over rounds is shown, and the range of its ratios.
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

from models.contract import read, start
from models.language_model import LanguageModel
from runner.generate.autoregressive import Autoregressive
from runner.generate.engine import Engine
from runner.generate.request import Request
from runner.generate.sampling import Sampling
from runner.generate.text_row import TextRow
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="10M")
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--delay-ms", type=float, nargs="+", default=[0, 50, 500])
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    model = both_models(given.size)[0].for_inference()
    print(
        "| lanes | delay (ms) | asynchronous (tokens/s) | / foretold | synchronous | / foretold |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for lanes in given.lanes:
        for delay in given.delay_ms:
            rounds = [a_round(model, lanes, delay / 1000) for _ in range(given.rounds)]
            cells = []
            for rates in zip(*rounds, strict=True):
                ratios = sorted(measured / foretold for measured, foretold in rates)
                cells.append(f"{median(measured for measured, _ in rates):.0f}")
                cells.append(f"{median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})")
            print(f"| {lanes} | {delay:g} | {' | '.join(cells)} |", flush=True)
    print(f"load of the last minute: {os.getloadavg()[0]:.1f}")


def a_round(model: LanguageModel, lanes: int, delay: float) -> list[tuple[float, float]]:
    """Return (measured, foretold) tokens/s, of asynchronous lanes and of synchronous ones."""
    step = costs(lanes, lambda rows: step_seconds(model, rows))
    answer = costs(lanes, lambda rows: answer_seconds(model, rows))
    tokens = lanes * TOKENS
    return [
        (
            tokens / seconds(model, lanes, delay, waits=waits),
            tokens / simulate(lanes, delay, step, answer, waits=waits),
        )
        for waits in (False, True)
    ]


def seconds(model: LanguageModel, lanes: int, delay: float, *, waits: bool) -> float:
    """Return the seconds that all lanes take from their first step; prompts are read before."""
    tools = Tools([Sleeps(delay)], Numbers(), max_calls=TOKENS)
    engine = loaded(model, lanes, tools)
    begun = time.perf_counter()
    while engine.num_running or engine.num_away:
        while waits and engine.away.pool.num_under_way:
            engine.away.receive(wait=True)
        engine.step()
    return time.perf_counter() - begun


def costs(lanes: int, measure: Callable[[int], float]) -> Callable[[int], float]:
    """Return what `measure` gives by rows, interpolated up to `lanes`."""
    rows = sorted({1, max(1, lanes // 4), max(1, lanes // 2), lanes})
    taken = [measure(count) for count in rows]
    return lambda count: float(np.interp(count, rows, taken))


def step_seconds(model: LanguageModel, rows: int) -> float:
    """Return the seconds of a step of the engine, without tools."""
    engine = loaded(model, rows, None)
    begun = time.perf_counter()
    for _ in range(BETWEEN):
        engine.step()
    return (time.perf_counter() - begun) / BETWEEN


def answer_seconds(model: LanguageModel, rows: int) -> float:
    """Return the seconds of a pass over answers."""
    state = start(model, rows, 2 * PROMPT + TOKENS)
    ids = torch.ones(rows, ANSWER + 1, dtype=torch.int64)
    with torch.no_grad():
        read(model, torch.ones(rows, PROMPT + TOKENS // 2, dtype=torch.int64), state)
        begun = time.perf_counter()
        read(model, ids, state)
    return time.perf_counter() - begun


def loaded(model: LanguageModel, lanes: int, tools: Tools | None) -> Engine[TextRow]:
    """Return an engine whose lanes have read their prompts."""
    strategy = Autoregressive(model, context=1024, decode=lambda _: "")
    engine = Engine(strategy, rows=lanes, max_away=lanes)
    for number in range(lanes):
        prompt = torch.randint(0, 9999, (PROMPT,), generator=torch.Generator().manual_seed(number))
        how = Sampling(max_new_tokens=TOKENS + 1, temperature=0.0, ends=())
        engine.submit(Request(id=str(number), prompt=prompt.tolist(), how=how, tools=tools))
    engine.step()
    return engine


def simulate(
    lanes: int,
    delay: float,
    step: Callable[[int], float],
    answer: Callable[[int], float],
    *,
    waits: bool,
) -> float:
    """Return the seconds that a queue of lanes takes: a step at a time, each at its cost."""
    now, written, turn = 0.0, [1] * lanes, [1] * lanes  # the prompt's pass has given one
    running, back = set(range(lanes)), dict[int, float]()
    while running or back:
        if running:
            now += step(len(running))
        for lane in sorted(running):
            written[lane] += 1
            turn[lane] += 1
            if written[lane] > TOKENS:
                running.discard(lane)
            elif turn[lane] == BETWEEN:
                running.discard(lane)
                back[lane] = now + delay
        if back and (waits or not running):
            now = max(now, (max if waits else min)(back.values()))
        come = [lane for lane, when in back.items() if when <= now]
        for lane in come:
            del back[lane]
            written[lane], turn[lane] = written[lane] + ANSWER, 0
        going = [lane for lane in come if written[lane] <= TOKENS]
        if going:
            now += answer(len(going))
            for lane in going:  # the pass over the answer gives the next token
                written[lane], turn[lane] = written[lane] + 1, 1
        running |= {lane for lane in going if written[lane] <= TOKENS}
    return now


if __name__ == "__main__":
    main()
