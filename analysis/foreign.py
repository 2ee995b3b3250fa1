"""Runs of other trackers as our table: TensorBoard's event files, W&B's local runs, CSV.

`espalier import runs` writes what these give, or what `analysis.stores` reads of MLflow, as a
folder of two parquet files; `from_tables` and every command of `python -m analysis` read it.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.history import COLUMNS, Part, assemble, last_values
from analysis.pooling import SETTINGS
from analysis.runs import Runs

TABLE, HISTORY = "table.parquet", "history.parquet"
_ENDED = {0: "finished", None: "interrupted"}
_OF_WANDB = ("_step", "_runtime", "_timestamp", "_wandb", "trainer/step")


def write_tables(runs: Runs, folder: Path) -> None:
    """Write the table and the histories of `runs`, which `from_tables` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = list(runs.table.attrs.get(SETTINGS, ()))
    table = runs.table.copy()
    for column in filter(lambda c: pd.api.types.is_object_dtype(table[c]), table):
        table[column] = _one_kind(table[column])
    table.attrs = {SETTINGS: settings}
    table.to_parquet(folder / TABLE, index=False)
    runs.history.to_parquet(folder / HISTORY, index=False)


def _one_kind(values: pd.Series) -> pd.Series:
    """Return a column that a file can hold: where its values are of several kinds, as text."""
    kinds = values.dropna().map(type)
    if kinds.nunique() == 1 and not issubclass(kinds.iloc[0], (list, dict)):
        return values
    return values.map(lambda v: v if isinstance(v, str) else json.dumps(v), na_action="ignore")


def from_tables(folder: Path) -> Runs:
    """Return the runs that `write_tables` wrote."""
    table = pd.read_parquet(folder / TABLE)
    table.attrs[SETTINGS] = tuple(table.attrs.get(SETTINGS, ()))
    return Runs(table, pd.read_parquet(folder / HISTORY)[COLUMNS])


def _runs(rows: list[dict[str, Any]], settings: Iterable[str], parts: Iterable[Part]) -> Runs:
    """Return the runs with the last value of each metric in the table."""
    table, history = pd.DataFrame(rows), assemble(parts)
    last = last_values(history).reindex(table["fingerprint"])
    last.index = table.index
    new = [column for column in last if column not in table]
    table = table.join(last[new])
    table.attrs[SETTINGS] = tuple(sorted(set(settings)))
    return Runs(table, history)


def from_tensorboard(folder: Path) -> Runs:
    """Return a run for each folder below `folder` that holds event files; scalars only.

    The label is the folder's path; settings are those of the tab HParams.

    Raises:
        FileNotFoundError: there are no event files.
    """
    from tensorboard.backend.event_processing.event_accumulator import (  # noqa: PLC0415
        EventAccumulator,
    )
    from tensorboard.util import tensor_util  # noqa: PLC0415

    places = sorted({file.parent for file in folder.rglob("events.out.tfevents.*")})
    if not places:
        raise FileNotFoundError(f"{folder} holds no events.out.tfevents.*")
    rows, settings, parts = [], set(), []
    for place in places:
        events = EventAccumulator(str(place), size_guidance={"scalars": 0, "tensors": 0})
        events.Reload()
        label = str(place.relative_to(folder))
        chosen = _hparams(events)
        settings |= set(chosen)
        rows.append({"fingerprint": label, "label": label, "state": "finished"} | chosen)
        for tag in events.Tags()["scalars"]:
            points = events.Scalars(tag)
            parts.append((label, tag, [p.step for p in points], [p.value for p in points]))
        for tag in events.PluginTagToContent("scalars") if events.Tags()["tensors"] else ():
            tensors = events.Tensors(tag)
            values = [float(tensor_util.make_ndarray(t.tensor_proto)) for t in tensors]
            parts.append((label, tag, [t.step for t in tensors], values))
    return _runs(rows, settings, parts)


