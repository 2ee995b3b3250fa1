"""Runs one frozen cell: `python -m runner.launch.worker runs/<fingerprint>`. It reads that folder only.

Exit codes: 0 finished (or diverged: a result), 75 interrupted, resume me, 76 held by another
worker, 1 failed.
"""

import getpass
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from runner.launch.mlflow_process import FED, finish_feeder, start_feeder
from runner.machine.errors import EspalierError, LeaseLost
from runner.records import journal
from runner.records.journal import Journal, StopFlag

RESUME, HELD, FAILED = 75, journal.HELD, 1


def run_cell(folder: Path) -> int:
    """Train the cell of `folder` to its end or to a signal; return the exit code."""
    first = int(os.environ.get("RANK", "0")) == 0
    attempt = journal.claim(folder) if first else None
    if first and attempt is None:
        print(f"{folder} is held by another worker", file=sys.stderr)
        return HELD
    book = Journal(folder, attempt) if attempt is not None else None
    stop = _stop_on_signals()
    feeder, patience_s = _feed_server(folder) if first else None, 120.0
    if book is not None:
        book.event("started", pid=os.getpid())
        book.beat(stop)
    try:
        outcome = _train(folder, book, stop)
        if outcome == "interrupted":  # whoever interrupts does not wait; `espalier sync` delivers
            patience_s = 3.0
        if book is not None:
            book.event(outcome)
        return RESUME if outcome == "interrupted" else 0
    except LeaseLost as error:
        print(error, file=sys.stderr)
        return HELD
    except Exception as error:
        text = traceback.format_exc()
        with suppress(OSError):  # a full disk does not take its own obituary
            if book is not None:
                book.event("failed", error=type(error).__name__, message=str(error), traceback=text)
        print(str(error) if isinstance(error, EspalierError) else text, file=sys.stderr)
        return FAILED
    finally:
        finish_feeder(feeder, patience_s)


def _feed_server(folder: Path) -> subprocess.Popen[bytes] | None:
    """A job without a launcher beside it feeds an MLflow server itself; nobody opens SQLite from a job."""
    if FED in os.environ:
        return None
    from runner.records.cells import load_cell  # noqa: PLC0415

    cell = load_cell(folder)
    if cell.config.track.uri in (None, "off"):
        return None
    return start_feeder(cell.config, only=cell.fingerprint)


def _train(folder: Path, book: Journal | None, stop: StopFlag) -> str:
    import torch  # noqa: PLC0415

    from runner.learn.trainer import Trainer  # noqa: PLC0415
    from runner.machine.environment import changes, describe, first_of  # noqa: PLC0415
    from runner.machine.ranks import Ranks  # noqa: PLC0415
    from runner.records.cells import load_cell  # noqa: PLC0415

    cell = load_cell(folder)
    cfg = cell.config
    first = first_of(folder)
    threads = cfg.train.threads or first.get("threads", torch.get_num_threads())
    torch.set_num_threads(min(threads, os.cpu_count() or 1))
    if cfg.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if cfg.train.compile:  # on this machine's own disk, and kept from cell to cell
        cache = Path(tempfile.gettempdir()) / f"espalier-inductor-{getpass.getuser()}"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    ranks = Ranks(cfg.train.device)
    trainer = Trainer(cell, book, ranks)
    if book is not None:
        facts = describe() | {"world": ranks.world, "device": str(ranks.device)}
        facts |= {"parallel": cfg.train.parallel, "compile": cfg.train.compile}
        facts["micro_batch"] = trainer.micro_batch
        odd = changes(first, facts)
        if odd:
            book.event("not_bit_identical", changes=odd)
            print(f"resumed, but not bit-identically: {'; '.join(odd)}", file=sys.stderr)
        (book.attempt / "environment.json").write_text(json.dumps(facts, indent=1))
        _write_summary(folder, trainer)
        _watch_system(book, trainer, cfg.track.system_every_s)
    outcome = trainer.fit(stop.is_set)
    ranks.leave()
    return outcome


def _write_summary(folder: Path, trainer: Any) -> None:
    """What analysis reads and never recomputes."""
    (folder / "summary.json").write_text(json.dumps(asdict(trainer.budget), indent=1))
    table = [asdict(choice) for choice in trainer.precision.table]
    if table:
        (folder / "precision.json").write_text(json.dumps(table, indent=1))
    (folder / "tokenizer.json").write_text(trainer.corpus.tokenizer.dumps(), encoding="utf-8")


def _stop_on_signals() -> StopFlag:
    """SIGTERM and SIGUSR2 ask for a checkpoint at the next step; Ctrl-C is the launcher's affair."""
    stop = StopFlag()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, lambda *_: stop.set())
        if os.environ.get("ESPALIER_LAUNCHED"):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        else:
            signal.signal(signal.SIGINT, lambda *_: stop.set())
    return stop


def _watch_system(book: Journal, trainer: Any, every_s: float) -> None:
    process = psutil.Process()

    def watch() -> None:
        process.cpu_percent()
        while True:
            values = {
                "system/rss_bytes": process.memory_info().rss,
                "system/cpu_percent": process.cpu_percent(),
                "system/memory_available_bytes": psutil.virtual_memory().available,
            } | _gpu_readings()
            with suppress(OSError):  # training itself meets the full disk, and says so
                book.metrics(trainer.progress.step, values)
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
    """Under srun with several tasks, give torch.distributed the names that torchrun would give."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "RANK" not in os.environ:
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
        os.environ["WORLD_SIZE"] = os.environ["SLURM_STEP_NUM_TASKS"]


if __name__ == "__main__":
    _ranks_of_srun()
    code = run_cell(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # see runner/machine/ranks.py: _KEPT
