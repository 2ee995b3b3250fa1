"""On a GPU: fused quantising against a copy, losses, recurrences, tiny cells at once, a grid.

python -m tests.bench.gpu_kernels quantise | losses | recurrences | cells | grid

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
GRID = 8 if HAS_GPU else 1  # a side
FLOORS = {"rows": 1.5, "FP8, both ways": 1.5}  # times of a copy
Row = dict[str, Any]


def quantising() -> Iterator[Row]:
    """Yield the time of quantising a gradient along rows and columns, and of a copy.

    n bf16 elements must move 8n bytes: 2n are read for the magnitudes, 2n read and 2 x 2n written
    for the values. A copy moves 4n: `of_floor` is twice its time over ours. FP8 is written as
    bytes, 6n in all.
    """
    from kernels.formats import E4M3
    from kernels.hadamard import hadamard_matrix
    from kernels.philox import Dice, Draw, NoiseKey
    from kernels.triton_blocks import quantise_float8
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
            "FP8, both ways": lambda x=x: quantise_float8(x, E4M3, rows=True, columns=True),
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
                "of_floor": round(FLOORS.get(name, 2.0) * copy / ours, 3),
            }


def losses() -> Iterator[Row]:
    """Yield the time of a head with its loss, forward and backward, in three ways.

    By eager torch, with the rows by a kernel, and that compiled. `floor_ms` is the time of 6 bytes
    a logit in bf16, from a copy that moves 4; the products come on top of it.
    """
    from kernels import logit_rows
    from kernels.cross_entropy import linear_cross_entropy

    rows, width, vocab = (8192, 1536, 50304) if HAS_GPU else (8, 16, 32)
    hidden, weight = (torch.randn(n, width, device=DEVICE) for n in (rows, vocab))
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.requires_grad_()
    targets = torch.randint(0, vocab, (rows,), device=DEVICE)
    agrees, rounds = logit_rows.triton_agrees, 10 if HAS_GPU else 1
    compiled = torch.compile(linear_cross_entropy) if HAS_GPU else linear_cross_entropy

    def run(function: Any) -> None:
        function(hidden, weight, targets)[0].backward()
        hidden.grad = weight.grad = None

    row: Row = {"rows": rows, "vocabulary": vocab}
    for name, function in (
        ("eager", linear_cross_entropy),
        ("kernel", linear_cross_entropy),
        ("compiled", compiled),
    ):
        logit_rows.triton_agrees = (lambda device, compare: False) if name == "eager" else agrees
        row[f"{name}_ms"] = round(best_ms(partial(run, function), rounds), 3)
    logit_rows.triton_agrees = agrees
    logits = torch.empty(rows, vocab, dtype=torch.bfloat16, device=DEVICE)
    yield row | {"floor_ms": round(1.5 * best_ms(logits.clone, rounds), 3)}


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
    with tempfile.TemporaryDirectory() as folder:
        for jobs in JOBS:
            count = CELLS if jobs > 1 else max(1, CELLS // 8)
            yield _cells_row(Path(folder), jobs, [{"seed": seed} for seed in range(count)], STEPS)


def large_grid() -> Iterator[Row]:
    """Yield the rate of a grid of one experiment: learning rates by seeds, cells of a few steps."""
    points = [{"seed": seed, "lr": 1e-3 * 1.2**i} for seed in range(GRID) for i in range(GRID)]
    with tempfile.TemporaryDirectory() as folder:
        yield _cells_row(Path(folder), JOBS[-1], points, max(2, STEPS // 10))


def _cells_row(folder: Path, jobs: int, points: list[dict[str, Any]], steps: int) -> Row:
    """Return how fast a pool of `jobs` processes runs a tiny cell for each of `points`."""
    from runner.launch.pool import Pool
    from tests.plain_nodes import tiny_cell

    train = {"steps": steps, "sequence_length": 64, "batch_size": 16, "threads": 1}
    text = folder / "text.txt"
    if not text.exists():
        text.write_text("".join(f"line {i}: {i * i} is the square of {i}.\n" for i in range(200)))
        first = tiny_cell(folder / "first", text, train | {"steps": 1})
        Pool(jobs=1, threads=1, gpus=None).run([first], [], lambda: None)  # starts the fork server
    cells = [tiny_cell(folder / str(jobs), text, train, **point) for point in points]
    start = time.perf_counter()
    Pool(jobs=jobs, threads=1, gpus=None).run(cells, [], lambda: None)
    seconds = time.perf_counter() - start
    finished = sum(cell.state == "finished" for cell in cells)
    return {
        "at_a_time": jobs,
        "finished": f"{finished}/{len(cells)}",
        "cells_per_s": round(finished / seconds, 3),
    }


if __name__ == "__main__":
    parts = {
        "quantise": quantising,
        "losses": losses,
        "recurrences": recurrences,
        "cells": packed_cells,
        "grid": large_grid,
    }
    for row in parts[sys.argv[1]]():
        print(json.dumps(row), flush=True)
