"""Upload run folders to MLflow, which is a view of them: idempotently, and from scratch if needed.

A cursor file in the run folder records which points of metrics.jsonl a store has
(runner/views/mlflow_points.py). A delivery that was cut off is repeated with the same timestamps,
which MLflow's stores accept once. The holder of `mlflow/lock` may write to the embedded store.

`python -m runner.views.mlflow --root R --until-closed NAME` uploads until standard input closes.
"""

import argparse
import getpass
import hashlib
import json
import logging
import os
import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runner.machine import storage
from runner.machine.errors import EspalierError, StorageError
from runner.records import journal
from runner.records.cells import members
from runner.records.config import execution_half, flatten, is_among
from runner.records.metrics import FILE
from runner.views.mlflow_points import Point, PointReader, indices, ranges

_SENDERS = 8  # uploaders of one root that may talk to a server at the same time
_EVERY_S, _LONGEST_PAUSE_S = 2.0, 60.0
_CLIENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
}
_STATUS = {
    "finished": "FINISHED",
    "failed": "FAILED",
    "diverged": "FAILED",
    "interrupted": "KILLED",
    "running": "RUNNING",
}


def embedded_uri(root: Path) -> str:
    """Return the URI of the embedded store under `root`."""
    return f"sqlite:///{root.resolve() / 'mlflow' / 'mlflow.db'}"


