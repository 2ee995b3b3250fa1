"""Tokens/s of decoding with weights in few bits, against fp32, steps compiled on both sides.

    python -m tests.bench.few_bits [--schemes int8,int8-dynamic] [--rows 8] [--profile]

gpt_10m with random weights, greedy, 64 new tokens after 16; interleaved, minima over rounds.
--profile lists what a step's time goes to.
"""

import argparse
import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from models.contract import read, start
from models.decoder_config import DecoderConfig
from models.scheme import parse_scheme
from models.stored_linear import compress
from tests.bench.timing import interleaved

STEPS, PROMPT, VOCAB = 64, 16, 257


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemes", default="int8,int8-dynamic")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    model = DecoderConfig(depth=6, width=384, num_heads=6).build(VOCAB, 0).eval()
    sides = {"fp32": decoding(model, given.rows)}
    for name in given.schemes.split(","):
        small = copy.deepcopy(model)
        compress(small, parse_scheme(name))
        sides[name] = decoding(small, given.rows)
    for run in sides.values():
        run()
        run()
    seconds = interleaved(sides, given.rounds)
    print(f"{given.rows} rows, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    for name, s in seconds.items():
        print(f"| {name} | {given.rows * STEPS / s:.0f} tokens/s | {seconds['fp32'] / s:.2f} |")
    if given.profile:
        for name, run in sides.items():
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                run()
            print(name)
            print(
                profiled.key_averages().table(
                    sort_by="self_cpu_time_total", row_limit=8, max_name_column_width=40
                )
            )


def decoding(model: Any, rows: int) -> Callable[[], None]:
    """Return what decodes `STEPS` tokens in each row, the state filled before."""
    ready = copy.deepcopy(model).for_inference(compiled=True)
    step = torch.compile(ready, dynamic=False)
    prompt = torch.randint(0, VOCAB, (rows, PROMPT))
    counts = torch.ones(rows, dtype=torch.int64)

    def run() -> None:
        state = start(ready, rows, PROMPT + STEPS, static=True)
        token = read(ready, prompt, state).argmax(dim=-1)
        for _ in range(STEPS):
            token = read(step, token[:, None], state, counts=counts).argmax(dim=-1)

    return run


if __name__ == "__main__":
    main()