def _hparams(events: Any) -> dict[str, Any]:
    from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG  # noqa: PLC0415
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # noqa: PLC0415

    try:
        content = events.PluginTagToContent("hparams").get(SESSION_START_INFO_TAG)
    except KeyError:  # no run of it has any
        content = None
    if content is None:
        return {}
    data = HParamsPluginData.FromString(content)
    values = data.session_start_info.hparams.items()
    kinds = {key: (value, value.WhichOneof("kind")) for key, value in values}
    return {key: getattr(value, kind) for key, (value, kind) in kinds.items() if kind}


def from_wandb(folder: Path) -> Runs:
    """Return the runs whose folders (offline-run-... or run-...) lie in `folder` or below it.

    Sessions of one id are one run. Lists and texts of a history are left out.

    Raises:
        FileNotFoundError: there are no such folders.
    """
    from analysis.wandb_files import read_records  # noqa: PLC0415

    files = sorted(folder.rglob("run-*.wandb"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no run-*.wandb")
    rows: dict[str, dict[str, Any]] = {}
    settings: set[str] = set()
    points: dict[tuple[str, str], dict[int, float]] = {}
    for file in files:
        run = file.stem.removeprefix("run-")
        row = rows.setdefault(run, {"fingerprint": run, "label": run, "state": "interrupted"})
        for record in read_records(file):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                row["label"] = record.run.display_name or run
                chosen = _config(record.run.config.update)
                settings |= set(chosen)
                row |= chosen
            elif kind == "exit":
                row["state"] = "failed" if record.exit.exit_code else "finished"
            elif kind == "history":
                _add_row(points, run, record.history)
    parts = [(run, key, list(p), list(p.values())) for (run, key), p in points.items()]
    return _runs(list(rows.values()), settings, parts)


def _config(items: Iterable[Any]) -> dict[str, Any]:
    values = {item.key or "/".join(item.nested_key): item.value_json for item in items}
    plain = {key: json.loads(text) for key, text in values.items() if key != "_wandb"}
    return {k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in plain.items()}


def _add_row(points: dict[tuple[str, str], dict[int, float]], run: str, history: Any) -> None:
    row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in history.item}
    step = int(row.get("trainer/step", row.get("_step", history.step.num)))
    for key, value in row.items():
        if key not in _OF_WANDB and isinstance(value, (int, float, str)):
            try:
                number = float(value)  # "NaN", "Infinity" are texts there
            except ValueError:
                continue
            points.setdefault((run, key), {})[step] = number


def from_csv(file: Path, run: str | None = None, step: str | None = None) -> Runs:
    """Return the runs of a CSV file, a row each; with `step` a row is one step of a run.

    Args:
        run: the column that names the run (None: its number is its name).
        step: the column of steps: numeric columns that change within a run are metrics then.

    Raises:
        KeyError: there is no such column; names those that there are.
    """
    frame = pd.read_csv(file)
    columns = [str(column) for column in frame]
    for column in filter(None, (run, step)):
        if column not in frame:
            raise KeyError(f"{file} has no column {column!r}; there are: {', '.join(columns)}")
    names = frame[run].astype(str) if run else pd.Series(map(str, range(len(frame))), frame.index)
    others = [column for column in columns if column not in (run, step)]
    if step is None:
        rows = [
            {"fingerprint": name, "label": name, "state": "finished"} | dict(values)
            for name, (_, values) in zip(names, frame[others].iterrows(), strict=True)
        ]
        return _runs(rows, (), ())
    metrics = [
        c
        for c in others
        if pd.api.types.is_numeric_dtype(frame[c]) and frame[c].groupby(names).nunique().max() > 1
    ]
    settings = [column for column in others if column not in metrics]
    rows, parts = [], list[Part]()
    for name, part in frame.groupby(names, sort=False):
        rows.append(
            {"fingerprint": name, "label": name, "state": "finished"} | dict(part[settings].iloc[0])
        )
        for metric in metrics:
            known = part.dropna(subset=[metric]).sort_values(step, kind="stable")
            parts.append((str(name), metric, known[step].to_numpy(), known[metric].to_numpy()))
    return _runs(rows, settings, parts)
