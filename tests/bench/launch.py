"""The overhead of launching: our pool against joblib and submitit_local on the same tiny cells.

    python -m tests.bench.launch [cells]      one run, one machine, two cells at a time

Every peer runs `runner.launch.worker.run_cell` on cells of its own that train one step of a tiny
model. The clock runs from the first override to the end of the last cell, without the composition
of the cells by Hydra, during which our fork server starts, as it does in a sweep. `work` is the
time of these cells one after the other in a warm process; the overhead of a cell is its wall time
minus half of that, as two run at a time. submitit_local has no limit: it starts all interpreters at
once.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from runner.launch.fork_server import warm_up
from runner.launch.pool import Pool
from runner.records.cells import Cell, freeze_cell, make_cells

TINY = [
    "model=gpt_pico",
    "data=text",
    "data.split=tail",
    "train.steps=1",
    "train.sequence_length=16",
    "train.batch_size=4",
    "eval.tokens=256",
    "eval.sample_tokens=0",
    "track.uri=off",
    "train.checkpoint.keep_best=false",
]


def cells(count: int, text: Path) -> list[Cell]:
    """Return `count` frozen cells in a folder of their own."""
    # Here, because children of the fork server import this file (never `python -m runner`).
    from hydra import compose, initialize_config_module

    from runner.commands.composer import open_keys, to_plain
    from runner.commands.hydra_plugin import register

    register()
    root = tempfile.mkdtemp()
    with initialize_config_module("conf", version_base="1.3"):
        base = open_keys([*TINY, f"data.sources.0.path={text}", f"root={root}"])
        points = [to_plain(compose("config", [*base, f"seed={seed}"])) for seed in range(count)]
    made = make_cells((str(seed), point) for seed, point in enumerate(points))
    for cell in made:
        freeze_cell(cell)
    return made


def train(folder: str) -> None:
    """Run one cell: the job of every peer."""
    import torch

    from runner.launch.worker import run_cell

    torch.set_num_threads(1)
    assert run_cell(Path(folder)) == 0


def ours(todo: list[Cell]) -> None:
    """Run the cells on our fork server."""
    Pool(jobs=2, threads=1).run(todo, [], lambda: None)


def with_joblib(todo: list[Cell]) -> None:
    """Run the cells on joblib's loky: two workers, reused, so torch is imported twice in all."""
    import joblib

    joblib.Parallel(n_jobs=2)(joblib.delayed(train)(str(cell.folder)) for cell in todo)


def with_submitit(todo: list[Cell]) -> None:
    """Run the cells on submitit's local executor: an interpreter per cell."""
    import submitit

    executor = submitit.LocalExecutor(tempfile.mkdtemp())
    for handle in [executor.submit(train, str(cell.folder)) for cell in todo]:
        handle.result()


def in_turn(todo: list[Cell]) -> None:
    """Run the cells one after the other in this process."""
    for cell in todo:
        train(str(cell.folder))


def main(count: int) -> None:
    """Time each once and print the table."""
    os.environ["OMP_NUM_THREADS"] = "1"
    text = Path(tempfile.mkdtemp()) / "text.txt"
    text.write_text("".join(f"{i} squared is {i * i}.\n" for i in range(500)))
    peers: dict[str, Callable[[list[Cell]], None]] = {
        "pool (ours)": ours,
        "joblib n_jobs=2": with_joblib,
        "submitit_local": with_submitit,
    }
    seconds = {}
    cells(1, text)  # imports
    for name, run in peers.items():
        if run is ours:
            warm_up()
        todo = cells(count, text)
        start = time.perf_counter()
        run(todo)
        seconds[name] = (time.perf_counter() - start) / count
        assert all(cell.state == "finished" for cell in todo), name
    in_turn(cells(1, text))
    todo = cells(count, text)
    start = time.perf_counter()
    in_turn(todo)
    work = (time.perf_counter() - start) / count
    print(f"{'work':18s} {work * 1000:8.1f} ms/cell")
    base = seconds["pool (ours)"] - work / 2
    for name, value in seconds.items():
        over = value - work / 2
        print(
            f"{name:18s} {value * 1000:8.1f} ms/cell  "
            f"overhead {over * 1000:8.1f} ms  {over / base:5.1f}x ours"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
