"""A cell: one grid point, fully resolved and frozen to disk before it runs.

runs/<fingerprint>/cell.json    the config: all that a worker reads; between attempts its execution
                                half may be rewritten (more memory, another partition)
sweeps/<name>/cells.jsonl       the members of a sweep, so that missing cells are known
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from runner.data.pretrained import with_pretrained
from runner.machine import storage
from runner.machine.errors import ConfigError, DataError
from runner.machine.system_errors import write_error
from runner.machine.typed_json import read_record
from runner.records import journal
from runner.records.budget import check_steps
from runner.records.config import (
    RunConfig,
    execution_half,
    flatten,
    freeze,
    is_among,
    refuse_infinite,
    set_key,
    validate,
)
from runner.records.contracts import outputs
from runner.records.fingerprint import DIGITS, contents_of, derived, fingerprint, science
from runner.records.inputs import PREFIX, check_reference, split_reference
from runner.records.names import check_name, run_folder, sweep_folder

SCHEMA = 1
_RUN_ID = 32  # digits of an MLflow run id
_FINGERPRINT = re.compile(rf"[0-9a-f]{{{DIGITS}}}")


@dataclass(frozen=True)
class Cell:
    """A frozen config and its folder.

    Args:
        science: the dotted keys and values that the fingerprint is made of.
        label: the overrides that set the cell apart within its sweep.
        choices: the name chosen in each group, by the path of its node: {"precision": "nvfp4"};
            "nvfp4*" if keys of the node were set besides. In a sweep of stages also its `stage`.
    """

    config: RunConfig
    science: dict[str, Any]
    fingerprint: str
    label: str
    choices: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The run folder, absolute."""
        return run_folder(Path(self.config.root).resolve(), self.fingerprint)

    @property
    def sweep(self) -> Path:
        """Folder of the sweep that the cell belongs to by its `name`."""
        return sweep_folder(self.folder.parent.parent, self.config.name)

    @property
    def state(self) -> str:
        """The cell's state: new, running, interrupted, failed, diverged or finished."""
        return journal.state(self.folder)

    @property
    def inputs(self) -> dict[str, tuple[Path, ...]]:
        """The run folders of each input, by the input's name."""
        given = self.config.inputs.items()
        root = self.folder.parent.parent
        return {name: tuple(run_folder(root, run) for run in of.runs) for name, of in given}

    def waits_for(self) -> list[str]:
        """Return the fingerprints of the runs that must end before this cell starts."""
        runs = self.folder.parent
        return [run for given in self.config.inputs.values() for run in given.pending(runs)]

    @property
    def cancelled(self) -> Path:
        """The file whose existence keeps launchers from starting the cell."""
        return self.folder / "cancel"


def with_execution(cell: Cell, changes: Mapping[str, Any]) -> Cell:
    """Return `cell` with `changes` of execution keys, which cannot change its result.

    Raises:
        ConfigError: a key is unknown, or its value changes the result, which makes another cell.
    """
    node = freeze(cell.config)
    for key, value in changes.items():
        set_key(node, key, value)
    changed = replace(validate(node), root=cell.config.root)
    half = execution_half(node)
    science_keys = [key for key in changes if not is_among(key, half)]
    if science_keys or derived(changed) != derived(cell.config):
        key = science_keys[0] if science_keys else next(iter(changes))
        raise ConfigError(
            f"{key}={changes[key]} changes the result of {cell.label}: with it, it is another "
            "cell; give that to the sweep's own command"
        )
    return replace(cell, config=changed)


def make_cells(
    points: Iterable[tuple[str, dict[str, Any]]], choices: Sequence[Mapping[str, str]] = ()
) -> list[Cell]:
    """Return the cells of (label, composed node) points; repeated points become one cell.

    Args:
        choices: those of each point, see `Cell`; none by default.

    Raises:
        ConfigError: some points are invalid; each is named. Nothing has been written.
    """
    cells: dict[str, Cell] = {}
    problems = []
    contents: dict[str, Any] = {}  # so that text is hashed once, not once a cell
    for index, (label, node) in enumerate(points):
        try:
            run = validate(with_pretrained(node))
            check_name("name", run.name)
            refuse_infinite(run)
            for key, text in _references(run).items():
                check_reference(key, text, run.inputs)
            if run.train is not None and run.train.steps:  # other budgets: see `Planned.problem`
                check_steps(run, run.train.steps)
        except ConfigError as error:
            problems.append(f"{label}: {error}" if label else str(error))
            continue
        run = _with_full_fingerprints(run)
        keys = science(run, contents_of(run, contents))
        key = fingerprint(keys)
        chosen = choices[index] if choices else {}
        other = cells.setdefault(key, Cell(run, keys, key, label or run.name, chosen))
        problems += _lost_variation(other, run)
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return list(cells.values())


