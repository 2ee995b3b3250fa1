"""Cells as SLURM array jobs; the journal, squeue and the lease say what became of them, no process does.

submitit gives the sbatch text. The payload is `python -m runner.worker FOLDER` from a snapshot of the code
taken at submission, so later edits change nothing in the queue. A worker that was asked to stop (USR2
before the time limit, SIGTERM at preemption) saves and exits with 75; its job then requeues itself.

    sweeps/<name>/submissions/0001.json     {"job": id, "cells": [fingerprints by array index]}
    snapshots/<hash>/                       the code that queued jobs run
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from models.config import config
from runner import journal
from runner.config import adapter
from runner.environment import revision
from runner.errors import ConfigError, StorageError
from runner.feed import finish_feeder, start_feeder
from runner.sweep.cells import Cell, freeze_cell, join_sweep
from runner.sweep.live import LiveTable
from runner.sweep.pool import CANCEL

_CLONE = Path(__file__).resolve().parents[2]
_PACKAGES = ("kernels", "models", "runner", "conf")
_TEARDOWN = """\
code=$?
if [ $code -eq 75 ] && [ ! -e "$CELL/cancel" ]; then
  # Waiting to be killed and queued again; where that is refused the exit code says what to do.
  scontrol requeue "$TASK" && sleep 300
fi
exit $code"""


@config
class SlurmConfig:
    """What a cell's job asks of SLURM, one array task a cell.

    Args:
        time_min: time limit of a job; a cell may take several of them.
        warning_s: so long before the limit the worker saves and the job is queued again.
        cpus, mem_gb, gpus: of one cell.
        max_running: cells at once.
        setup: shell lines before the worker starts (module load, source activate).
        srun: further arguments of srun; sbatch: further options of sbatch, {"mail-type": "END"}.
    """

    time_min: int = 60
    warning_s: int = 90
    cpus: int = 1
    mem_gb: float | None = None
    gpus: int = 0
    max_running: int = 256
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    setup: tuple[str, ...] = ()
    srun: tuple[str, ...] = ()
    sbatch: dict[str, str] | None = None


def submit(cells: Sequence[Cell], cfg: SlurmConfig) -> str:
    """Submit one array with a task for each frozen cell and return the job id.

    Raises:
        StorageError: sbatch refused, with its own words.
    """
    root = Path(cells[0].config.root).resolve()
    folder = root / "sweeps" / cells[0].config.name / "submissions"
    folder.mkdir(parents=True, exist_ok=True)
    code = snapshot(root)
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".cells", delete=False) as stream:
        stream.writelines(f"{cell.folder}\n" for cell in cells)
    script = Path(stream.name).with_suffix(".sh")
    script.write_text(_script(Path(stream.name), code, len(cells), cfg, cells[0].config.name))
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)  # fmt: skip
    if done.returncode:
        raise StorageError(f"sbatch refused {script}: {done.stderr.strip()}; nothing was submitted")
    job = done.stdout.strip().partition(";")[0]
    record = {"job": job, "cells": [cell.fingerprint for cell in cells]}
    (folder / f"{int(job):08d}.json").write_text(json.dumps(record))
    return job


def queued(root: Path, name: str) -> dict[str, str]:
    """Return the fingerprints of a sweep that squeue knows, each with its array task, `123_4`.

    Raises:
        StorageError: the controller does not answer: unknown is not gone.
    """
    known: dict[str, list[str]] = {}
    for file in (root / "sweeps" / name / "submissions").glob("*.json"):
        record = json.loads(file.read_text())
        known[record["job"]] = record["cells"]
    if not known:
        return {}
    command = ["squeue", "--me", "-h", "-r", "-o", "%F %K"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StorageError(f"squeue does not answer: {done.stderr.strip()}; try again when it does")
    tasks = (line.split() for line in done.stdout.splitlines())
    return {known[j][int(k)]: f"{j}_{k}" for j, k in tasks if j in known and k.isdigit()}


def _unfinished(root: Path, name: str) -> bool:
    """True where jobs are queued, or the controller does not answer for now."""
    try:
        return bool(queued(root, name))
    except StorageError:
        return True


def snapshot(root: Path) -> Path:
    """Copy the code (what git tracks and what it neither tracks nor ignores) to snapshots/<hash>/."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *_PACKAGES],
        cwd=_CLONE, capture_output=True, check=False,
    )  # fmt: skip
    if listed.returncode == 0:
        files = [_CLONE / name for name in listed.stdout.decode().split("\0") if name]
    else:  # not a clone: an unpacked archive
        files = [f for package in _PACKAGES for f in (_CLONE / package).rglob("*")]
    files = sorted(f for f in files if f.is_file() and f.suffix != ".pyc")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(_CLONE)}\0".encode() + file.read_bytes())
    final = root / "snapshots" / digest.hexdigest()[:16]
    if not final.exists():
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=final.parent, prefix=".partial-"))
        for file in files:
            target = partial / file.relative_to(_CLONE)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, target)
        (partial / "revision.json").write_text(json.dumps(revision()))
        try:
            os.rename(partial, final)
        except OSError:  # another launch was faster
            shutil.rmtree(partial, ignore_errors=True)
    return final