class Uploader:
    """Uploads the cells of sweeps to one MLflow store.

    Args:
        root: the folder of runs/ and sweeps/.
        uri: of the store; None is the embedded one.

    Raises:
        StorageError: the store cannot be opened.
    """

    def __init__(self, root: Path, uri: str | None) -> None:
        # Short time-outs: what an unreachable server misses is delivered later.
        for name, value in _CLIENT.items():
            os.environ.setdefault(name, value)
        from mlflow.exceptions import MlflowException  # noqa: PLC0415
        from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415

        logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # what it logs, it also raises
        from mlflow import MlflowClient  # noqa: PLC0415  (2 s)

        self.root, self.uri = root.resolve(), uri or embedded_uri(root)
        self.embedded = uri is None
        if self.embedded:  # SQLite would make it for its owner alone to write, whatever the umask
            (self.root / "mlflow").mkdir(exist_ok=True)
            (self.root / "mlflow" / "mlflow.db").touch()
        self._readers: dict[Path, PointReader] = {}  # by cursor
        self._refusals = (MlflowException, SQLAlchemyError)
        try:
            self.client = MlflowClient(self.uri)
        except self._refusals as error:
            raise StorageError(
                f"the MLflow store {self.uri} cannot be opened: {_reason(error)}; if another "
                "program holds it, wait for that; else, it is only a view: "
                "`espalier sync NAME --rebuild` makes it anew from the run folders"
            ) from error

    def deliver(self, sweep: str, only: str | None = None) -> int:
        """Bring the store up to date with a sweep; return the number of points sent.

        Args:
            only: the fingerprint of the one cell to deliver.

        Raises:
            StorageError: the store did not take all; the cursors record what it took.
        """
        try:
            if self.embedded:
                return self._deliver(sweep, only)
            # A server of one worker with SQLite behind it locks up when dozens write at once.
            with storage.semaphore(self.root / "mlflow" / "senders", _SENDERS):
                return self._deliver(sweep, only)
        except self._refusals as error:
            raise StorageError(
                f"the MLflow store {self.uri} took not everything: {_reason(error)}; "
                f"nothing is lost, `espalier sync {sweep}` delivers the rest"
            ) from error

    def _deliver(self, sweep: str, only: str | None) -> int:
        experiment = self._experiment(sweep)
        sent = 0
        for row in members(self.root, sweep):
            folder = self.root / "runs" / row["fingerprint"]
            if only in (None, row["fingerprint"]) and journal.state(folder) != "new":
                sent += self._deliver_cell(experiment, sweep, folder, row["label"])
        return sent

    def _experiment(self, sweep: str) -> str:
        experiment = self.client.get_experiment_by_name(sweep)
        if experiment is not None:
            return str(experiment.experiment_id)
        artifacts = (self.root / "mlflow" / "artifacts" / sweep).as_uri() if self.embedded else None
        # The kind makes the UI open on training runs with their metrics, not on traces.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        try:
            return str(self.client.create_experiment(sweep, artifact_location=artifacts, tags=tags))
        except self._refusals:
            experiment = self.client.get_experiment_by_name(sweep)
            if experiment is None:
                raise
            return str(experiment.experiment_id)  # another uploader was faster

    def _deliver_cell(self, experiment: str, sweep: str, folder: Path, label: str) -> int:
        from mlflow.entities import Metric  # noqa: PLC0415

        file = _cursor_file(folder, sweep, self.uri)
        cursor = json.loads(file.read_text()) if file.exists() else {}
        now = _now(folder)
        state, scored = now["state"], now.get("scored", 0)
        if now.items() <= cursor.items():
            return 0
        if "run_id" not in cursor:
            run_id = self._open_run(experiment, folder, label)
            cursor = {"experiment": experiment, "run_id": run_id, "sent": 0}
            _write(file, cursor)
            self._readers.pop(file, None)
        run_id, reader = cursor["run_id"], self._readers.setdefault(file, PointReader(folder))
        reader.read()
        sent = 0
        for points in self._batches(reader, file, cursor):
            metrics = [Metric(key, value, time, step) for key, step, time, value in points]
            self.client.log_batch(run_id, metrics=metrics)
            sent += len(points)
        scores = [Metric(*score) for score in reader.scores()]
        if scores and cursor.get("scored") != scored:
            self.client.log_batch(run_id, metrics=scores)
        if reader.superseded() != cursor.get("superseded", 0):
            cursor["superseded"] = reader.superseded()
            self.client.set_tag(run_id, "superseded_points", str(cursor["superseded"]))
        self._close(run_id, folder, state)
        _write(file, cursor | now)
        return sent

    def _batches(
        self, reader: PointReader, file: Path, cursor: dict[str, Any]
    ) -> Iterator[list[Point]]:
        """Yield batches of points to send; resuming records the last batch in the cursor."""
        reader.mark_delivered(cursor["sent"], indices(cursor.get("past", [])))
        while cursor["sent"] < len(reader.points):
            points, past, after = reader.next_batch()
            if points:
                yield points
            cursor |= {"sent": after, "past": ranges([*indices(cursor.get("past", [])), *past])}
            reader.mark_delivered(after, past)
            _write(file, cursor)

    def _open_run(self, experiment: str, folder: Path, label: str) -> str:
        from mlflow.entities import Param  # noqa: PLC0415

        record = json.loads((folder / "cell.json").read_text())
        key = record["fingerprint"]
        # There is one already only after a crash between creating it and recording its id.
        runs = self.client.search_runs([experiment], f"tags.fingerprint = '{key}'", max_results=1)
        if runs:
            return str(runs[0].info.run_id)
        half = execution_half(record["config"])
        execution = {k: v for k, v in flatten(record["config"]).items() if is_among(k, half)}
        tags = {"fingerprint": key, "folder": str(folder)}
        tags |= {f"execution.{k}": json.dumps(v) for k, v in execution.items()}
        tags |= {"mlflow.source.name": "espalier", "mlflow.user": getpass.getuser()}
        lease = journal.attempts(folder)[0] / "lease.json"
        started_ms = int(lease.stat().st_mtime * 1000)
        run = self.client.create_run(experiment, started_ms, tags, run_name=label)
        run_id = str(run.info.run_id)
        params = [Param(k, _param(v)) for k, v in record["science"].items()]
        summary = folder / "summary.json"
        if summary.exists():
            facts = json.loads(summary.read_text())
            params += [Param(k, str(v)) for k, v in facts.items()]
        for start in range(0, len(params), 100):  # MLflow takes 100 parameters a call
            self.client.log_batch(run_id, params=params[start : start + 100])
        return run_id

    def _close(self, run_id: str, folder: Path, state: str) -> None:
        tries = journal.attempts(folder)
        attempt = tries[-1]
        environment = attempt / "environment.json"
        if environment.exists():
            sha = json.loads(environment.read_text())["git_sha"]
            for tag in ("git_sha", "mlflow.source.git.commit"):
                self.client.set_tag(run_id, tag, sha)
        self.client.set_tag(run_id, "attempt", str(int(attempt.name)))
        if any(e["event"] == "not_bit_identical" for a in tries for e in journal.events(a)):
            self.client.set_tag(run_id, "bit_identical", "false")
        if state == "diverged":
            self.client.set_tag(run_id, "diverged", "true")
        if state == "running":
            self.client.update_run(run_id, status="RUNNING")
            return
        for name in ("cell.json", "samples.txt", "summary.json", "precision.json"):
            if (folder / name).exists():
                self.client.log_artifact(run_id, str(folder / name))
        for scored in sorted((folder / "evals").glob("[0-9a-f]*")):
            self.client.log_artifact(run_id, str(scored), "evals")
        saved = sorted((folder / "checkpoints").glob("[0-9]*"))
        if saved:
            self.client.log_text(run_id, f"{saved[-1]}\n", "checkpoint.txt")
        events = journal.events(attempt)
        ended_ms = int(events[-1]["time"] * 1000) if events else None
        self.client.set_terminated(run_id, _STATUS[state], end_time=ended_ms)


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _param(value: Any) -> str:
    return (value if isinstance(value, str) else json.dumps(value))[:6000]


