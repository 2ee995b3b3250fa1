"""Cells as SLURM array jobs; their states come from the journal, the lease, squeue and sacct.

submitit writes the sbatch text. A task is a pool (`runner/launch/slurm_job.py`) over one cell or
`cells_per_job` cells, run from a snapshot of the code. Cells with the same `resources` form an
array, split by MaxArraySize; what the submit limit refuses is submitted as the queue drains.

    sweeps/<name>/submissions/<job>.json     {"job": id, "tasks": [[fingerprints], by array index]}
"""

import json
import math
import re
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.config import config
from runner.grid.resources import group_by_resources
from runner.launch.backend import View
from runner.launch.slurm_limit import Array, Chain, chains
from runner.launch.slurm_script import sbatch_script, submission_environment
from runner.launch.snapshot import snapshot
from runner.machine import storage
from runner.machine.errors import ConfigError, StorageError
from runner.records import journal
from runner.records.cells import Cell, renew_cell
from runner.records.config import validate
from runner.records.slurm_queue import at_once, queued, record_lost_cells

if TYPE_CHECKING:
    from runner.grid.resources import ResourcesConfig  # torch: seconds
    from runner.launch.study import Study

_POLL_S = 2.0
_EMPTY_POLLS = 5  # a controller that has just restarted may list no jobs for some seconds
_LIMIT = re.compile(r"(?i)limit|violates accounting|QOS")


@config
class SlurmConfig:
    """Options of submission; the CPUs, memory, GPUs and time of a cell are in `resources`.

    Args:
        warning_s: seconds before its time limit at which a job saves and is requeued.
        cells_per_job: cells of one array task.
        at_once: cells of a task that run at the same time on its GPU.
        max_running: the most tasks of the sweep that run at the same time.
        partition, account, qos, constraint, gres, exclude, mail_user, mail_type: as in sbatch.
        setup: shell lines before the worker starts (module load, source activate); the first that
            fails ends the job.
        srun: further arguments of srun.
        sbatch: further options of sbatch: {"mail-type": "END"}.
        wait: show the table until all cells have ended; Ctrl-C leaves, the jobs continue.
    """

    warning_s: int = 90
    cells_per_job: int = 1
    at_once: int = 1
    max_running: int = 256
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gres: str | None = None
    exclude: str | None = None
    mail_user: str | None = None
    mail_type: str | None = None
    setup: tuple[str, ...] = ()
    srun: tuple[str, ...] = ()
    sbatch: dict[str, str | int | float] | None = None
    wait: bool = True

    def __post_init__(self) -> None:
        for name in ("cells_per_job", "at_once", "max_running"):
            if getattr(self, name) < 1:
                raise ValueError(f"hydra.launcher.{name}={getattr(self, name)} must be at least 1")


