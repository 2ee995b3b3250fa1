"""A single run in this process, which prints its metrics: `python -m runner ...`."""

import os
import subprocess
import threading

from rich.console import Console

from runner.launch.mlflow_process import finish_uploader, start_uploader
from runner.launch.pool import worker_command
from runner.records import journal
from runner.records.cells import Cell, renew_cell
from runner.records.drift import drifted
from runner.records.metrics import MetricsReader, measure_of, valid_rows


def run_here(cell: Cell) -> int:
    """Run `cell` unless it has ended; return the worker's exit code."""
    console = Console(stderr=True)
    console.print(f"[bold]{cell.fingerprint}[/bold] {cell.state}: {cell.folder}")
    if cell.state in journal.FINAL:
        console.print("nothing to do; change a key, or delete the folder to run it again")
        for line in drifted([cell]):
            console.print(line, soft_wrap=True)
        return 0
    if cell.state != "running":
        renew_cell(cell)
    uploader = start_uploader(cell.config)
    done = threading.Event()
    printer = threading.Thread(target=_print_metrics, args=(cell, console, done), daemon=True)
    printer.start()
    try:
        resources = cell.config.resources
        if resources.num_processes > 1:
            code = _wait(subprocess.Popen(worker_command(cell.folder, resources)))
        else:
            from runner.launch.worker import run_cell  # noqa: PLC0415  (slow: torch)

            code = run_cell(cell.folder)
        if cell.state == "failed":
            console.print("failed; when the cause is mended, run the same command again")
        elif cell.state == "interrupted":
            console.print("interrupted; the same command goes on")
        return code
    finally:
        done.set()
        printer.join()
        for line in finish_uploader(uploader):
            console.print(line, markup=False)


def _wait(process: subprocess.Popen[bytes]) -> int:
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            # The ranks receive it too. torchrun kills those that have not saved 30 s later.
            os.write(2, b"\nstopping: the ranks save their state and end\n")


def _print_metrics(cell: Cell, console: Console, done: threading.Event) -> None:
    reader = MetricsReader(cell.folder)
    reader.read()  # skip the rows of earlier attempts
    while True:
        last = done.wait(1.0)
        for row in valid_rows(reader.read()):
            keys = dict.fromkeys(("loss", "val_loss", measure_of(cell.folder) or "val_loss"))
            parts = [f"{key} {row[key]:.4f}" for key in keys if key in row]
            if "tokens_per_s" in row:
                parts.append(f"{row['tokens_per_s']:,.0f} tokens/s")
            if parts:
                console.print(f"step {row['step']:>6}  " + "  ".join(parts), highlight=False)
        if last:
            return