def check_outputs(cells: Sequence[Cell]) -> None:
    """Check that the inputs of `cells`, among them or run before, make the files that cells read.

    Raises:
        ConfigError: the work of an input makes no such file, or several where none is named.
    """
    known = {cell.fingerprint: cell for cell in cells}
    for cell in cells:
        for key, text in _references(cell.config).items():
            name, output = split_reference(text)
            fingerprint = cell.config.inputs[name].run
            folder = cell.folder.parent / fingerprint
            if fingerprint not in known and (folder / "cell.json").exists():
                known[fingerprint] = load_cell(folder)
            if fingerprint not in known:
                continue  # a run of elsewhere: its files are looked up when the cell runs
            made = outputs(known[fingerprint].config.work)
            if output not in made if output else len(made) != 1:
                raise ConfigError(
                    f"{cell.label}: {key}={text}: the work of run {fingerprint} makes the files: "
                    f"{', '.join(made) or 'none'}; name one as {PREFIX}{name}/FILE"
                )


def _lost_variation(cell: Cell, run: RunConfig) -> list[str]:
    """Return a message if `run`, a repetition of `cell`, differs in execution keys."""
    if run == cell.config:
        return []
    one, two = (flatten(freeze(config)) for config in (cell.config, run))
    half = execution_half(freeze(run))
    keys = [key for key in two if is_among(key, half) and one.get(key) != two[key]]
    values = ", ".join(f"{key}={one.get(key)} and {two[key]}" for key in keys)
    return (
        [
            f"{values} would be one cell, for these keys cannot change a result; give one value "
            "(or name= and root= of its own to each, and run them one after the other)"
        ]
        if keys
        else []
    )


def _references(run: RunConfig) -> dict[str, str]:
    """Return the keys of the data that may name an input, with their values."""
    named = {
        f"data.sources.{i}.path": getattr(source, "path", None)
        for i, source in enumerate(getattr(run.data, "sources", ()))
    }
    named["data.weights"] = getattr(run.data, "weights", None)
    return {key: str(value) for key, value in named.items() if str(value).startswith(PREFIX)}


def _with_full_fingerprints(run: RunConfig) -> RunConfig:
    """Return `run` with the abbreviated fingerprints of its inputs completed."""
    root = Path(run.root).resolve()
    inputs = {
        name: replace(
            given,
            runs=tuple(
                r if _FINGERPRINT.fullmatch(r) else find_cell(root, r).fingerprint
                for r in given.runs
            ),
        )
        for name, given in run.inputs.items()
    }
    return replace(run, inputs=inputs) if inputs else run


def freeze_cell(cell: Cell, *, overwrite: bool = False) -> None:
    """Write cell.json unless it exists; `overwrite` renews its execution half in any case."""
    file = cell.folder / "cell.json"
    if file.exists() and not overwrite:
        return
    record = {
        "schema": SCHEMA,
        "fingerprint": cell.fingerprint,
        "config": freeze(cell.config),
        "science": cell.science,
    }
    _make(file.parent)
    storage.write_atomically(file, json.dumps(record, indent=1))


def renew_cell(cell: Cell) -> None:
    """Freeze `cell` for its next attempt: with the execution half it has now, and not cancelled."""
    cell.cancelled.unlink(missing_ok=True)
    freeze_cell(cell, overwrite=True)


class _Frozen(TypedDict):
    fingerprint: str
    config: dict[str, Any]
    science: dict[str, Any]


class _Member(TypedDict):
    fingerprint: str
    label: str
    choices: NotRequired[dict[str, str]]


