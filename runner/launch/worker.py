"""Runs one frozen cell: `python -m runner.launch.worker runs/<fingerprint>`.

It reads that folder only. Exit codes: 0 finished or diverged, 75 interrupted, 76 held by another
worker, 1 failed.
"""

import os
import signal
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil

from runner.launch.mlflow_process import (
    UPLOADER_RUNS,
    UploaderProcess,
    finish_uploader,
    start_uploader,
)
from runner.machine.errors import EspalierError, LeaseLost
from runner.machine.system_errors import system_error
from runner.records import journal as records
from runner.records.contracts import Outcome
from runner.records.journal import Journal, StopFlag

RESUME, HELD, FAILED = 75, records.HELD, 1


def run_cell(folder: Path) -> int:
    """Run the cell of `folder` until it ends or a signal stops it; return the exit code."""
    first = int(os.environ.get("RANK", "0")) == 0
    attempt = records.claim(folder) if first else None
    if first and attempt is None:
        print(f"{folder} is held by another worker", file=sys.stderr)
        return HELD
    journal = Journal(folder, attempt) if attempt is not None else None
    stop = _stop_on_signals()
    uploader, patience_s = _start_own_uploader(folder) if first else None, 120.0
    if journal is not None:
        journal.event("started", pid=os.getpid())
        journal.beat(stop)
    try:
        outcome = _work(folder, journal, stop)
        if outcome == "interrupted":  # the interrupter does not wait; `espalier sync` uploads
            patience_s = 3.0
        if journal is not None:
            journal.event(outcome)
        return RESUME if outcome == "interrupted" else 0
    except LeaseLost as error:
        print(error, file=sys.stderr)
        return HELD
    except KeyboardInterrupt:  # the second Ctrl-C, see `_interrupt`
        if journal is not None:
            journal.event("interrupted")
        patience_s = 0.0
        return RESUME
    except Exception as error:
        text = traceback.format_exc()
        with suppress(OSError):  # the disk may be full
            if journal is not None:
                journal.event(
                    "failed", error=type(error).__name__, message=str(error), traceback=text
                )
        told = system_error(error) if isinstance(error, OSError) else error
        print(str(told) if isinstance(told, EspalierError) else text, file=sys.stderr)
        return FAILED
    finally:
        for line in finish_uploader(uploader, patience_s):
            print(line, file=sys.stderr)


def _start_own_uploader(folder: Path) -> UploaderProcess | None:
    """Start an uploader unless the launcher runs one or nothing is tracked.

    The embedded SQLite store is left out, which jobs never open.
    """
    if UPLOADER_RUNS in os.environ:
        return None
    from runner.records.cells import load_cell  # noqa: PLC0415

    cell = load_cell(folder)
    run = cell.config
    if run.track.uri is None:
        run = replace(run, track=replace(run.track, uri="off"))
    return start_uploader(run, only=cell.fingerprint)


def _work(folder: Path, journal: Journal | None, stop: StopFlag) -> Outcome:
    """Set up the process by the cell's config, do its work and return the outcome."""
    import torch  # noqa: PLC0415

    from runner.machine.environment import first_record  # noqa: PLC0415
    from runner.machine.ranks import Ranks  # noqa: PLC0415
    from runner.records.cells import load_cell  # noqa: PLC0415

    cell = load_cell(folder)
    train = cell.config.train
    first_threads = first_record(folder).get("threads", torch.get_num_threads())
    threads = (train.threads if train else None) or first_threads
    torch.set_num_threads(min(threads, os.cpu_count() or 1))
    if train and train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if train and train.compile:  # on a local disk, shared by all cells
        cache = Path(tempfile.gettempdir()) / f"espalier-inductor-{os.getuid()}"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    ranks = Ranks(train.device if train else "auto")
    if journal is not None:
        _watch_system(journal, cell.config.track.system_every_s)
    outcome: Outcome = cell.config.work.run(cell, cell.inputs, journal, ranks, stop.is_set)
    ranks.leave()
    return outcome


def _stop_on_signals() -> StopFlag:
    """Return a flag that SIGTERM and SIGUSR2 set; so does Ctrl-C if there is no launcher."""
    stop = StopFlag()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, lambda *_: stop.set())
        if os.environ.get("ESPALIER_LAUNCHED"):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        else:
            signal.signal(signal.SIGINT, lambda *_: _interrupt(stop))
    return stop


def _interrupt(stop: StopFlag) -> None:
    """Make a run without a launcher save and end; a second Ctrl-C ends it as it is.

    Raises:
        KeyboardInterrupt: at the second Ctrl-C.
    """
    if stop.is_old():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.write(2, b"\nending without saving; the same command goes on from the last checkpoint\n")
        raise KeyboardInterrupt
    if not stop.is_set():
        os.write(2, b"\nstopping after this step; Ctrl-C again ends the run without saving\n")
    stop.set()


def _watch_system(journal: Journal, every_s: float) -> None:
    process = psutil.Process()

    def watch() -> None:
        process.cpu_percent()
        while True:
            values = {
                "system/rss_bytes": process.memory_info().rss,
                "system/cpu_percent": process.cpu_percent(),
                "system/memory_available_bytes": psutil.virtual_memory().available,
            } | _gpu_readings()
            with suppress(OSError):  # training reports a full disk itself
                journal.metrics(journal.step, values)
            if done.wait(every_s):
                return

    done = threading.Event()
    threading.Thread(target=watch, daemon=True, name="system metrics").start()


def _gpu_readings() -> dict[str, float]:
    import pynvml  # noqa: PLC0415

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return {}
    values: dict[str, float] = {}
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        values[f"system/gpu{index}_percent"] = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
        values[f"system/gpu{index}_bytes"] = pynvml.nvmlDeviceGetMemoryInfo(handle).used
        values[f"system/gpu{index}_watts"] = pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
    return values


def _ranks_of_srun() -> None:
    """Under srun with several tasks, set the variables that torchrun sets for torch.distributed."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "RANK" not in os.environ:
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
        os.environ["WORLD_SIZE"] = os.environ["SLURM_STEP_NUM_TASKS"]


if __name__ == "__main__":
    _ranks_of_srun()
    code = run_cell(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # see runner/machine/ranks.py: _WRAPPED
