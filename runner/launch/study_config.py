"""The keys of an Optuna study, what makes two studies the same, and the record that jobs read.

sweeps/<name>/study.json    {"latest": fingerprint, "studies": {fingerprint: {study, base, ...}}}
"""

import difflib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from models.config import config
from runner.grid.language import Axis
from runner.machine import storage
from runner.machine.errors import ConfigError, DataError, EspalierError
from runner.machine.typed_json import checked, read_record
from runner.records.cells import Cell, make_cells
from runner.records.config import flatten, freeze, is_among, typed
from runner.records.difference import difference
from runner.records.fingerprint import fingerprint

_FILE = "study.json"


@config
class StudyConfig:
    """Keys of `hydra/sweeper=optuna`.

    Args:
        space: the axis of each key drawn, as in a grid's draw.
        metric: the metric optimised, by its last value in a run.
        direction: minimize or maximize.
        trials: the number of cells, including pruned and diverged ones and invalid points.
        sampler: tpe (tree-structured Parzen estimator) or random.
        pruner: median stops a trial whose metric is worse than the median of the others at the
            same step.
        startup: the first trials, which are drawn at random and not pruned.
        seed: seeds the sampler.
    """

    space: dict[str, Axis]
    metric: str = "val_loss"
    direction: Literal["minimize", "maximize"] = "minimize"
    trials: int = 20
    sampler: Literal["tpe", "random"] = "tpe"
    pruner: Literal["none", "median"] = "none"
    startup: int = 5
    seed: int = 0


def identity(cfg: StudyConfig, base: Cell) -> dict[str, Any]:
    """Return what a study is hashed by: space, metric, direction and the base cell's science.

    The keys drawn are left out of the base, whose values they replace.
    """
    space = flatten({key: asdict(axis) for key, axis in cfg.space.items()})
    keys = {f"space.{key}": value for key, value in space.items()}
    keys |= {"metric": cfg.metric, "direction": cfg.direction}
    keys |= {k: v for k, v in base.science.items() if not is_among(k, cfg.space)}
    as_read: dict[str, Any] = json.loads(json.dumps(keys))
    return as_read


def check_space(cfg: StudyConfig, base: Cell) -> None:
    """Check that the keys drawn are keys of the base config.

    Raises:
        ConfigError: one is not; else each point drawn would be invalid.
    """
    known = flatten(freeze(base.config))
    parents = [key for key, value in known.items() if value is None or isinstance(value, list)]
    for key in cfg.space:
        if key in known or is_among(key, parents) or any(k.startswith(f"{key}.") for k in known):
            continue
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "see `espalier diff` for the keys of a cell"
        raise ConfigError(f"hydra.sweeper.space.{key}: {key} is not a key of this config; {hint}")


def save_study(folder: Path, cfg: StudyConfig, base: Cell) -> list[str]:
    """Record a study as the latest of the sweep in `folder`.

    Returns:
        A line for each key in which it differs from the one before, if that is another study.

    Raises:
        ConfigError: a key drawn is none of the base config.
    """
    check_space(cfg, base)
    keys = identity(cfg, base)
    name = fingerprint(keys)
    folder.mkdir(parents=True, exist_ok=True)
    with storage.locked(folder / "study.lock"):
        record = _read(folder)
        before = record["studies"].get(record["latest"], {})
        entry = {"study": asdict(cfg), "base": freeze(base.config), "identity": keys}
        entry["choices"] = dict(base.choices)
        # A study of an earlier release has its sweep's name in the log.
        entry["log_name"] = record["studies"].get(name, {}).get("log_name", name)
        record["studies"][name] = entry
        record["latest"] = name
        storage.write_atomically(folder / _FILE, json.dumps(record))
    changed = difference(keys, before.get("identity", keys))
    return [f"{key}: {ours} now, {theirs} before" for key, (ours, theirs) in changed.items()]


class _Entry(TypedDict):
    study: dict[str, Any]
    base: dict[str, Any]
    log_name: NotRequired[str]
    identity: NotRequired[dict[str, Any]]
    choices: NotRequired[dict[str, str]]


class _Studies(TypedDict):
    latest: str
    studies: dict[str, _Entry]


def read_study(folder: Path, name: str | None = None) -> tuple[str, dict[str, Any]]:
    """Return (fingerprint, record) of a study of the sweep in `folder`, by default the latest.

    Raises:
        DataError: study.json is damaged.
    """
    record = _read(folder)
    name = record["latest"] if name is None else name
    studies = record["studies"]
    if name not in studies:
        raise DataError(f"{folder / _FILE} has no study {name}; there are: {', '.join(studies)}")
    return name, studies[name]


def _read(folder: Path) -> dict[str, Any]:
    file = folder / _FILE
    if not file.exists():
        return {"latest": None, "studies": {}}
    record = read_record(file)
    if "studies" in record:
        studies: dict[str, Any] = checked(record, _Studies, str(file))
        return studies
    return _of_earlier_release(folder, checked(record, _Entry, str(file)))


def _of_earlier_release(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a study that had no identity, which it gets."""
    cfg = typed("study", StudyConfig, record["study"])
    try:
        (base,) = make_cells([("base", record["base"])])
        keys = identity(cfg, base)
    except EspalierError:  # its data are gone: nothing continues it
        keys = {"base": record["base"]}
    name = fingerprint(keys)
    entry = {**record, "identity": keys, "log_name": folder.name}
    return {"latest": name, "studies": {name: entry}}
