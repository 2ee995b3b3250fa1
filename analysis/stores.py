"""The runs of an MLflow store, read in bulk: a SQL database, or a server's bulk endpoint.

MLflow's client, one history after the other, takes minutes where this takes seconds. A server
limits the points of an answer: a batch that reaches the limit is requested again in smaller ones, a
single history page by page. `Runs.notes` names a history that ends before the run's last value all
the same.
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
from analysis.pooling import SETTINGS
from analysis.runs import Runs, is_late

_LARGEST = 1.797e308
_STATES = {
    "FINISHED": "finished",
    "RUNNING": "running",
    "SCHEDULED": "new",
    "KILLED": "interrupted",
}
_PAGE, _POINTS, _RUNS = 1000, 25_000, 100  # a server's limits of an answer
_THREADS = 4
_VALUE = "CASE WHEN is_nan THEN NULL ELSE value END"


def from_mlflow(
    uri: str, experiment: str, *, histories: bool = True, cache: Path | None = None
) -> Runs:
    """Return the runs of an MLflow experiment, also of runs that are not Espalier's.

    Args:
        uri: sqlite:///file, another SQLAlchemy URL, or http(s)://server, with
            MLFLOW_TRACKING_USERNAME, _PASSWORD and _TOKEN of the environment.
        histories: False: only the table, which has the last value of each metric.
        cache: a folder for histories (None: no cache); only runs that changed are read again.

    Raises:
        KeyError: no such experiment; names those that there are.
        ValueError: the URI is of another kind.
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
    """What databases and servers have in common.

    A row of `rows` has the run's _id and a _stamp that changes with its metrics.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.notes: list[str] = []
        self.settings: set[str] = set()  # the parameters of the runs

    def runs(self, experiment: str, histories: bool, cache: Path | None) -> Runs:
        names = self.experiments()
        if experiment not in names:
            raise KeyError(
                f"no experiment {experiment!r} in {self.uri}; there are: {', '.join(names)}"
            )
        rows = self.rows(names[experiment])
        known = {str(row["fingerprint"]) for row in rows}
        rows = [row for row in rows if not is_late(row, known)]
        self.settings.discard("evaluates")
        digest = hashlib.sha256(f"{self.uri} {experiment}".encode()).hexdigest()[:16]
        stamps = {row.pop("_id"): str(row.pop("_stamp")) for row in rows}
        counts = Counter(row["fingerprint"] for row in rows)
        for run, row in zip(stamps, rows, strict=True):
            if counts[row["fingerprint"]] > 1:  # the run's own id tells it from the others
                row["fingerprint"] = run
        names_of = {run: str(row["fingerprint"]) for run, row in zip(stamps, rows, strict=True)}
        if not histories:
            return Runs(self._table(rows), assemble([]))
        history = cached(cache / f"{digest}.parquet" if cache else None, stamps, self.history)
        if not history.empty:
            categories = history["fingerprint"].cat
            history["fingerprint"] = categories.rename_categories(
                [names_of[c] for c in categories.categories]
            )
            ordered = sorted(history["fingerprint"].cat.categories)
            history["fingerprint"] = history["fingerprint"].cat.reorder_categories(ordered)
        return Runs(self._table(rows), history[COLUMNS], tuple(self.notes))

    def _table(self, rows: list[dict[str, Any]]) -> pd.DataFrame:
        table = pd.DataFrame(rows)
        table.attrs[SETTINGS] = tuple(sorted(self.settings))
        return table

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
        rows = self._ask(
            "SELECT name, experiment_id FROM experiments WHERE lifecycle_stage = 'active'"
        )
        return {str(name): str(number) for name, number in rows}

    def rows(self, experiment: str) -> list[dict[str, Any]]:
        in_experiment = (
            "run_uuid IN (SELECT run_uuid FROM runs "
            f"WHERE experiment_id = {int(experiment)} AND lifecycle_stage = 'active')"
        )
        rows: dict[str, dict[str, Any]] = {
            run: {
                "_id": run,
                "_stamp": "",
                "fingerprint": run,
                "label": name,
                "state": _STATES.get(status, "failed"),
            }
            for run, name, status in self._ask(
                f"SELECT run_uuid, name, status FROM runs WHERE {in_experiment}"
            )
        }
        for run, key, value in self._ask(
            f"SELECT run_uuid, key, value FROM params WHERE {in_experiment}"
        ):
            rows[run][key] = _number(value)
            self.settings.add(key)
        for run, value in self._ask(
            f"SELECT run_uuid, value FROM tags WHERE key = 'fingerprint' AND {in_experiment}"
        ):
            rows[run]["fingerprint"] = value
        newest = (
            f"SELECT run_uuid, key, step, timestamp, {_VALUE} FROM latest_metrics "
            f"WHERE {in_experiment} ORDER BY key"
        )
        for run, key, step, when, value in self._ask(newest):
            self._keys.setdefault(run, []).append(key)
            rows[run]["_stamp"] += f"{key} {step} {when} "
            rows[run][key] = float(_unclamp(float("nan") if value is None else value))
        for row in rows.values():
            row["_stamp"] = hashlib.sha256(row["_stamp"].encode()).hexdigest()
        return list(rows.values())

    def history(self, runs: list[str]) -> pd.DataFrame:
        return assemble(self._part(run, key) for run in runs for key in self._keys.get(run, ()))

    def _part(self, run: str, key: str) -> Part:
        rows = self._ask(
            f"SELECT step, {_VALUE} FROM metrics "
            "WHERE run_uuid = :run AND key = :key ORDER BY step",
            run=run,
            key=key,
        )
        points = np.array(rows, dtype=float).reshape(-1, 2)
        return run, key, points[:, 0], _unclamp(points[:, 1])


class _Server(_Store):
    """MLflow's REST interface: pages of a thousand runs, one metric of a hundred runs a request."""

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
        pages = self._pages(
            "POST",
            "api/2.0/mlflow/experiments/search",
            "experiments",
            "json",
            {"max_results": 1000},
        )
        return {e["name"]: e["experiment_id"] for e in pages}

    def rows(self, experiment: str) -> list[dict[str, Any]]:
        body = {"experiment_ids": [experiment], "max_results": _PAGE}
        rows = []
        for run in self._pages("POST", "api/2.0/mlflow/runs/search", "runs", "json", body):
            info, data = run["info"], run.get("data", {})
            tags = {tag["key"]: tag["value"] for tag in data.get("tags", [])}
            metrics, params = data.get("metrics", []), data.get("params", [])
            self.settings |= {param["key"] for param in params}
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
                | {param["key"]: _number(param["value"]) for param in params}
                | {m["key"]: float(_unclamp(float(m.get("value", 0.0)))) for m in metrics}
            )
        return rows

    def history(self, runs: list[str]) -> pd.DataFrame:
        keys = sorted({key for run in runs for key in self._newest[run]})
        tasks = []
        for key in keys:
            holders = [run for run in runs if key in self._newest[run]]
            tasks += [(key, holders[i : i + _RUNS]) for i in range(0, len(holders), _RUNS)]
        with ThreadPoolExecutor(_THREADS) as pool:
            return assemble(
                part for parts in pool.map(lambda t: self._metric(*t), tasks) for part in parts
            )

    def _metric(self, key: str, runs: list[str]) -> list[Part]:
        """Return one metric of `runs`, as many a request as the server's limit of points allows."""
        parts: list[Part] = []
        waiting, most = list(runs), 1 + max(self._newest[run][key] for run in runs)
        while waiting:
            batch = waiting[: max(1, min(_RUNS, (_POINTS - 1) // most))]
            points = self._batch(key, batch)
            if len(points) >= _POINTS and len(batch) > 1:
                most = 2 * (_POINTS // len(batch))
                continue
            waiting = waiting[len(batch) :]
            if len(points) >= _POINTS:
                body = {"run_id": batch[0], "metric_key": key, "max_results": _POINTS}
                points = [
                    p | {"run_id": batch[0]}
                    for p in self._pages(
                        "GET", "api/2.0/mlflow/metrics/get-history", "metrics", "params", body
                    )
                ]
            most = max(Counter(point["run_id"] for point in points).values(), default=1)
            parts += self._parts(key, batch, points)
        return parts

    def _batch(self, key: str, runs: Sequence[str]) -> list[dict[str, Any]]:
        parameters = [("run_id", run) for run in runs] + [
            ("metric_key", key),
            ("max_results", str(_POINTS)),
        ]
        return list(
            self._ask("GET", "ajax-api/2.0/mlflow/metrics/get-history-bulk", params=parameters)[
                "metrics"
            ]
        )

    def _parts(self, key: str, runs: Sequence[str], points: list[dict[str, Any]]) -> Iterator[Part]:
        points_of: dict[str, list[dict[str, Any]]] = {run: [] for run in runs}
        for point in points:
            points_of[point["run_id"]].append(point)
        for run, rows in points_of.items():
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
    """Return `values` with infinities, which MLflow's SQL stores hold as the largest double."""
    return np.where(np.abs(values) >= _LARGEST, np.copysign(np.inf, values), values)


def _number(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
