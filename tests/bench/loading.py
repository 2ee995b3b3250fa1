"""Loading runs, ours against `mlflow.search_runs` and `get_metric_history`.

    python -m tests.bench.loading [sqlite] [folders] [server]

10,000 runs of 20 parameters and one metric, and 1,000 runs of 5 metrics over 1,000 steps, are
written to a store with MLflow's own schema and to run folders. MLflow's client reads all runs and
the histories of every 50th run, scaled up; ours reads everything, first without a cache, then with
it.
"""

import json
import os
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from analysis.runs import Runs, from_folders
from analysis.stores import from_mlflow
from tests.mlflow_server import Server

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
WIDE, LONG, STEPS, METRICS, PARAMS, EVERY = 10_000, 1_000, 1_000, 5, 20, 50
_RUN_COLUMNS = (
    "run_uuid, name, status, start_time, end_time, lifecycle_stage, user_id, source_name, "
    "entry_point_name, source_version, source_type, artifact_uri, experiment_id"
)
_METRIC_COLUMNS = "key, value, timestamp, run_uuid, step, is_nan"


def _write_store(folder: Path) -> Path:
    from mlflow import MlflowClient

    file = folder / "server.db"
    client = MlflowClient(f"sqlite:///{file}")
    with sqlite3.connect(file) as store:
        for name, runs, steps in (("wide", WIDE, 1), ("long", LONG, STEPS)):
            experiment = client.create_experiment(name)
            ids = [f"{name}{i:028x}" for i in range(runs)]
            state = ("FINISHED", 1, 2, "active", "u", "", "", "", "LOCAL")
            rows = [(run, f"run {run}", *state, f"file:///{run}", experiment) for run in ids]
            marks = ", ".join("?" * len(rows[0]))
            store.executemany(f"INSERT INTO runs ({_RUN_COLUMNS}) VALUES ({marks})", rows)
            store.executemany(
                "INSERT INTO tags (key, value, run_uuid) VALUES ('fingerprint', ?, ?)",
                [(run[-16:], run) for run in ids],
            )
            store.executemany(
                "INSERT INTO params (key, value, run_uuid) VALUES (?, ?, ?)",
                [(f"group.key_{k}", str(k), run) for run in ids for k in range(PARAMS)],
            )
            for k in range(METRICS if steps > 1 else 1):
                store.executemany(
                    f"INSERT INTO metrics ({_METRIC_COLUMNS}) VALUES (?, ?, ?, ?, ?, 0)",
                    (
                        (f"metric_{k}", 1.0 / (s + k + 1), s, run, s)
                        for run in ids
                        for s in range(steps)
                    ),
                )
                store.executemany(
                    f"INSERT INTO latest_metrics ({_METRIC_COLUMNS}) VALUES (?, ?, ?, ?, ?, 0)",
                    [(f"metric_{k}", 1.0 / (steps + k), steps - 1, run, steps - 1) for run in ids],
                )
            store.commit()
    return file


def _write_folders(folder: Path) -> None:
    for name, runs, steps in (("wide", WIDE, 1), ("long", LONG, STEPS)):
        metrics = METRICS if steps > 1 else 1
        lines = [
            {"step": s, "time": float(s), "attempt": 1}
            | {f"metric_{k}": 1.0 / (s + k + 1) for k in range(metrics)}
            for s in range(steps)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        ids = [f"{name}{i:012x}" for i in range(runs)]
        sweep = folder / "sweeps" / name
        sweep.mkdir(parents=True)
        (sweep / "cells.jsonl").write_text(
            "".join(json.dumps({"fingerprint": i, "label": i}) + "\n" for i in ids)
        )
        for run in ids:
            attempt = folder / "runs" / run / "attempts" / "0001"
            attempt.mkdir(parents=True)
            (attempt / "lease.json").write_text("{}")
            lines = [json.dumps({"event": event, "time": 0}) for event in ("started", "finished")]
            (attempt / "events.jsonl").write_text("\n".join(lines) + "\n")
            science = {f"group.key_{k}": k for k in range(PARAMS)}
            (folder / "runs" / run / "cell.json").write_text(
                json.dumps({"schema": 1, "fingerprint": run, "config": {}, "science": science})
            )
            (folder / "runs" / run / "summary.json").write_text('{"num_parameters": 1000}')
            (folder / "runs" / run / "metrics.jsonl").write_text(text)


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _theirs(uri: str) -> tuple[float, float]:
    import mlflow
    from mlflow import MlflowClient

    mlflow.set_tracking_uri(uri)
    client = MlflowClient(uri)
    wide = _seconds(lambda: mlflow.search_runs(experiment_names=["wide"]))
    runs = mlflow.search_runs(experiment_names=["long"])["run_id"]
    sample = runs[::EVERY]
    begun = time.perf_counter()
    for run in sample:
        for k in range(METRICS):
            client.get_metric_history(run, f"metric_{k}")
    return wide, (time.perf_counter() - begun) * len(runs) / len(sample)


def _ours(load: Callable[[str], Runs]) -> tuple[float, float]:
    wide = _seconds(lambda: load("wide"))
    long: list[Runs] = []
    took = _seconds(lambda: long.append(load("long")))
    assert len(load("wide").table) == WIDE
    assert len(long[0].history) == LONG * STEPS * METRICS
    return wide, took


def main(folder: Path, kinds: list[str]) -> None:
    """Print the table."""
    uri = f"sqlite:///{_write_store(folder)}"
    rows = []
    if {"sqlite", "folders"} & set(kinds):
        theirs = _theirs(uri)
    if "sqlite" in kinds:
        ours = _ours(lambda name: from_mlflow(uri, name, histories=name == "long"))
        rows.append(("SQLite", *theirs, *ours))
    if "folders" in kinds:
        _write_folders(folder)
        ours = _ours(lambda name: from_folders(folder, name, cache=False))
        rows.append(("run folders (MLflow on SQLite)", *theirs, *ours))
        from_folders(folder, "long")
        from_folders(folder, "wide")
        ours = _ours(lambda name: from_folders(folder, name))
        rows.append(("run folders, cached", *theirs, *ours))
    if "server" in kinds:
        server = Server(folder, workers=4)  # MLflow's default
        server.start()
        try:
            theirs = _theirs(server.uri)
            ours = _ours(lambda name: from_mlflow(server.uri, name, histories=name == "long"))
            rows.append(("server", *theirs, *ours))
        finally:
            server.kill()
    print("| | MLflow: runs | histories | ours: runs | histories | together |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, a, b, c, d in rows:
        ratio = (a + b) / (c + d)
        print(f"| {name} | {a:.1f} s | {b:.1f} s | {c:.2f} s | {d:.2f} s | {ratio:.1f}x |")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder), sys.argv[1:] or ["sqlite", "folders", "server"])
