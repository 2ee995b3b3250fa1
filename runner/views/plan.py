"""The plan: each cell's state, sizes, memory, disk, time and problems, before anything runs.

The time of a cell comes from the speed of finished runs under the same root, at the same precision
and on the same hardware (`speed.py`); without such runs, from a range of MFU on the GPU that
`resources.gpu` names; else it is unknown.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rich.console import Console
from rich.table import Table

from models.precision import Choice
from models.sizes import check_formulas, num_trained_parameters
from runner.learn.memory import predicted_bytes
from runner.machine.errors import ConfigError, StorageError
from runner.machine.hardware import Gpu, gpu_named
from runner.records import contracts, journal
from runner.records.budget import Budget, check_steps, read_budget
from runner.records.cells import Cell
from runner.records.drift import drift, drifted
from runner.records.fingerprint import earlier_fingerprint
from runner.views import disk
from runner.views.precision_table import choices_table, resolve
from runner.views.speed import Key, Speed, expected_flops_per_s, hardware_key, precision_key, speeds

_WILL_RUN, _ENDED = ("new", "interrupted"), ("finished", "diverged", "drifted")
_FILE_WIDTH = 240  # columns of a plan that is not printed to a terminal
_MFU = (0.2, 0.5)  # range for a GPU without finished runs: that of decoders of 0.1B to 7B
_REMARKS: dict[tuple[str, int, int], str | None] = {}  # by (model, vocabulary, sequence length)
_WEIGHT_BYTES = 4  # per parameter, in fp32
_CHECKPOINT_BYTES = 3 * _WEIGHT_BYTES  # the weight and AdamW's two moments


@dataclass(frozen=True)
class Planned:
    """A cell with its predicted sizes, memory, disk and time.

    Args:
        speeds: those of this root's finished runs.
        machine_gb: memory of the machine, for cells without resources.mem_gb (None: unknown).
        done_flops: training FLOPs of the run that the cell continues.
    """

    cell: Cell
    speeds: Mapping[Key, Sequence[Speed]]
    machine_gb: float | None = None
    done_flops: int = 0

    @cached_property
    def state(self) -> str:
        """The cell's state, or "invalid" (it cannot run) or "drifted" (see `records/drift.py`)."""
        state = self.cell.state
        if state == "finished" and drift(self.cell.folder):
            return "drifted"
        return "invalid" if state in _WILL_RUN and self.problem else state

    @cached_property
    def budget(self) -> Budget | None:
        """The sizes, None while the vocabulary is unknown (its tokenizer is not trained yet)."""
        summary = self.cell.folder / "summary.json"
        if summary.exists():
            return read_budget(summary)
        return contracts.plan(self.cell.config.work, self.cell.config)

    @property
    def flops(self) -> int | None:
        """The training FLOPs left to do, None while the sizes are unknown."""
        return None if self.budget is None else max(0, self.budget.flops - self.done_flops)

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """The resolved precision, () if there is none; ValueError if it does not fit the model."""
        if self.cell.config.precision is None or self.cell.config.model is None:
            return ()
        vocab = self.budget.vocab_size if self.budget else 256
        return resolve(self.cell.config, vocab)

    @cached_property
    def memory_bytes(self) -> int | None:
        """The predicted peak memory of a rank's GPU or, without one, process; None if unknown."""
        if self.budget is None:
            return None
        run = self.cell.config
        try:
            return predicted_bytes(
                run, self.budget.vocab_size, steps=self.budget.steps, gpu=bool(run.resources.gpus)
            )
        except Exception:  # a model whose shapes depend on values cannot run without them
            return None

    @cached_property
    def disk_bytes(self) -> int | None:
        """The largest size of all checkpoints, with one being written beside those retained.

        A cell without steps keeps the weights of a model made elsewhere, nothing of a run's.
        """
        if self.budget is None or self.cell.config.train is None:
            return None
        retention = self.cell.config.train.checkpoint
        trained = num_trained_parameters(self.cell.config.model, self.budget.vocab_size)
        if not self.budget.steps:
            return 0 if "init" in self.cell.config.inputs else _WEIGHT_BYTES * trained
        count = retention.keep_last + retention.keep_best + 1
        if retention.keep_every:
            count += self.budget.steps // retention.keep_every
        return int(count * _CHECKPOINT_BYTES * trained)

    @property
    def speed_key(self) -> Key:
        """The precision and hardware of the runs that tell its time."""
        return precision_key(self.cell.science), hardware_key(self.cell.config.resources.gpu)

    @cached_property
    def seconds(self) -> tuple[float, float] | None:
        """The training time as (least, most), None if unknown."""
        if self.budget is None or self.flops is None:
            return None
        resources = self.cell.config.resources
        known = self.speeds.get(self.speed_key, ())
        expected = expected_flops_per_s(known, self.budget.flops / max(1, self.budget.steps))
        if expected is not None:
            return self.flops / expected, self.flops / expected
        gpu = gpu_named(resources.gpu) if resources.gpu else None
        precision = self.cell.config.precision
        peak = gpu.peak(precision.compute) if gpu and precision else None
        if peak is None:
            return None
        low, high = (peak * resources.num_processes * share for share in _MFU)
        return self.flops / high, self.flops / low

    @cached_property
    def problem(self) -> str | None:
        """The reason why the cell cannot run, with the key to change; None if it can."""
        run, resources = self.cell.config, self.cell.config.resources
        gpu = gpu_named(resources.gpu) if resources.gpu else None
        if gpu and run.precision and gpu.peak(run.precision.compute) is None:
            return (
                f"precision.compute={run.precision.compute} is not supported by "
                f"resources.gpu={resources.gpu}"
            )
        try:
            self.choices  # noqa: B018
            if self.budget is not None:
                check_steps(run, self.budget.steps)
            self.remark  # noqa: B018
        except ValueError as error:
            return str(error)
        return self._lack_of_memory(gpu)

    @cached_property
    def remark(self) -> str | None:
        """What is odd about the formulas of somebody else's model; None if nothing is.

        ValueError if they are wrong. Those of our own models are held by tests.
        """
        model, train = self.cell.config.model, self.cell.config.train
        ours = type(model).__module__.partition(".")[0] == "models"
        if model is None or train is None or ours or self.budget is None:
            return None
        key = (str(model), self.budget.vocab_size, train.sequence_length)
        if key not in _REMARKS:
            _REMARKS[key] = check_formulas(model, *key[1:])
        return _REMARKS[key]

    def _lack_of_memory(self, gpu: Gpu | None) -> str | None:
        resources = self.cell.config.resources
        if self.memory_bytes is None:
            return None
        if resources.gpus:
            limit_gb, need = gpu.memory_gb if gpu else None, self.memory_bytes
            device = f"resources.gpu={resources.gpu}"
        else:
            limit_gb = resources.mem_gb or self.machine_gb
            need = self.memory_bytes * resources.per_node
            given = resources.mem_gb
            device = f"resources.mem_gb={given:g}" if given else "this machine"
        if limit_gb is None or need <= limit_gb * 1e9:
            return None
        return (
            f"needs about {need / 1e9:.1f} GB but {device} has {limit_gb:.4g}; "
            "lower train.micro_batch, or give more"
        )


