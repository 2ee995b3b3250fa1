"""Requests of different lengths: rows filled again as they end, against batches that wait.

    python -m tests.bench.continuous [--size 10M] [--requests 64]

Both sides are ours, greedy, of the same weights. A static batch runs until its longest request has
ended: with all its rows to the end, or with those that have ended taken out. Least CPU seconds over
the rounds, in turns.
"""

import argparse
import random
import time
from collections.abc import Callable

import torch

from models.language_model import LanguageModel
from runner.generate.generate import generate
from runner.generate.sampling import Sampling
from tests.bench.generate import SIZES, both_models

ROWS, PROMPT, LENGTHS = 8, 16, (8, 128)
Texts = list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="10M")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    model = both_models(given.size)[0].for_inference()
    lengths = [random.Random(i).randint(*LENGTHS) for i in range(given.requests)]
    sides = {
        "continuous": lambda: texts(model, lengths, lengths, given.requests),
        "static, ended rows leave": lambda: texts(model, lengths, lengths, ROWS),
        "static, all rows stay": lambda: texts(model, longest(lengths), lengths, ROWS),
    }
    seconds, made = cpu_seconds(sides, given.rounds)
    print(f"{given.size}, {given.requests} requests of {LENGTHS} tokens, {ROWS} rows")
    print("| batching | tokens per CPU second | continuous is faster by | same ids |")
    print("| --- | --- | --- | --- |")
    for side, spent in seconds.items():
        ratio, same = spent / seconds["continuous"], made[side] == made["continuous"]
        print(f"| {side} | {sum(lengths) / spent:.1f} | {ratio:.2f} | {same} |")


def longest(lengths: list[int]) -> list[int]:
    """Return for each request the length of the longest in its batch."""
    return [max(lengths[i - i % ROWS :][:ROWS]) for i in range(len(lengths))]


def texts(model: LanguageModel, run: list[int], kept: list[int], at_once: int) -> Texts:
    """Return the first `kept` of `run` tokens of each request, `at_once` handed in together."""
    made: Texts = []
    for first in range(0, len(run), at_once):
        batch = range(first, min(first + at_once, len(run)))
        prompts = [
            torch.randint(0, 50257, (PROMPT,), generator=torch.Generator().manual_seed(i))
            for i in batch
        ]
        hows = [Sampling(max_new_tokens=run[i], temperature=0.0) for i in batch]
        done = generate(model, prompts, hows, context=1024, decode=lambda _: "", ends=(), rows=ROWS)
        made += [one.ids[: kept[i]] for one, i in zip(done, batch, strict=True)]
    return made


def cpu_seconds(
    sides: dict[str, Callable[[], Texts]], rounds: int
) -> tuple[dict[str, float], dict[str, Texts]]:
    """Return (the least CPU seconds of each side, what it made)."""
    best, made = dict.fromkeys(sides, float("inf")), {}
    for _ in range(rounds):
        for side, make in sides.items():
            start = time.process_time()
            made[side] = make()
            best[side] = min(best[side], time.process_time() - start)
    return best, made


if __name__ == "__main__":
    main()
