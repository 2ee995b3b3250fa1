"""A single run in this process, which prints its metrics: `python -m runner ...`."""

import os
import subprocess
import threading

from rich.console import Console

from runner.launch.mlflow_process import finish_uploader, start_uploader
from runner.records import journal
from runner.records.cells import Cell, freeze_cell, join_sweep, renew_cell
from runner.records.config import root_option
from runner.records.drift import drifted
from runner.records.metrics import Line, MetricsReader, latest, measure_of, valid_rows


def run_here(cell: Cell) -> int:
    """Freeze `cell` and run it unless it has ended; return the worker's exit code.

    Raises:
        ConfigError: it cannot run on this machine; nothing has been written.
    """
    console = Console(stderr=True)
    state = cell.state
    if state not in journal.FINAL:
        _check(cell)
    freeze_cell(cell)
    join_sweep(cell.config.name, [cell])
    console.print(f"[bold]{cell.fingerprint}[/bold] {state}: {cell.folder}", soft_wrap=True)
    if state in journal.FINAL:
        console.print(
            "nothing to do; change a key, or delete the folder to run it again (eval.also is no "
            "part of a run that trains: `espalier eval` or work=evaluate measures more)",
            soft_wrap=True,
        )
        for line in drifted([cell]):
            console.print(line, soft_wrap=True)
        return 0
    if state != "running":
        renew_cell(cell)
    uploader = start_uploader(cell.config)
    done = threading.Event()
    printer = threading.Thread(target=_print_metrics, args=(cell, console, done), daemon=True)
    printer.start()
    try:
        resources = cell.config.resources
        if resources.num_processes > 1:
            from runner.launch.pool import worker_command  # noqa: PLC0415

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
        _print_next(cell, console)


def _check(cell: Cell) -> None:
    from runner.launch.local import Local  # noqa: PLC0415
    from runner.views.plan import check  # noqa: PLC0415  (slow: torch)

    here = Local()
    here.check([cell])
    for remark in check([cell], here.memory_gb):
        Console(stderr=True).print(remark, soft_wrap=True)


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
        rows = valid_rows(reader.read())
        planned = latest(cell.folder, "steps") if rows else {}
        keys = dict.fromkeys(("loss", "val_loss", measure_of(cell.folder) or "val_loss"))
        for row in rows:
            parts = [f"{key} {row[key]:.4f}" for key in keys if key in row]
            if parts:
                console.print(_step_line(planned | row, parts), highlight=False)
            for line in _further_lines(row):
                console.print(line, highlight=False, markup=False)
        if last:
            return


_OF_EACH_ROW = {"step", "time", "attempt", "eval_s"}


def _further_lines(row: Line) -> list[str]:
    """Return a line for each value of the further evaluations of a row, with its standard error."""
    own = row.keys() - _OF_EACH_ROW if "eval_s" in row else set()
    values = {k: row[k] for k in row if k in own and not k.startswith(("val_", "sample_"))}
    return [
        f"  {key} {value:.4f}"
        + (f" +- {values[f'{key}_stderr']:.4f}" if f"{key}_stderr" in values else "")
        for key, value in values.items()
        if not key.endswith("_stderr")
    ]


def _step_line(row: Line, parts: list[str]) -> str:
    from runner.views.table import time_left  # noqa: PLC0415

    steps = row.get("steps", "?")
    if "tokens_per_s" in row:
        parts.append(f"{row['tokens_per_s']:,.0f} tokens/s")
    if time_left(row) and row["step"] < steps:
        parts.append(f"{time_left(row)} left")
    return f"step {row['step']:>{len(str(steps))}}/{steps}  " + "  ".join(parts)


def _print_next(cell: Cell, console: Console) -> None:
    """Print what to do with the run now."""
    state, run = cell.state, cell.config
    if state == "interrupted":
        console.print("interrupted; the same command goes on from the last checkpoint")
    elif state in journal.FINAL and run.model is not None and run.train is not None:
        verb = f"espalier generate {cell.fingerprint[:8]}{root_option(run)}"
        console.print(f"{state}; next: `{verb}`", soft_wrap=True)