def check(cells: Sequence[Cell], machine_gb: float | None = None) -> list[str]:
    """Check that `cells` can run, before anything is submitted; return what is odd about them.

    Args:
        machine_gb: see `Planned`.

    Raises:
        ConfigError: some cells cannot run; each is named with the key to change.
        StorageError: the disk has no room for their checkpoints.
    """
    rows = [Planned(cell, {}, machine_gb) for cell in cells]
    bad = [f"{row.cell.label}: {row.problem}" for row in rows if row.state == "invalid"]
    if bad:
        raise ConfigError("\n".join(bad))
    short = _short_of_disk(rows)
    if short:
        raise StorageError(short)
    return _remarks(rows)


def _remarks(rows: Sequence[Planned]) -> list[str]:
    remarks = (row.remark for row in rows if not row.problem)
    return list(dict.fromkeys(remark for remark in remarks if remark))


def _short_of_disk(rows: Sequence[Planned]) -> str | None:
    if not rows:
        return None
    root = Path(rows[0].cell.config.root).resolve()
    need, free = sum(row.disk_bytes or 0 for row in rows), disk.free_bytes(root)
    if need <= free:
        return None
    return (
        f"checkpoints may take {_bytes(need)} but {root} has {_bytes(free)} left for you; "
        "lower train.checkpoint.keep_last, or set root="
    )