def delivered(sweep: Path, uri: str | None) -> bool:
    """Return whether the cursors say that a store has all of a sweep, without asking the store."""
    root = sweep.parent.parent
    for row in members(root, sweep.name):
        folder = root / "runs" / row["fingerprint"]
        file, now = _cursor_file(folder, sweep.name, uri or embedded_uri(root)), _now(folder)
        cursor = json.loads(file.read_text()) if file.exists() else {}
        if now["state"] != "new" and not now.items() <= cursor.items():
            return False
    return True


def _cursor_file(folder: Path, sweep: str, uri: str) -> Path:
    """Return the file that records how much of a run the store at `uri` has."""
    return folder / "mlflow" / f"{sweep}-{hashlib.sha256(uri.encode()).hexdigest()[:8]}.json"


def _now(folder: Path) -> dict[str, Any]:
    """Return the entries of a cursor that differ when a run has changed since its delivery."""
    scored = max((f.stat().st_mtime_ns for f in folder.glob("evals/*.json")), default=0)
    now = {"state": journal.state(folder), "size": _size(folder / FILE)}
    return now | ({"scored": scored} if scored else {})


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _write(file: Path, cursor: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    storage.write_atomically(file, json.dumps(cursor))


@contextmanager
def one_writer(root: Path, uri: str | None) -> Iterator[None]:
    """Hold the lock of the embedded store, waiting for other processes; a server needs none."""
    if uri is not None:
        yield
        return
    with storage.locked(root / "mlflow" / "lock"):
        yield


def sync(root: Path, sweeps: list[str], uri: str | None, *, rebuild: bool = False) -> int:
    """Deliver what the store lacks of `sweeps`; return the number of points sent.

    `rebuild` deletes the embedded store and its cursors first.

    Raises:
        StorageError: the store did not take all.
    """
    with one_writer(root, uri):
        if rebuild and uri is None:
            (root / "mlflow" / "mlflow.db").unlink(missing_ok=True)
            for cursor in root.glob("runs/*/mlflow/*.json"):
                cursor.unlink()
        uploader = Uploader(root, uri)
        return sum(uploader.deliver(sweep) for sweep in sweeps)


def upload_until_closed(
    root: Path, sweeps: list[str], uri: str | None, only: str | None = None
) -> None:
    """Deliver every few seconds until standard input closes, then once more; retry on errors."""
    done = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.buffer.read()
        done.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    with one_writer(root, uri):
        uploader = Uploader(root, uri)
        pause_s = _EVERY_S
        while not done.wait(pause_s):
            try:
                for sweep in sweeps:
                    uploader.deliver(sweep, only)
                pause_s = _EVERY_S
            except Exception as error:  # training goes on, whatever the server does
                print(f"not delivered, trying again: {error}", file=sys.stderr, flush=True)
                # A random pause, so that many uploaders of a slow server do not return at once.
                pause_s = min(_LONGEST_PAUSE_S, pause_s * random.uniform(1.0, 3.0))
        for sweep in sweeps:
            uploader.deliver(sweep, only)


def main() -> None:
    """Command line of the uploader process."""
    parser = argparse.ArgumentParser(prog="python -m runner.views.mlflow", description=__doc__)
    parser.add_argument("sweeps", nargs="+")
    parser.add_argument("--root", type=Path, default=Path("."))
    parser.add_argument("--uri")
    parser.add_argument("--only", metavar="FINGERPRINT")
    parser.add_argument("--until-closed", action="store_true")
    given = parser.parse_args()
    try:
        if given.until_closed:
            upload_until_closed(given.root, given.sweeps, given.uri, given.only)
        else:
            print(sync(given.root, given.sweeps, given.uri))
    except EspalierError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
