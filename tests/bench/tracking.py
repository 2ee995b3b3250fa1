"""The cost of a logged step to the training process: metrics.jsonl against mlflow.log_metrics.

    python -m tests.bench.tracking

Ten values a step, to metrics.jsonl on local disk, to MLflow's SQLite store and to a local `mlflow
server`, interleaved in one run; the median and the slowest of each.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runner.records import journal
from tests.mlflow_server import Server

STEPS = 300
VALUES = {f"metric{i}": 1.0 / (i + 1) for i in range(10)}


def main() -> None:
    """Print a table of microseconds per logged step."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    import mlflow

    folder = Path(tempfile.mkdtemp())
    (folder / "run").mkdir()
    attempt = journal.claim(folder / "run")
    assert attempt is not None
    run_journal = journal.Journal(folder / "run", attempt)
    server = Server(folder)
    server.start()
    writers: dict[str, Callable[[int], None]] = {
        "metrics.jsonl (ours)": lambda step: run_journal.metrics(step, VALUES)
    }
    for name, uri in {"sqlite": f"sqlite:///{folder}/plain.db", "server": server.uri}.items():
        client = mlflow.MlflowClient(uri)
        run = client.create_run(client.create_experiment(name)).info.run_id
        writers[f"mlflow.log_metrics, {name}"] = _plain(mlflow, uri, run)
    spent: dict[str, list[float]] = {name: [] for name in writers}
    for step in range(STEPS):
        for name, write in writers.items():
            start = time.perf_counter()
            write(step)
            spent[name].append((time.perf_counter() - start) * 1e6)
    server.kill()
    ours = statistics.median(spent["metrics.jsonl (ours)"])
    print(f"{'':30s} {'median us':>10s} {'slowest us':>11s} {'ratio':>7s}")
    for name, times in spent.items():
        median = statistics.median(times)
        print(f"{name:30s} {median:10.0f} {max(times):11.0f} {median / ours:7.0f}")


def _plain(mlflow: Any, uri: str, run: str) -> Callable[[int], None]:
    def write(step: int) -> None:
        mlflow.set_tracking_uri(uri)
        mlflow.log_metrics(VALUES, step=step, run_id=run)

    return write


if __name__ == "__main__":
    main()
