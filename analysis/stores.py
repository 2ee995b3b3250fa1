"""The runs of an MLflow store, read in bulk: a SQL database directly, a server by its bulk endpoint.

Asking MLflow's client for one history after the other takes minutes where this takes seconds. A server gives
so many points at once: a batch that reaches the limit is asked for in smaller ones, a single history that does page by
page. One that ends before the run's last value all the same is named in `Runs.notes`.
"""

import hashlib
import json
import os
import sqlite3
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import numpy as np
import pandas as pd

from analysis.history import COLUMNS, Part, assemble, cached
from analysis.runs import Runs

_LARGEST = 1.797e308
_STATES = {
    "FINISHED": "finished",
    "RUNNING": "running",
    "SCHEDULED": "new",
    "KILLED": "interrupted",
}
_PAGE, _POINTS, _RUNS = 1000, 25_000, 100  # what a server gives at once
_AT_ONCE = 4
_VALUE = "CASE WHEN is_nan THEN NULL ELSE value END"


def from_mlflow(
    uri: str, experiment: str, *, histories: bool = True, cache: Path | None = None
) -> Runs:
    """Return the runs of an MLflow experiment: for runs made elsewhere, or on another machine.

    Args:
        uri: sqlite:///file, another SQLAlchemy URL, or http(s)://server; MLFLOW_TRACKING_USERNAME,
            _PASSWORD and _TOKEN hold for servers.
        histories: False reads the table alone, with the last value of each metric.
        cache: a folder for histories (None: no cache); only runs that changed are read again.

    Raises:
        KeyError: no such experiment; those there are named.
        ValueError: a kind of URI that is not read.
    """
    scheme = urlsplit(uri).scheme
    if scheme in ("http", "https"):
        return _Server(uri).runs(experiment, histories, cache)
    if scheme.partition("+")[0] in ("sqlite", "postgresql", "mysql"):
        return _Database(uri).runs(experiment, histories, cache)
    raise ValueError(
        f"{uri} is not read; give sqlite:///FILE, another database's URL or http(s)://SERVER"
    )


