"""On a GPU: fused quantising against a copy, recurrences, and many tiny cells at once.

python -m tests.bench.gpu_kernels quantise | recurrences | cells

Prints a row of JSON for each measurement. Without a GPU the sizes are tiny: a rehearsal, in which
Triton's interpreter quantises (TRITON_INTERPRET=1).
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.bench.timing import best_ms

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
SHAPES = ((4096, 4096), (16384, 4096), (16384, 2048)) if HAS_GPU else ((64, 64),)
JOBS, CELLS, STEPS = ((1, 8, 16), 16, 200) if HAS_GPU else ((1, 2), 2, 2)
Row = dict[str, Any]


def quantising() -> Iterator[Row]:
    """Yield the time of quantising a gradient along rows and columns, and of a copy.

    n bf16 elements must move 8n bytes: 2n are read for the magnitudes, 2n read and 2 x 2n written
    for the values. A copy moves 4n: `of_floor` is twice its time over ours.
    """
    from kernels.hadamard import hadamard_matrix
    from kernels.philox import Dice, Draw, NoiseKey
    from kernels.triton_nvfp4 import quantise, quantise_both

    matrix = hadamard_matrix(16, device=DEVICE)
    rounds = 15 if HAS_GPU else 1
    for rows, cols in SHAPES:
        x = torch.randn(rows, cols, device=DEVICE).bfloat16()
        key = NoiseKey(seed=0, step=0, samples=torch.arange(max(1, rows // 1024), device=DEVICE))
        draws = Draw(Dice.of(key), 0, rows), Draw(Dice.of(key), 1, rows)
        copy = best_ms(x.clone, rounds)
        calls = {
            "rows": lambda x=x: quantise(x, (1, 16)),
            "rows and columns": lambda x=x: quantise_both(x, matrix),
            "rows and columns, stochastic": lambda x=x, d=draws: quantise_both(x, matrix, d),
        }
        for name, call in calls.items():
            ours = best_ms(call, rounds)
            shape = f"{rows} x {cols}"
            yield {
                "what": name,
                "shape": shape,
                "copy_ms": round(copy, 4),
                "ms": round(ours, 4),
                "of_floor": round((1.5 if name == "rows" else 2.0) * copy / ours, 3),
            }


def recurrences() -> Iterator[Row]:
    """Yield the time of a layer's recurrence, forward and backward, in three ways.

    Chunk after chunk, with the states passed on by a kernel, and that compiled. `floor_ms` is the
    time of 11 tensors of seq x width in fp32, from a copy of two: q, k, v and the output, and once
    more q, k, v with four gradients.
    """
    from kernels import state_pass
    from kernels.recurrence import recurrence
    from tests.kernels.recurrence_cases import gradients, inputs

    agrees, rounds = state_pass.triton_agrees, 5 if HAS_GPU else 1
    shape, chunk = ((4, 24, 2048, 64, 64), 64) if HAS_GPU else ((1, 1, 8, 4, 4), 4)
    compiled = torch.compile(recurrence, dynamic=False) if HAS_GPU else recurrence
    for kind, size in (("scalar", chunk), ("wide", 16), ("delta", chunk)):
        given = {name: t.to(DEVICE) for name, t in inputs(kind, shape).items()}
        row: Row = {"kind": kind, "chunk": size}
        for name, function in (
            ("loop", recurrence),
            ("kernel", recurrence),
            ("compiled", compiled),
        ):
            state_pass.triton_agrees = (lambda device, compare: False) if name == "loop" else agrees
            run = partial(gradients, given, function, size)
            row[f"{name}_ms"] = round(best_ms(run, rounds), 3)
        state_pass.triton_agrees = agrees
        copy = best_ms(given["v"].clone, rounds)  # reads and writes a tensor
        yield row | {"floor_ms": round(5.5 * copy, 3)}


def packed_cells() -> Iterator[Row]:
    """Yield the rate of tiny cells that share the device, so many at a time."""
    from runner.launch.pool import Pool
    from tests.plain_nodes import tiny_cell

    train = {"steps": STEPS, "sequence_length": 64, "batch_size": 16, "threads": 1}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("".join(f"line {i}: {i * i} is the square of {i}.\n" for i in range(200)))
        Pool(jobs=1, threads=1, gpus=None).run(  # starts the fork server
            [tiny_cell(Path(folder) / "first", text, train | {"steps": 1})], [], lambda: None
        )
        for jobs in JOBS:
            count = CELLS if jobs > 1 else max(1, CELLS // 8)
            root = Path(folder) / str(jobs)
            cells = [tiny_cell(root, text, train, seed=seed) for seed in range(count)]
            start = time.perf_counter()
            Pool(jobs=jobs, threads=1, gpus=None).run(cells, [], lambda: None)
            seconds = time.perf_counter() - start
            finished = sum(cell.state == "finished" for cell in cells)
            rate = round(finished / seconds, 3)
            yield {"at_a_time": jobs, "finished": f"{finished}/{count}", "cells_per_s": rate}


if __name__ == "__main__":
    parts = {"quantise": quantising, "recurrences": recurrences, "cells": packed_cells}
    for row in parts[sys.argv[1]]():
        print(json.dumps(row), flush=True)
