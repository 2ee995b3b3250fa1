"""One SLURM array task: a pool over its cells, which requeues the task if cells are unfinished.

`python -m runner.launch.slurm_job LISTING --at-once=N`: line SLURM_ARRAY_TASK_ID of LISTING is a
JSON list of run folders, or names the study whose trials the task runs. SIGUSR2 (before the time
limit, at preemption) and SIGTERM make every cell save. Exit codes: 0 all cells ended well, 75
requeued, 1 a cell failed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from runner.launch import policy
from runner.launch.after_exit import give_up
from runner.launch.fork_server import warm_up
from runner.launch.pool import Pool
from runner.launch.worker import RESUME
from runner.records import journal
from runner.records.cells import Cell, load_cell
from runner.records.failures import OUT_OF_HOST_MEMORY, last_failure

_REFUSED_AFTER_S = 300


def main() -> int:
    """Run the cells of this task that have not ended; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m runner.launch.slurm_job", description=__doc__)
    parser.add_argument("listing", type=Path)
    parser.add_argument("--at-once", type=int, default=1)
    args = parser.parse_args()
    index = int(os.environ["SLURM_ARRAY_TASK_ID"])
    cores = int(os.environ.get("SLURM_CPUS_PER_TASK", "1"))
    pool = Pool(jobs=args.at_once, threads=max(1, cores // args.at_once), gpus=None)
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, lambda *_: None if pool.stopping else pool.stop())
    warm_up()
    task = json.loads(args.listing.read_text().splitlines()[index])
    if isinstance(task, dict):
        from runner.launch.study import load_study  # noqa: PLC0415  (optuna)

        study = load_study(Path(task["study"]), index, task.get("fingerprint"))
        pool.source = study
        pool.run([], [], lambda: None)
        cells = pool.processed_cells
        if study.is_over():
            policy.notify(study.folder, policy.STUDY_ENDED)
    else:
        cells = [load_cell(Path(folder)) for folder in task]
        pool.run([cell for cell in cells if _should_run(cell)], [], lambda: None)
        for sweep in {cell.sweep for cell in cells}:
            policy.notify(sweep)
    states = [cell.state for cell in cells]
    print(f"cells ended {', '.join(states)}", flush=True)
    if any(_is_unfinished(cell) for cell in cells) and pool.stopping:
        _requeue(cells)
        return RESUME
    if pool.source is not None:  # pruned trials are interrupted, which is no failure
        return 1 if "failed" in states else 0
    return 0 if set(states) <= set(journal.FINAL) else 1


def _should_run(cell: Cell) -> bool:
    """Return whether to run the cell.

    A failed cell runs if the task was not requeued (a user submitted it again), or if it was killed
    with the whole task and the failure is a false one.
    """
    if cell.state in journal.FINAL or give_up(cell):
        return False
    if cell.state == "failed" and int(os.environ.get("SLURM_RESTART_COUNT", "0")):
        return last_failure(cell).get("error") == OUT_OF_HOST_MEMORY
    return True


def _is_unfinished(cell: Cell) -> bool:
    return cell.state in ("new", "interrupted") and not cell.cancelled.exists()


def _requeue(cells: list[Cell]) -> None:
    """Requeue this task and wait for SLURM to end it; else record that it needs resubmission."""
    task = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    deadline = time.monotonic() + _REFUSED_AFTER_S
    while time.monotonic() < deadline:
        state = _run("squeue", "-h", "-j", task, "-o", "%T")
        if state.returncode == 0 and state.stdout.strip() != "RUNNING":
            break  # cancelled: not to be requeued
        done = _run("scontrol", "requeue", task)
        if done.returncode == 0:
            time.sleep(deadline - time.monotonic())
            return
        print(done.stderr.strip(), file=sys.stderr, flush=True)
        if "contact" not in done.stderr and "connect" not in done.stderr:
            break
        time.sleep(5.0)
    for cell in cells:
        if _is_unfinished(cell) and journal.attempts(cell.folder):
            journal.record_end(cell.folder, "needs_resubmit")


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    sys.exit(main())
