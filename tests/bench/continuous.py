"""Requests of different lengths: rows filled again as they end, against batches that wait.

    python -m tests.bench.continuous [--size 10M] [--requests 64] [--ragged]

All sides are greedy, of the same weights. A static batch runs until its longest request has ended:
ours with all its rows to the end, or with those that have ended taken out, and transformers', whose
prompts are padded on the left. With --ragged prompts are as different as what follows them. Least
CPU seconds over the rounds, in turns.
"""

import argparse
import random
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.language_model import LanguageModel
from runner.generate.generate import generate
from runner.generate.sampling import Sampling
from tests.bench.generate import SIZES, both_models

ROWS, PROMPT, LENGTHS, VOCAB = 8, 16, (8, 128), 50257
Texts = list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="10M")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ragged", action="store_true", help="prompts of 8 to 128 tokens")
    given = parser.parse_args()
    ours, theirs = both_models(given.size)
    model, count = ours.for_inference(), given.requests
    prompts = [prompt(i, ragged=given.ragged) for i in range(count)]
    lengths = [random.Random(i).randint(*LENGTHS) for i in range(count)]
    sides = {
        "continuous": lambda: texts(model, prompts, lengths, lengths, count),
        "static, ended rows leave": lambda: texts(model, prompts, lengths, lengths, ROWS),
        "static, all rows stay": lambda: texts(model, prompts, longest(lengths), lengths, ROWS),
        "transformers, static and padded": lambda: their_texts(theirs, prompts, lengths),
    }
    seconds, made = cpu_seconds(sides, given.rounds)
    before = f"{LENGTHS[0]} to {LENGTHS[1]}" if given.ragged else PROMPT
    print(f"{given.size}, {count} requests of {LENGTHS} tokens after {before}, {ROWS} rows")
    print("| batching | tokens per CPU second | continuous is faster by | same texts |")
    print("| --- | --- | --- | --- |")
    for side, spent in seconds.items():
        ratio = spent / seconds["continuous"]
        same = sum(a == b for a, b in zip(made[side], made["continuous"], strict=True))
        print(f"| {side} | {sum(lengths) / spent:.1f} | {ratio:.2f} | {same} of {count} |")


def prompt(index: int, *, ragged: bool) -> Tensor:
    """Return the prompt of a request."""
    length = random.Random(-1 - index).randint(*LENGTHS) if ragged else PROMPT
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(index))


def longest(lengths: list[int]) -> list[int]:
    """Return for each request the length of the longest in its batch."""
    return [max(lengths[i - i % ROWS :][:ROWS]) for i in range(len(lengths))]


def texts(
    model: LanguageModel, prompts: list[Tensor], run: list[int], kept: list[int], at_once: int
) -> Texts:
    """Return the first `kept` of `run` tokens of each request, `at_once` handed in together."""
    made: Texts = []
    for first in range(0, len(run), at_once):
        batch = range(first, min(first + at_once, len(run)))
        hows = [Sampling(max_new_tokens=run[i], temperature=0.0) for i in batch]
        done = generate(
            model,
            [prompts[i] for i in batch],
            hows,
            context=1024,
            decode=lambda _: "",
            ends=(),
            rows=ROWS,
        )
        made += [one.ids[: kept[i]] for one, i in zip(done, batch, strict=True)]
    return made


@torch.no_grad()
def their_texts(model: Any, prompts: list[Tensor], lengths: list[int]) -> Texts:
    """Return the texts that transformers makes of batches padded on the left."""
    made: Texts = []
    for first in range(0, len(prompts), ROWS):
        batch, wanted = prompts[first : first + ROWS], lengths[first : first + ROWS]
        width = max(len(ids) for ids in batch)
        padded = torch.stack([F.pad(ids, (width - len(ids), 0)) for ids in batch])
        mask = torch.stack([F.pad(torch.ones_like(ids), (width - len(ids), 0)) for ids in batch])
        done = model.generate(
            padded,
            attention_mask=mask,
            max_new_tokens=max(wanted),
            min_new_tokens=max(wanted),
            do_sample=False,
            pad_token_id=0,
        )
        made += [ids[width:][:n].tolist() for ids, n in zip(done, wanted, strict=True)]
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