def show_plan(cells: Sequence[Cell], *, time_limited: bool) -> None:
    """Print the plan of `cells`; see `plan`. In a file or a pipe lines are not folded."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    console.print(*plan(cells, time_limited=time_limited), sep="\n")


def plan(cells: Sequence[Cell], *, time_limited: bool) -> list[Table | str]:
    """Return what to print: the table of `cells`, the totals of those to run, precision tables.

    Args:
        time_limited: the cells run in jobs that end after `resources.timeout_min`.
    """
    root = Path(cells[0].config.root).resolve()
    known = speeds(root, {Planned(cell, {}).speed_key for cell in cells})
    rows: list[Planned] = []
    for cell in cells:
        rows.append(Planned(cell, known, done_flops=_continued(cell, rows)))
    table = Table(box=None, pad_edge=False)
    columns = ("cell", "state", "parameters", "steps", "tokens", "FLOPs", "memory", "disk", "time")
    for column in columns:
        table.add_column(column, justify="left" if column in ("cell", "state") else "right")
    for row in rows:
        sizes = row.budget
        counts: tuple[str, ...] = ("?",) * 4
        if sizes:
            numbers = (sizes.num_parameters, sizes.steps, sizes.tokens)
            counts = (*map(_short, numbers), f"{row.flops:.2e}")
        state = f"[red]{row.state}[/]" if row.state == "invalid" else row.state
        table.add_row(
            row.cell.label,
            state,
            *counts,
            *_needs(row),
        )
    totals = [*_totals(rows), *(_outlasting(rows) if time_limited else ())]
    return [table, "\n".join(totals), *_precisions(rows)]


def _needs(row: Planned) -> tuple[str, str, str]:
    """Return the memory, disk and time of a cell, blanks if it has ended: it needs none of them."""
    if row.state in _ENDED:
        return "", "", ""
    return _bytes(row.memory_bytes), _bytes(row.disk_bytes), _range(row.seconds)


def _continued(cell: Cell, before: Sequence[Planned]) -> int:
    """Return the training FLOPs of the run that `cell` continues, 0 if it continues none."""
    start = cell.config.inputs.get("init")
    if start is None or start.take != "everything":
        return 0
    planned = [
        row.budget.flops for row in before if row.cell.fingerprint == start.run and row.budget
    ]
    summary = cell.folder.parent / start.run / "summary.json"
    if not planned and summary.exists():
        planned = [read_budget(summary).flops]
    return planned[0] if planned else 0


def _precisions(rows: list[Planned]) -> Iterator[Table | str]:
    """Yield a heading that names the cells and a table for each different resolved precision."""
    recipes: dict[tuple[Choice, ...], list[str]] = {}
    for row in rows:
        if row.state != "invalid" and row.choices:
            recipes.setdefault(row.choices, []).append(row.cell.label)
    for choices, labels in recipes.items():
        more = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
        yield f"\nprecision of {labels[0]}{more}:"
        yield choices_table(choices)


def _totals(rows: list[Planned]) -> list[str]:
    states = Counter(row.state for row in rows)
    counts = ", ".join(f"{n} {state}" for state, n in sorted(states.items()))
    todo = [row for row in rows if row.state in _WILL_RUN]
    flops = sum(row.flops for row in todo if row.flops)
    known = [(row, row.seconds) for row in todo if row.seconds is not None]
    lines = [f"{len(rows)} cells ({counts}); to run: {flops:.2e} FLOPs"]
    for where, gpu in (("of GPU time", True), ("on one worker", False)):
        some = [(r, s) for r, s in known if bool(r.cell.config.resources.gpus) is gpu]
        if some:
            total = [
                sum(s[i] * (r.cell.config.resources.num_processes if gpu else 1) for r, s in some)
                for i in (0, 1)
            ]
            lines[0] += f", about {_range((total[0], total[1]))} {where}"
    if len(known) < len(todo):
        unknown = len(todo) - len(known)
        lines[0] += f"; {unknown} cells of unknown time (no finished run on this hardware yet)"
    short = _short_of_disk(todo)
    if short:
        lines.append(f"[red]{short}[/]")
    lines += [
        f"[red]invalid[/] {row.cell.label}: {row.problem}" for row in rows if row.state == "invalid"
    ]
    lines += _remarks(rows)
    lines += _earlier_runs(rows)
    return lines + drifted([row.cell for row in rows])


def _outlasting(rows: list[Planned]) -> Iterator[str]:
    """Yield a line on the cells to run that take longer than a job may."""
    limits = [
        (r.seconds, r.cell.config.resources.timeout_min) for r in rows if r.state in _WILL_RUN
    ]
    longer = sum(s is not None and s[1] > minutes * 60 for s, minutes in limits)
    if longer:
        yield f"{longer} cells outlast resources.timeout_min and take several SLURM jobs each"


def _earlier_runs(rows: list[Planned]) -> Iterator[str]:
    """Yield a line for each new cell that ran before its samples per forward pass were hashed."""
    for row in rows:
        earlier = earlier_fingerprint(row.cell.science) if row.state == "new" else None
        if earlier and journal.attempts(row.cell.folder.parent / earlier):
            yield (
                f"{row.cell.label} ran as {earlier}, before the samples of a forward pass counted "
                "under such a model or precision; to keep it: "
                f"espalier adopt {earlier} EXPERIMENT --reason '...'"
            )


def _short(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:g}"


def _bytes(value: int | None) -> str:
    if value is None:
        return "?"
    return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.1f} MB"


def _range(seconds: tuple[float, float] | None) -> str:
    if seconds is None:
        return "?"
    low, high = map(_time, seconds)
    return low if low == high else f"{low} to {high}"


def _time(seconds: float) -> str:
    """Return a duration in its natural unit: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
