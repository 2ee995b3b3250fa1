"""MLflow is a view of the run folders: this feeds it, idempotently, and can rebuild it.

The points of metrics.jsonl, each (key, step) once in file order, form a list that only grows; how
many of them a store has is kept in the run folder. Delivery that was cut off is repeated with the
same timestamps, which MLflow's stores take once. The embedded SQLite store has one writer: whoever
holds `mlflow/lock`.

`python -m runner.tracking --root R --follow NAME` feeds until its standard input closes.
"""

import argparse
import fcntl
import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runner import journal
from runner.config import flatten
from runner.errors import StorageError
from runner.sweep.cells import members
from runner.sweep.fingerprint import is_execution

_BATCH = 1000
_STATUS = {
    "finished": "FINISHED",
    "failed": "FAILED",
    "diverged": "FAILED",
    "interrupted": "KILLED",
    "running": "RUNNING",
}
Point = tuple[str, int, int, float]


def embedded_uri(root: Path) -> str:
    """Return the URI of the embedded store under `root`."""
    return f"sqlite:///{root.resolve() / 'mlflow' / 'mlflow.db'}"


def points(run: Path) -> tuple[list[Point], int]:
    """Return ((key, step, time in ms, value), each (key, step) once) and how many were superseded.

    A point counts as superseded where a later attempt wrote another value for the same step.
    """
    first: dict[tuple[str, int], Point] = {}
    superseded = 0
    for line in journal.read_lines(run / "metrics.jsonl"):
        if "restored" in line:
            continue
        for key, value in line.items():
            if key in ("step", "time", "attempt"):
                continue
            point = (key, line["step"], int(line["time"] * 1000), float(value))
            earlier = first.setdefault((key, line["step"]), point)
            timed = key.startswith("system/") or key.endswith(("_s", "mfu", "fraction"))
            superseded += not timed and earlier[3] != point[3]
    return list(first.values()), superseded


class Feeder:
    """Delivers the cells of sweeps to one MLflow store."""

    def __init__(self, root: Path, uri: str | None) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient  # noqa: PLC0415  (2 s)
        from mlflow.exceptions import MlflowException  # noqa: PLC0415

        self.root, self.uri = root.resolve(), uri or embedded_uri(root)
        self.embedded = uri is None
        self._cursor = hashlib.sha256(self.uri.encode()).hexdigest()[:8]
        try:
            self.client = MlflowClient(self.uri)
        except MlflowException as error:
            raise StorageError(
                f"the MLflow store {self.uri} cannot be opened: {error}; it is only a view: "
                "`espalier sync NAME --rebuild` makes it anew from the run folders"
            ) from error

    def deliver(self, sweep: str) -> int:
        """Bring the store up to date with all cells of `sweep`; return the points sent."""
        experiment = self._experiment(sweep)
        sent = 0
        for row in members(self.root, sweep):
            folder = self.root / "runs" / row["fingerprint"]
            if journal.state(folder) != "new":
                sent += self._deliver_cell(experiment, sweep, folder, row["label"])
        return sent

    def _experiment(self, sweep: str) -> str:
        found = self.client.get_experiment_by_name(sweep)
        if found is not None:
            return str(found.experiment_id)
        place = (self.root / "mlflow" / "artifacts" / sweep).as_uri() if self.embedded else None
        return str(self.client.create_experiment(sweep, artifact_location=place))

    def _deliver_cell(self, experiment: str, sweep: str, folder: Path, label: str) -> int:
        from mlflow.entities import Metric  # noqa: PLC0415

        file = folder / "mlflow" / f"{sweep}-{self._cursor}.json"
        cursor = json.loads(file.read_text()) if file.exists() else {}
        state, size = journal.state(folder), _size(folder / "metrics.jsonl")
        if cursor.get("state") == state and cursor.get("size") == size:
            return 0
        if "run_id" not in cursor:
            cursor = {"run_id": self._open_run(experiment, folder, label), "sent": 0}
            _write(file, cursor)
        run_id, all_points = cursor["run_id"], points(folder)
        fresh = all_points[0][cursor["sent"] :]
        for start in range(0, len(fresh), _BATCH):
            batch = fresh[start : start + _BATCH]
            metrics = [Metric(key, value, time, step) for key, step, time, value in batch]
            self.client.log_batch(run_id, metrics=metrics)
            cursor["sent"] += len(batch)
            _write(file, cursor)
        self._close(run_id, folder, state, superseded=all_points[1])
        _write(file, cursor | {"state": state, "size": size})
        return len(fresh)

    def _open_run(self, experiment: str, folder: Path, label: str) -> str:
        from mlflow.entities import Param  # noqa: PLC0415

        record = json.loads((folder / "cell.json").read_text())
        key = record["fingerprint"]
        # Only after a crash between making a run and noting its id is there one to find.
        found = self.client.search_runs([experiment], f"tags.fingerprint = '{key}'", max_results=1)
        if found:
            return str(found[0].info.run_id)
        execution = {k: v for k, v in flatten(record["config"]).items() if is_execution(k)}
        tags = {"fingerprint": key, "folder": str(folder)}
        tags |= {f"execution.{k}": json.dumps(v) for k, v in execution.items()}
        run_id = str(self.client.create_run(experiment, tags=tags, run_name=label).info.run_id)
        params = [Param(k, _param(v)) for k, v in record["science"].items()]
        summary = folder / "summary.json"
        if summary.exists():
            facts = json.loads(summary.read_text())
            params += [Param(k, str(v)) for k, v in facts.items()]
        for start in range(0, len(params), 100):  # MLflow takes 100 parameters a call
            self.client.log_batch(run_id, params=params[start : start + 100])
        return run_id

    def _close(self, run_id: str, folder: Path, state: str, *, superseded: int) -> None:
        attempt = journal.attempts(folder)[-1]
        environment = attempt / "environment.json"
        if environment.exists():
            self.client.set_tag(run_id, "git_sha", json.loads(environment.read_text())["git_sha"])
        self.client.set_tag(run_id, "attempt", str(int(attempt.name)))
        if superseded:
            self.client.set_tag(run_id, "superseded_points", str(superseded))
        if state == "diverged":
            self.client.set_tag(run_id, "diverged", "true")
        if state == "running":
            self.client.update_run(run_id, status="RUNNING")
            return
        for name in ("cell.json", "samples.txt", "summary.json"):
            if (folder / name).exists():
                self.client.log_artifact(run_id, str(folder / name))
        self.client.set_tag(run_id, "checkpoints", str(folder / "checkpoints"))
        self.client.set_terminated(run_id, _STATUS[state])