class _Store(ABC):
    """What both kinds have in common; `rows` gives each run its _id and a _stamp that changes with its metrics."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.notes: list[str] = []

    def runs(self, experiment: str, histories: bool, cache: Path | None) -> Runs:
        names = self.experiments()
        if experiment not in names:
            raise KeyError(
                f"no experiment {experiment!r} in {self.uri}; there are: {', '.join(names)}"
            )
        found = self.rows(names[experiment])
        digest = hashlib.sha256(f"{self.uri} {experiment}".encode()).hexdigest()[:16]
        stamps = {row.pop("_id"): str(row.pop("_stamp")) for row in found}
        times = Counter(row["fingerprint"] for row in found)
        for run, row in zip(stamps, found, strict=True):
            if times[row["fingerprint"]] > 1:  # the run's own id tells it from the others
                row["fingerprint"] = run
        names_of = {run: str(row["fingerprint"]) for run, row in zip(stamps, found, strict=True)}
        if not histories:
            return Runs(pd.DataFrame(found), assemble([]))
        history = cached(cache / f"{digest}.parquet" if cache else None, stamps, self.history)
        if not history.empty:
            categories = history["fingerprint"].cat
            history["fingerprint"] = categories.rename_categories(
                [names_of[c] for c in categories.categories]
            )
            ordered = sorted(history["fingerprint"].cat.categories)
            history["fingerprint"] = history["fingerprint"].cat.reorder_categories(ordered)
        return Runs(pd.DataFrame(found), history[COLUMNS], tuple(self.notes))

    @abstractmethod
    def experiments(self) -> dict[str, str]:
        """Return the ids of the experiments by their names."""

    @abstractmethod
    def rows(self, experiment: str) -> list[dict[str, Any]]:
        """Return a row of the table for each run."""

    @abstractmethod
    def history(self, runs: list[str]) -> pd.DataFrame:
        """Return the history of `runs`, by their ids."""


class _Database(_Store):
    """The tables of MLflow's SQL store."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self._keys: dict[str, list[str]] = {}
        self._sqlite: sqlite3.Connection | None = None
        if uri.startswith("sqlite:///"):
            file = Path(unquote(uri.removeprefix("sqlite:///").partition("?")[0]))
            if not file.exists():
                raise FileNotFoundError(f"{file} does not exist")
            self._sqlite = sqlite3.connect(f"file:{quote(str(file))}?mode=ro", uri=True)
            return
        import sqlalchemy  # noqa: PLC0415  (comes with MLflow)

        self._text, self._other = sqlalchemy.text, sqlalchemy.create_engine(uri).connect()

    def _ask(self, query: str, **values: str) -> list[Any]:
        if self._sqlite is not None:
            return self._sqlite.execute(query, values).fetchall()
        return list(self._other.execute(self._text(query), values).fetchall())

    def experiments(self) -> dict[str, str]:
        found = self._ask(
            "SELECT name, experiment_id FROM experiments WHERE lifecycle_stage = 'active'"
        )
        return {str(name): str(number) for name, number in found}

    def rows(self, experiment: str) -> list[dict[str, Any]]:
        mine = f"run_uuid IN (SELECT run_uuid FROM runs WHERE experiment_id = {int(experiment)} AND lifecycle_stage = 'active')"
        found: dict[str, dict[str, Any]] = {
            run: {
                "_id": run,
                "_stamp": "",
                "fingerprint": run,
                "label": name,
                "state": _STATES.get(status, "failed"),
            }
            for run, name, status in self._ask(
                f"SELECT run_uuid, name, status FROM runs WHERE {mine}"
            )
        }
        for run, key, value in self._ask(f"SELECT run_uuid, key, value FROM params WHERE {mine}"):
            found[run][key] = _number(value)
        for run, value in self._ask(
            f"SELECT run_uuid, value FROM tags WHERE key = 'fingerprint' AND {mine}"
        ):
            found[run]["fingerprint"] = value
        newest = f"SELECT run_uuid, key, step, timestamp, {_VALUE} FROM latest_metrics WHERE {mine} ORDER BY key"
        for run, key, step, when, value in self._ask(newest):
            self._keys.setdefault(run, []).append(key)
            found[run]["_stamp"] += f"{key} {step} {when} "
            found[run][key] = float(_unclamp(float("nan") if value is None else value))
        for row in found.values():
            row["_stamp"] = hashlib.sha256(row["_stamp"].encode()).hexdigest()
        return list(found.values())

    def history(self, runs: list[str]) -> pd.DataFrame:
        return assemble(self._part(run, key) for run in runs for key in self._keys.get(run, ()))

    def _part(self, run: str, key: str) -> Part:
        rows = self._ask(
            f"SELECT step, {_VALUE} FROM metrics WHERE run_uuid = :run AND key = :key ORDER BY step",
            run=run,
            key=key,
        )
        points = np.array(rows, dtype=float).reshape(-1, 2)
        return run, key, points[:, 0], _unclamp(points[:, 1])