def read_cell(folder: Path) -> dict[str, Any]:
    """Return the record in cell.json, whose classes may be gone: fingerprint, config, science.

    Raises:
        DataError: it is missing or damaged.
    """
    file = folder / "cell.json"
    record = read_record(file, _Frozen)
    if record["fingerprint"] != folder.resolve().name:
        raise DataError(
            f"{file} is that of run {record['fingerprint']}: the folder of a run has its name"
        )
    return record


def load_cell(folder: Path) -> Cell:
    """Return the cell frozen in `folder`; its root is derived from where the folder lies now.

    Raises:
        DataError: cell.json is missing or damaged.
        ConfigError: a class that it names is gone, or a value is invalid.
    """
    record = read_cell(folder)
    root = folder.resolve().parent.parent
    try:
        config = replace(validate(record["config"]), root=str(root))
    except ConfigError as error:
        raise ConfigError(f"{folder / 'cell.json'}: {error}") from error
    return Cell(config, record["science"], record["fingerprint"], folder.name)


def join_sweep(name: str, cells: list[Cell]) -> Path:
    """Add `cells` to the sweep's list of members and return its folder."""
    folder = sweep_folder(Path(cells[0].config.root).resolve(), name)
    add_members(folder, map(member_row, cells))
    return folder


def member_row(cell: Cell) -> dict[str, Any]:
    """Return the line of `cell` in cells.jsonl."""
    choices = {"choices": dict(cell.choices)} if cell.choices else {}
    return {"fingerprint": cell.fingerprint, "label": cell.label, **choices}


def add_members(folder: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append to the sweep in `folder` those of `rows` that are not members yet.

    A member of before that has no choices gets those of its row, in a further line.
    """
    _make(folder)
    known = {row["fingerprint"]: row for row in storage.read_lines(folder / "cells.jsonl", _Member)}
    for row in rows:
        before = known.get(row["fingerprint"])
        if before is None:
            storage.append_line(folder / "cells.jsonl", row)
        elif "choices" in row and "choices" not in before:
            storage.append_line(folder / "cells.jsonl", before | {"choices": row["choices"]})


def members(root: Path, name: str) -> list[dict[str, Any]]:
    """Return the members of a sweep, a row (see `member_row`) for each cell.

    Raises:
        ConfigError: there is no such sweep; the existing ones are named.
    """
    folder = sweep_folder(root, name)
    rows = storage.read_lines(folder / "cells.jsonl", _Member)
    if not rows:
        lists = [file for file in folder.parent.glob("*/cells.jsonl") if file.stat().st_size]
        known = sorted(file.parent.name for file in lists) or ["none yet"]
        raise ConfigError(
            f"no sweep {name!r} under {folder.parent.resolve()}; there are: {', '.join(known)}"
        )
    return list({row["fingerprint"]: row for row in rows}.values())


def find_cell(root: Path, reference: str) -> Cell:
    """Return the cell with this run folder, fingerprint, beginning of one, or MLflow run id.

    Raises:
        ConfigError: no cell or more than one matches, or it cannot be read.
    """
    return load_cell(find_folder(root, reference))


def find_folder(root: Path, reference: str) -> Path:
    """Return the run folder that `reference` names as in `find_cell`; it need not be readable.

    Raises:
        ConfigError: no cell or more than one matches.
    """
    if "\0" not in reference and (Path(reference) / "cell.json").exists():
        return Path(reference)
    named = reference and all(c not in "/*?[\0" for c in reference)
    files = sorted((root / "runs").glob(f"{reference}*/cell.json")) if named else []
    if not files and len(reference) == _RUN_ID:
        runs = {cursor.parent.parent for cursor in _cursors(root, reference)}
        files = [run / "cell.json" for run in runs]
    if len(files) != 1:
        problem = f"{len(files)} cells begin with" if files else "no cell is"
        raise ConfigError(
            f"{problem} {reference!r} under {(root / 'runs').resolve()}; give a run folder or more "
            "of a fingerprint (`espalier status NAME` lists them)"
        )
    return files[0].parent


def _cursors(root: Path, run_id: str) -> Iterator[Path]:
    """Yield the cursors of the MLflow run `run_id`; one that is damaged is none of them."""
    for cursor in (root / "runs").glob("*/mlflow/*.json"):
        with suppress(DataError):
            if read_record(cursor).get("run_id") == run_id:
                yield cursor


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