def _param(value: Any) -> str:
    return (value if isinstance(value, str) else json.dumps(value))[:6000]


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _write(file: Path, cursor: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(cursor))
    os.replace(partial, file)


@contextmanager
def one_writer(root: Path) -> Iterator[None]:
    """Hold the embedded store; wait while another process does."""
    folder = root / "mlflow"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = open(folder / "lock", "w")  # noqa: SIM115
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written ({error.strerror}); set root= to a folder you can write"
        ) from error
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def sync(root: Path, sweeps: list[str], uri: str | None, *, rebuild: bool = False) -> int:
    """Deliver what is missing of `sweeps` and return the number of points sent."""
    with one_writer(root):
        if rebuild and uri is None:
            (root / "mlflow" / "mlflow.db").unlink(missing_ok=True)
            for cursor in root.glob("runs/*/mlflow/*.json"):
                cursor.unlink()
        feeder = Feeder(root, uri)
        return sum(feeder.deliver(sweep) for sweep in sweeps)


def follow(root: Path, sweeps: list[str], uri: str | None, every_s: float = 2.0) -> None:
    """Deliver until standard input closes, then once more; an unreachable server is tried again."""
    done = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.buffer.read()
        done.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    with one_writer(root):
        feeder = Feeder(root, uri)
        while not done.wait(every_s):
            try:
                for sweep in sweeps:
                    feeder.deliver(sweep)
            except Exception as error:  # whatever the server did, training goes on
                print(f"not delivered, trying again: {error}", file=sys.stderr, flush=True)
        for sweep in sweeps:
            feeder.deliver(sweep)


def main() -> None:
    """Command line of the feeder process."""
    parser = argparse.ArgumentParser(prog="python -m runner.tracking", description=__doc__)
    parser.add_argument("sweeps", nargs="+")
    parser.add_argument("--root", type=Path, default=Path("."))
    parser.add_argument("--uri")
    parser.add_argument("--follow", action="store_true")
    given = parser.parse_args()
    if given.follow:
        follow(given.root, given.sweeps, given.uri)
    else:
        print(sync(given.root, given.sweeps, given.uri))


if __name__ == "__main__":
    main()