class Slurm:
    """The backend of a cluster: submits cells that are neither done nor queued, then watches."""

    memory_gb: float | None = None  # nodes differ; resources.mem_gb is a cell's share

    def __init__(self, cfg: SlurmConfig) -> None:
        self.cfg, self.waits, self._left = cfg, cfg.wait, False

    def record(self) -> dict[str, Any]:
        """Return the options of submission."""
        return {"launcher": "slurm", "keys": asdict(self.cfg)}

    def check(self, cells: Sequence[Cell]) -> None:
        """See `Backend`."""
        limit_min = min((cell.config.resources.timeout_min for cell in cells), default=math.inf)
        if self.cfg.warning_s >= 60 * limit_min:
            raise ConfigError(
                f"hydra.launcher.warning_s={self.cfg.warning_s} is not below the time limit, "
                f"resources.timeout_min={limit_min}: a job would be asked to save and end as soon "
                "as it starts; raise the limit or lower the warning"
            )

    def prepare(self) -> None:
        """Do nothing: jobs start their own workers."""

    def run(self, cells: list[Cell], again: tuple[str, ...], view: View) -> None:
        """Submit the cells and, with `wait`, return when the queue holds none of them."""
        root = Path(cells[0].config.root).resolve()
        name = cells[0].config.name
        rest = self._submit(root, name, cells, again, view)
        for tasks in self._poll(root, name, lambda: cells, view):
            if rest and tasks is not None:
                rest = self._submit(root, name, rest, again, view)

    def run_study(self, study: "Study", view: View) -> None:
        """Submit slots, each an array task that runs trial after trial, and wait for their end.

        If slots of an earlier launch are queued, wait for them first.
        """
        base = validate(study.base)
        root, name = Path(base.root).resolve(), study.folder.name
        for _ in range(2):
            submitted = self._submit_slots(study, base.resources, root, view)
            for _ in self._poll(root, name, study.cells, view):
                pass
            if submitted or not self.waits or self._left or study.is_over():
                return

    def _submit_slots(
        self, study: "Study", need: "ResourcesConfig", root: Path, view: View
    ) -> bool:
        """Submit slots for the open trials unless some are queued; return whether it did."""
        prefix, name = f"{study.fingerprint}-slot-", study.folder.name
        with storage.locked(study.folder / "submit.lock"):
            if any(task.startswith(prefix) for task in queued(root, name)):
                return False
            slots = min(self.cfg.max_running, study.num_open(), _max_array_size())
            tasks = [{"study": str(study.folder), "fingerprint": study.fingerprint}] * slots
            names = [[f"{prefix}{number}"] for number in range(slots)]
            job = self._sbatch(root, name, snapshot(root), tasks, names, need, Array(slots, slots))
            view.print(f"{slots} slots submitted as job {job}")
            return True

    def _poll(
        self, root: Path, name: str, cells: Callable[[], list[Cell]], view: View
    ) -> Iterator[dict[str, str] | None]:
        """Update the table and yield the queued tasks by fingerprint, until there are none.

        Yields None while SLURM does not answer.
        """
        empty_polls = 0
        while self.waits and not self._left:
            end = time.monotonic() + _POLL_S
            while not self._left and time.monotonic() < end:
                time.sleep(0.1)
            shown = cells()
            tasks = record_lost_cells(root, name, shown)
            if tasks is not None:
                view.table.queued = lambda tasks=tasks: tasks  # type: ignore[misc]
            view.refresh()
            yield tasks
            empty_polls = empty_polls + 1 if tasks == {} else 0
            ended = {cell.state for cell in shown} <= set(journal.ENDED)
            if empty_polls >= _EMPTY_POLLS or (empty_polls and ended):
                return

    def leave(self) -> str:
        """Stop watching."""
        self._left = True
        return "left; the jobs go on. The same command, or `espalier status`, shows them."

    def _submit(
        self, root: Path, name: str, cells: list[Cell], again: tuple[str, ...], view: View
    ) -> list[Cell]:
        """Submit the cells whose state is in `again`; return those that the submit limit refused.

        A lock keeps concurrent launches from submitting a cell twice.

        Raises:
            StorageError: squeue does not answer, or sbatch fails.
        """
        with storage.locked(root / "sweeps" / name / "submit.lock"):
            jobs = record_lost_cells(root, name, cells)
            if jobs is None:
                raise StorageError(
                    "squeue does not answer; nothing was submitted, try again when it does"
                )
            already_queued = [cell for cell in cells if cell.fingerprint in jobs]
            todo = [c for c in cells if c.state in again and c.fingerprint not in jobs]
            for cell in todo:
                renew_cell(cell)
            if already_queued:
                view.print(f"{len(already_queued)} cells are in the queue already")
            return self._submit_arrays(root, name, todo, dict(jobs), view) if todo else []

    def _submit_arrays(
        self, root: Path, name: str, todo: list[Cell], jobs: dict[str, str], view: View
    ) -> list[Cell]:
        """Submit arrays by depth and resources; return the cells that the submit limit refused.

        Args:
            jobs: the array tasks of queued cells by fingerprint; those submitted are added.
        """
        code, refused = snapshot(root), list[Cell]()
        live = at_once(root, name, jobs)
        for level in _by_depth(todo):
            ready = [cell for cell in level if _has_inputs(cell, jobs)]
            missing = {cell.fingerprint for cell in refused}
            refused += [cell for cell in level if missing.intersection(cell.waits_for())]
            size = self.cfg.cells_per_job
            groups = [
                [group[i : i + size] for i in range(0, len(group), size)]
                for group in group_by_resources(ready).values()
            ]
            lines = chains([len(tasks) for tasks in groups], self.cfg.max_running, live)
            for tasks, chain in zip(groups, lines, strict=True):
                while tasks:
                    array, job = self._submit_most(root, name, code, tasks, jobs, chain)
                    if array is None:
                        refused += [cell for task in tasks for cell in task]
                        number = len(refused)
                        view.print(
                            f"{number} cells wait for the submit limit and follow as jobs end"
                        )
                        break
                    chain.add(job)
                    live[job] = array.at_once
                    sent = [cell for task in tasks[: array.tasks] for cell in task]
                    jobs |= {cell.fingerprint: job for cell in sent}
                    view.print(f"{len(sent)} cells submitted as job {job} ({array.tasks} tasks)")
                    tasks = tasks[array.tasks :]
        return refused

    def _submit_most(
        self,
        root: Path,
        name: str,
        code: Path,
        tasks: list[list[Cell]],
        jobs: dict[str, str],
        chain: Chain,
    ) -> tuple[Array | None, str]:
        """Submit as many of the first `tasks` as SLURM accepts; return the array and its job id.

        Returns (None, "") where the submit limit leaves room for none.
        """
        count = min(len(tasks), _max_array_size())
        runs = {run for task in tasks for cell in task for run in cell.waits_for()}
        inputs = sorted({jobs[run].partition("_")[0] for run in runs if run in jobs})
        while count:
            try:
                array = chain.array(count, inputs)
                folders = [[str(cell.folder) for cell in task] for task in tasks[:count]]
                names = [[cell.fingerprint for cell in task] for task in tasks[:count]]
                need = tasks[0][0].config.resources
                return array, self._sbatch(root, name, code, folders, names, need, array)
            except StorageError as error:
                if not _LIMIT.search(str(error)) or (count == 1 and not queued(root, name)):
                    raise
                count //= 2
        return None, ""

    def _sbatch(
        self,
        root: Path,
        name: str,
        code: Path,
        tasks: Sequence[Any],
        names: list[list[str]],
        need: "ResourcesConfig",
        array: Array,
    ) -> str:
        """Submit one array and return its job id.

        Args:
            tasks: the line of each task that `runner/launch/slurm_job.py` reads.
            names: the fingerprints of each task.

        Raises:
            StorageError: sbatch refused; the message is its own.
        """
        folder = root / "sweeps" / name / "submissions"
        folder.mkdir(parents=True, exist_ok=True)
        listing = folder / f"{secrets.token_hex(4)}.tasks"
        listing.write_text("".join(json.dumps(task) + "\n" for task in tasks))
        script = listing.with_suffix(".sh")
        script.write_text(sbatch_script(listing, code, need, self.cfg, name, array))
        done = subprocess.run(
            ["sbatch", "--parsable", str(script)],
            capture_output=True,
            text=True,
            check=False,
            env=submission_environment(),
        )
        if done.returncode:
            for file in (script, listing):
                file.unlink()
            raise StorageError(
                f"sbatch refused: {done.stderr.strip()}; the cells are frozen, run the same "
                "command again when that is mended"
            )
        job = done.stdout.strip().partition(";")[0]
        record = {"job": job, "tasks": names, "at_once": array.at_once}
        storage.write_atomically(folder / f"{int(job):08d}.json", json.dumps(record))
        return job


def _by_depth(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Return the cells in levels: those without inputs among them, those that need these, ..."""
    levels, left = [], list(cells)
    while left:
        names = {cell.fingerprint for cell in left}
        level = [c for c in left if not names.intersection(c.waits_for())]
        levels.append(level)
        left = [c for c in left if c not in level]
    return levels


def _has_inputs(cell: Cell, jobs: Mapping[str, str]) -> bool:
    """Return whether every input of `cell` has ended or is queued."""
    return all(run in jobs for run in cell.waits_for())


def _max_array_size() -> int:
    """Return the most tasks of one array."""
    done = subprocess.run(
        ["scontrol", "show", "config"], capture_output=True, text=True, check=False
    )
    match = re.search(r"MaxArraySize\s*=\s*(\d+)", done.stdout)
    return int(match[1]) if match else 1001