def parse(node: dict[str, Any]) -> SlurmConfig:
    """Return the typed keys of hydra.launcher.

    Raises:
        ConfigError: an unknown key (the valid ones are listed) or a wrong type.
    """
    from pydantic import ValidationError  # noqa: PLC0415

    valid = [f.name for f in fields(SlurmConfig)]
    unknown = [key for key in node if key not in valid]
    if unknown:
        raise ConfigError(f"hydra.launcher.{unknown[0]} is not a key; valid: {', '.join(valid)}")
    try:
        parsed: SlurmConfig = adapter(SlurmConfig).validate_python(node)
    except ValidationError as error:
        lines = [
            f"hydra.launcher.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()
        ]
        raise ConfigError("\n".join(lines)) from None
    return parsed


def _script(cells: Path, code: Path, count: int, cfg: SlurmConfig, name: str) -> str:
    # submitit has no public name for this.
    from submitit.slurm.slurm import _make_sbatch_string  # noqa: PLC0415

    setup = [
        *cfg.setup,
        f'CELL=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "{cells}")',
        'TASK="${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"',
        f'export PYTHONPATH="{code}${{PYTHONPATH:+:$PYTHONPATH}}" OMP_NUM_THREADS={cfg.cpus}',
        f'cd "{code}"',
        "trap '' TERM  # the worker hears it; this shell waits for its exit code",
    ]
    srun = ["srun", "--unbuffered", "--open-mode=append", '--output="$CELL/log.txt"', *cfg.srun]
    text: str = _make_sbatch_string(
        command=" ".join([*srun, sys.executable, "-m", "runner.worker", '"$CELL"']),
        folder=cells.parent, job_name=name, time=cfg.time_min, cpus_per_task=cfg.cpus,
        mem=None if cfg.mem_gb is None else f"{round(cfg.mem_gb * 1024)}M",
        gpus_per_node=cfg.gpus or None, partition=cfg.partition, account=cfg.account, qos=cfg.qos,
        constraint=cfg.constraint, exclude=cfg.exclude, signal_delay_s=cfg.warning_s,
        map_count=count, array_parallelism=cfg.max_running, stderr_to_stdout=True, use_srun=False,
        setup=setup, teardown=_TEARDOWN.splitlines(),
        additional_parameters=cfg.sbatch, wckey="",
    )  # fmt: skip
    # Flags without a value are beyond it, and it has an opinion on wckey.
    return text.replace("#SBATCH --wckey=''", "#SBATCH --requeue")


def launch_on_slurm(cells: list[Cell], cfg: SlurmConfig, *, retry_failed: bool, wait: bool) -> int:
    """Submit what is neither done nor queued, then show the table until all has ended; return the code."""
    console = Console(stderr=True)
    for cell in cells:
        freeze_cell(cell)
    name = join_sweep(cells[0].config.name, cells).name
    root = Path(cells[0].config.root).resolve()
    with journal.locked(root / "sweeps" / name / "submit.lock"):
        waiting = queued(root, name)
        again = ("new", "interrupted", *(["failed"] if retry_failed else []))
        todo = [c for c in cells if c.state in again and c.fingerprint not in waiting]
        for cell in todo:
            (cell.folder / CANCEL).unlink(missing_ok=True)
        if todo:
            console.print(f"{len(todo)} cells submitted as job {submit(todo, cfg)}")
    if len(waiting):
        console.print(f"{len(waiting)} cells are in the queue already")
    if not wait:
        return 0
    table, feeder = LiveTable(cells), start_feeder(cells[0].config)
    try:
        with Live(table.render(), console=console, refresh_per_second=2) as live:
            while _unfinished(root, name):
                time.sleep(2.0)
                live.update(table.render())
            live.update(table.render())
    except KeyboardInterrupt:
        console.print("left; the jobs go on. The same command, or `espalier status`, shows them.")
        return 130
    finally:
        finish_feeder(feeder)
    bad = [cell for cell in cells if cell.state not in ("finished", "diverged")]
    for cell in bad:
        console.print(f"[red]{cell.state}[/red] {cell.label}: see {cell.folder}/log.txt")
    return 1 if bad else 0
