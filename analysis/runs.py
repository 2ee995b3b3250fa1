"""One tidy table of runs and one of metric histories, from run folders or an MLflow store.

Columns of `table`: fingerprint, label, state, the science keys (`model.width`, `seed`, ...), the
run's own facts (`num_parameters`, `flops`, `tokens`, ...) and the last value of each metric. A cell
that has not run is a row with its state and NaN, never 0. The format of a run folder is
docs/run-folder.md.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

SCHEMA = 1
_LARGEST = 1.797e308
_ENDED = ("finished", "diverged", "failed", "interrupted")


@dataclass(frozen=True)
class Runs:
    """The runs of a sweep.

    Args:
        table: a row for each cell, also for those that never ran.
        history: columns fingerprint, step, key, value; later attempts win.
    """

    table: pd.DataFrame
    history: pd.DataFrame

    @property
    def finished(self) -> pd.DataFrame:
        """The rows that may enter a figure."""
        return self.table[self.table["state"] == "finished"]

    def count(self) -> str:
        """Say how many cells there are and why some are not shown."""
        states = self.table["state"].value_counts()
        return f"{len(self.table)} cells: " + ", ".join(f"{n} {s}" for s, n in states.items())

    def curves(self, key: str, x: str) -> pd.DataFrame:
        """Return columns fingerprint, x, value of metric `key`; `x` is step, tokens, flops or wall_s.

        Raises:
            KeyError: no run has the metric; the known ones are named.
        """
        known = sorted(self.history["key"].unique())
        for name in (key, x):
            if name not in known and name != "step":
                raise KeyError(f"no run has the metric {name!r}; there are: {', '.join(known)}")
        values = self.history[self.history["key"] == key].rename(columns={"step": "x"})
        if x != "step":
            axis = self.history[self.history["key"] == x][["fingerprint", "step", "value"]]
            axis = axis.rename(columns={"step": "x", "value": "at"})
            values = values.merge(axis, on=["fingerprint", "x"]).drop(columns="x")
            values = values.rename(columns={"at": "x"})
        return values[["fingerprint", "x", "value"]]


def from_folders(root: Path, sweep: str) -> Runs:
    """Return the runs of `sweep` under `root` (the folder that holds runs/ and sweeps/).

    Raises:
        FileNotFoundError: there is no such sweep.
        ValueError: a cell was written by a newer Espalier.
    """
    listing = root / "sweeps" / sweep / "cells.jsonl"
    if not listing.exists():
        raise FileNotFoundError(f"{listing} does not exist; run the sweep first, or name its root")
    members = {row["fingerprint"]: row for row in _lines(listing)}
    rows, histories = [], []
    for key, member in members.items():
        folder = root / "runs" / key
        history = _history(folder / "metrics.jsonl", key)
        rows.append(member | _facts(folder) | _last(history))
        histories.append(history)
    return Runs(pd.DataFrame(rows), pd.concat(histories, ignore_index=True))


def from_mlflow(uri: str, experiment: str) -> Runs:
    """Return the runs of an MLflow experiment: for runs made elsewhere, or on another machine."""
    from mlflow import MlflowClient  # noqa: PLC0415  (2 s)

    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        names = ", ".join(e.name for e in client.search_experiments())
        raise KeyError(f"no experiment {experiment!r} in {uri}; there are: {names}")
    rows, points, token = [], [], None
    while True:
        page = client.search_runs([found.experiment_id], page_token=token)
        for run in page:
            key = run.data.tags.get("fingerprint", run.info.run_id)
            params = {k: _number(v) for k, v in run.data.params.items()}
            state = {"FINISHED": "finished", "RUNNING": "running", "KILLED": "interrupted"}
            rows.append(
                {"fingerprint": key, "label": run.info.run_name}
                | {"state": state.get(run.info.status, "failed")}
                | params
                | {name: _unclamp(value) for name, value in run.data.metrics.items()}
            )
            for name in run.data.metrics:
                for m in client.get_metric_history(run.info.run_id, name):
                    points.append((key, m.step, name, _unclamp(m.value)))
        token = page.token
        if not token:
            break
    return Runs(pd.DataFrame(rows), pd.DataFrame(points, columns=_COLUMNS))


_COLUMNS = ["fingerprint", "step", "key", "value"]


def _facts(folder: Path) -> dict[str, Any]:
    cell = json.loads((folder / "cell.json").read_text())
    if cell["schema"] > SCHEMA:
        raise ValueError(
            f"{folder}/cell.json has schema {cell['schema']}, this analysis reads {SCHEMA}; update Espalier"
        )
    summary = folder / "summary.json"
    facts = json.loads(summary.read_text()) if summary.exists() else {}
    science = {k: v for k, v in cell["science"].items() if not isinstance(v, (list, dict))}
    return {"state": _state(folder)} | science | facts


def _state(folder: Path) -> str:
    files = sorted(folder.glob("attempts/*/events.jsonl"))
    if not files:
        return "new"
    ends = [e["event"] for e in _lines(files[-1]) if e["event"] in _ENDED]
    return str(ends[-1]) if ends else "running"


def _history(file: Path, key: str) -> pd.DataFrame:
    """Return the history of one run: a `restored` line drops the steps after it.

    What an earlier attempt wrote after that line (it was taken for dead and did not know) is left out.
    """
    points: dict[tuple[int, str], float] = {}
    newest = 0
    for line in _lines(file) if file.exists() else []:
        if "restored" in line:
            newest = line.get("attempt", newest)
            points = {k: v for k, v in points.items() if k[0] <= line["restored"]}
            continue
        if line.get("attempt", newest) < newest:
            continue
        step = line["step"]
        for name, value in line.items():
            if name not in ("step", "time", "attempt"):
                points[step, name] = float(value)
    rows = [(key, step, name, value) for (step, name), value in points.items()]
    return pd.DataFrame(rows, columns=_COLUMNS)


def _last(history: pd.DataFrame) -> dict[str, float]:
    return dict(history.groupby("key")["value"].last())


def _lines(file: Path) -> list[dict[str, Any]]:
    whole = file.read_bytes().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.splitlines() if line]


def _unclamp(value: float) -> float:
    """MLflow's SQL stores keep an infinity as the largest double."""
    return math.copysign(math.inf, value) if abs(value) >= _LARGEST else value


def _number(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