class _Server(_Store):
    """MLflow's REST interface: runs by the thousand, one metric of up to a hundred runs at a time."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri.rstrip("/"))
        import requests  # noqa: PLC0415  (comes with MLflow)

        self._session = requests.Session()
        user, token = (
            os.environ.get("MLFLOW_TRACKING_USERNAME"),
            os.environ.get("MLFLOW_TRACKING_TOKEN"),
        )
        if user:
            self._session.auth = (user, os.environ.get("MLFLOW_TRACKING_PASSWORD", ""))
        elif token:
            self._session.headers["Authorization"] = f"Bearer {token}"
        self._newest: dict[str, dict[str, int]] = {}

    def _ask(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        answer = self._session.request(method, f"{self.uri}/{path}", timeout=300, **more)
        if answer.status_code != 200:
            raise ValueError(f"{self.uri}/{path} answers {answer.status_code}: {answer.text[:200]}")
        return dict(answer.json())

    def _pages(
        self, method: str, path: str, name: str, field: str, body: dict[str, Any]
    ) -> Iterator[Any]:
        while True:
            page = self._ask(method, path, **{field: body})
            yield from page.get(name, [])
            if not page.get("next_page_token"):
                return
            body = body | {"page_token": page["next_page_token"]}

    def experiments(self) -> dict[str, str]:
        found = self._pages(
            "POST",
            "api/2.0/mlflow/experiments/search",
            "experiments",
            "json",
            {"max_results": 1000},
        )
        return {e["name"]: e["experiment_id"] for e in found}

    def rows(self, experiment: str) -> list[dict[str, Any]]:
        body = {"experiment_ids": [experiment], "max_results": _PAGE}
        rows = []
        for run in self._pages("POST", "api/2.0/mlflow/runs/search", "runs", "json", body):
            info, data = run["info"], run.get("data", {})
            tags = {tag["key"]: tag["value"] for tag in data.get("tags", [])}
            metrics = data.get("metrics", [])
            self._newest[info["run_id"]] = {m["key"]: int(m.get("step", 0)) for m in metrics}
            stamp = json.dumps(
                sorted((m["key"], m.get("step", 0), m["timestamp"]) for m in metrics)
            )
            rows.append(
                {
                    "_id": info["run_id"],
                    "_stamp": hashlib.sha256(stamp.encode()).hexdigest(),
                    "fingerprint": tags.get("fingerprint", info["run_id"]),
                    "label": info.get("run_name", ""),
                    "state": _STATES.get(info["status"], "failed"),
                }
                | {param["key"]: _number(param["value"]) for param in data.get("params", [])}
                | {m["key"]: float(_unclamp(float(m.get("value", 0.0)))) for m in metrics}
            )
        return rows

    def history(self, runs: list[str]) -> pd.DataFrame:
        keys = sorted({key for run in runs for key in self._newest[run]})
        tasks = []
        for key in keys:
            having = [run for run in runs if key in self._newest[run]]
            tasks += [(key, having[i : i + _RUNS]) for i in range(0, len(having), _RUNS)]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return assemble(
                part for found in pool.map(lambda t: self._metric(*t), tasks) for part in found
            )

    def _metric(self, key: str, runs: list[str]) -> list[Part]:
        """Return one metric of some runs, as many at once as the server gives points of."""
        parts: list[Part] = []
        waiting, most = list(runs), 1 + max(self._newest[run][key] for run in runs)
        while waiting:
            batch = waiting[: max(1, min(_RUNS, (_POINTS - 1) // most))]
            found = self._batch(key, batch)
            if len(found) >= _POINTS and len(batch) > 1:
                most = 2 * (_POINTS // len(batch))
                continue
            waiting = waiting[len(batch) :]
            if len(found) >= _POINTS:
                body = {"run_id": batch[0], "metric_key": key, "max_results": _POINTS}
                found = [
                    p | {"run_id": batch[0]}
                    for p in self._pages(
                        "GET", "api/2.0/mlflow/metrics/get-history", "metrics", "params", body
                    )
                ]
            most = max(Counter(point["run_id"] for point in found).values(), default=1)
            parts += self._parts(key, batch, found)
        return parts

    def _batch(self, key: str, runs: Sequence[str]) -> list[dict[str, Any]]:
        asked = [("run_id", run) for run in runs] + [
            ("metric_key", key),
            ("max_results", str(_POINTS)),
        ]
        return list(
            self._ask("GET", "ajax-api/2.0/mlflow/metrics/get-history-bulk", params=asked)[
                "metrics"
            ]
        )

    def _parts(self, key: str, runs: Sequence[str], points: list[dict[str, Any]]) -> Iterator[Part]:
        own: dict[str, list[dict[str, Any]]] = {run: [] for run in runs}
        for point in points:
            own[point["run_id"]].append(point)
        for run, rows in own.items():
            steps = np.array([int(row.get("step", 0)) for row in rows], dtype=np.int64)
            values = np.array([float(row.get("value", 0.0)) for row in rows])
            last = int(steps.max()) if len(steps) else -1
            if last < self._newest[run][key]:
                self.notes.append(
                    f"the server cut {key} of {run} at step {last} of {self._newest[run][key]}"
                )
            order = np.argsort(steps, kind="stable")
            yield run, key, steps[order], _unclamp(values[order])


def _unclamp(values: Any) -> Any:
    """MLflow's SQL stores keep an infinity as the largest double."""
    return np.where(np.abs(values) >= _LARGEST, np.copysign(np.inf, values), values)


def _number(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
