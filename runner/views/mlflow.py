"""Upload run folders to MLflow, which is a view of them: idempotently, and from scratch if needed.

A cursor file in the run folder records which points of metrics.jsonl a store has
(runner/views/mlflow_cursors.py, mlflow_points.py). A delivery that was cut off is repeated with the
same timestamps, which MLflow's stores accept once. Of all uploaders, one at a time holds a cursor's
lock: it alone may make the run. The holder of `mlflow/lock` may write to the embedded store; who
has it open shares `mlflow/open`, which is held alone to delete it.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runner.machine import storage
from runner.machine.errors import DataError, StorageError
from runner.records.cells import members
from runner.views.mlflow_cursors import Cursor, embedded_uri, forget, recorded_store
from runner.views.mlflow_page import set_up_page
from runner.views.mlflow_points import Point, PointReader, indices, ranges
from runner.views.mlflow_runs import (
    clean_name,
    find_or_create,
    params_of,
    run_name,
    write_state,
)

NOTICE = "MLflow: "  # begins a line of the uploader's log that is meant for the user
_SENDERS = 8  # uploaders of one root that may talk to a server at the same time
_CLIENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
}


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
        self._readers: dict[str, PointReader] = {}  # by run id
        self._pages: dict[str, int] = {}  # number of cells of which a sweep's page tells
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
            raise self._incomplete(sweep, _reason(error)) from error

    def refresh_page(self, sweep: str) -> None:
        """Bring the page of a sweep up to date with what was drawn and concluded since.

        Raises:
            StorageError: the store does not take it.
        """
        try:
            experiment = self.client.get_experiment_by_name(sweep)
            if experiment is not None and experiment.lifecycle_stage != "deleted":
                page = str(experiment.experiment_id)
                set_up_page(self.client, page, self.root, sweep, self.uri)
        except self._refusals as error:
            raise self._incomplete(sweep, _reason(error)) from error

    def say_what_is_deleted(self, sweep: str) -> None:
        """Say which runs of a sweep were deleted in the store and are left out, if any.

        Raises:
            StorageError: the store does not answer.
        """
        from mlflow.entities import ViewType  # noqa: PLC0415

        sent = {self._cursor(sweep, row).read().get("run_id") for row in members(self.root, sweep)}
        try:
            experiment = self.client.get_experiment_by_name(sweep)
            if experiment is None:
                return
            deleted = self.client.search_runs(
                [experiment.experiment_id], run_view_type=ViewType.DELETED_ONLY
            )
        except self._refusals as error:
            raise self._incomplete(sweep, _reason(error)) from error
        count = len(sent.intersection(run.info.run_id for run in deleted))
        if count:
            _notice(
                f"{count} runs of {sweep!r} were deleted there and are left out, as they have "
                f"nothing new; `espalier sync {sweep} --rebuild` brings them back"
            )

    def _deliver(self, sweep: str, only: str | None) -> int:
        listed = members(self.root, sweep)
        rows = [row for row in listed if only in (None, row["fingerprint"])]
        sent, refused, experiment = 0, list[str](), None
        for row in rows:
            cursor = self._cursor(sweep, row)
            try:
                if cursor.is_behind():
                    experiment = experiment or self._experiment(sweep)
                    if self._pages.get(sweep) != len(listed):
                        set_up_page(self.client, experiment, self.root, sweep, self.uri)
                        self._pages[sweep] = len(listed)
                    sent += self._deliver_cell(experiment, cursor, row)
            except (DataError, *self._refusals) as error:  # DataError: its files are damaged
                if not isinstance(error, DataError) and not _concerns_one_run(error):
                    raise
                name = run_name(row["label"], row["fingerprint"])
                refused.append(f"{name}: {_reason(error)}")
        if refused:
            raise self._incomplete(sweep, f"{refused[0]} ({len(refused)} runs refused)")
        return sent

    def _incomplete(self, sweep: str, reason: str) -> StorageError:
        return StorageError(
            f"the MLflow store {self.uri} took not everything: {reason}; "
            f"nothing is lost, `espalier sync {sweep}` delivers the rest"
        )

    def _cursor(self, sweep: str, row: dict[str, Any]) -> Cursor:
        return Cursor(self.root / "runs" / row["fingerprint"], sweep, self.uri)

    def _experiment(self, sweep: str) -> str:
        """Return the id of the sweep's experiment, made or restored if need be."""
        experiment = self.client.get_experiment_by_name(sweep)
        if experiment is None:
            return self._new_experiment(sweep)
        if experiment.lifecycle_stage == "deleted":  # its name stays taken
            try:
                self.client.restore_experiment(experiment.experiment_id)
            except self._refusals:
                if self.client.get_experiment_by_name(sweep).lifecycle_stage == "deleted":
                    raise  # else another uploader was faster
            _notice(
                f"experiment {sweep!r} was deleted there; its runs have new results, so it is "
                "restored"
            )
        return str(experiment.experiment_id)

    def _new_experiment(self, sweep: str) -> str:
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

    def _deliver_cell(self, experiment: str, cursor: Cursor, member: dict[str, Any]) -> int:
        """Bring one run up to date, made if the store has none; return the points sent."""
        choices = member.get("choices", {})
        with storage.locked(cursor.lock):
            if not cursor.is_behind():
                return 0  # another uploader was faster
            entries = cursor.read()
            if "run_id" in entries:
                try:
                    return self._update(cursor, entries, choices)
                except self._refusals as error:
                    if not _concerns_one_run(error) or not self._is_deleted(entries["run_id"]):
                        raise
                name = run_name(member["label"], cursor.run.name)
                _notice(f"run {name!r} was deleted there; it has new results and is made anew")
            run_id = find_or_create(self.client, experiment, cursor.run, member["label"], choices)
            entries = {"experiment": experiment, "run_id": run_id, "sent": 0, "params": 0}
            cursor.write(entries)
            return self._update(cursor, entries, choices)

    def _is_deleted(self, run_id: str) -> bool:
        try:
            return bool(self.client.get_run(run_id).info.lifecycle_stage == "deleted")
        except self._refusals as error:
            if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
                return True
            raise

    def _update(self, cursor: Cursor, entries: dict[str, Any], choices: dict[str, str]) -> int:
        """Send what the store lacks of a run and record it in the cursor; return the points."""
        from mlflow.entities import Metric  # noqa: PLC0415

        now = cursor.now()
        run_id = entries["run_id"]
        reader = self._readers.setdefault(run_id, PointReader(cursor.run))
        reader.read()
        self._send_params(entries, params_of(cursor.run, choices))
        sent = 0
        for points in self._batches(reader, cursor, entries):
            metrics = [Metric(clean_name(k), value, time, step) for k, step, time, value in points]
            self.client.log_batch(run_id, metrics=metrics)
            sent += len(points)
        scores = [Metric(clean_name(key), *rest) for key, *rest in reader.scores()]
        if scores and entries.get("scored") != now.get("scored", 0):
            self.client.log_batch(run_id, metrics=scores)
        if reader.superseded() != entries.get("superseded", 0):
            entries["superseded"] = reader.superseded()
            self.client.set_tag(run_id, "superseded_points", str(entries["superseded"]))
        write_state(self.client, run_id, cursor.run, now["state"])
        cursor.write(entries | now)
        return sent

    def _send_params(self, entries: dict[str, Any], pairs: list[tuple[str, str]]) -> None:
        """Send the parameters that the run lacks: summary.json comes after the run has begun."""
        from mlflow.entities import Param  # noqa: PLC0415

        if "params" not in entries:  # sent by an earlier release
            return
        params = [Param(*pair) for pair in pairs]
        for start in range(entries["params"], len(params), 100):  # MLflow takes 100 a call
            self.client.log_batch(entries["run_id"], params=params[start : start + 100])
        entries["params"] = len(params)

    def _batches(
        self, reader: PointReader, cursor: Cursor, entries: dict[str, Any]
    ) -> Iterator[list[Point]]:
        """Yield batches of points to send; resuming records the last batch in the cursor."""
        reader.mark_delivered(entries["sent"], indices(entries.get("past", [])))
        while entries["sent"] < len(reader.points):
            points, past, after = reader.next_batch()
            if points:
                yield points
            past_indices = [*indices(entries.get("past", [])), *past]
            entries |= {"sent": after, "past": ranges(past_indices)}
            reader.mark_delivered(after, past)
            cursor.write(entries)


def _concerns_one_run(error: Exception) -> bool:
    """Return whether a store refused a request for what it says of a run, and may take others."""
    status = getattr(error, "get_http_status_code", lambda: 500)()
    return 400 <= status < 500 and status not in (401, 403, 429)


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _notice(text: str) -> None:
    print(f"{NOTICE}{text}", file=sys.stderr, flush=True)


def delivered(sweep: Path, uri: str | None) -> bool:
    """Return whether the cursors say that a store has all of a sweep, without asking the store."""
    root = sweep.parent.parent
    runs = [root / "runs" / row["fingerprint"] for row in members(root, sweep.name)]
    store = uri or embedded_uri(root)
    return not any(Cursor(run, sweep.name, store).is_behind() for run in runs)


@contextmanager
def one_writer(root: Path, uri: str | None) -> Iterator[None]:
    """Hold the lock of the embedded store, waiting for other processes; a server needs none.

    It is held for a delivery, not for the hours of a sweep: those of one root take turns.
    """
    if uri is not None:
        yield
        return
    with storage.locked(root / "mlflow" / "lock"):
        yield


@contextmanager
def open_store(root: Path, uri: str | None, *, alone: bool = False) -> Iterator[None]:
    """Keep the embedded store from being deleted while a client of it is open.

    Args:
        alone: wait until no other process has it open, and keep them out.
    """
    if uri is not None:
        yield
        return
    file = root / "mlflow" / "open"
    if alone:
        with storage.try_locked(file) as free:
            if free:
                yield
                return
        _notice("waiting for sweeps that run to end: they write to the store")
    with storage.locked(file, shared=not alone):
        yield


def sync(root: Path, sweeps: list[str], uri: str | None = None, *, rebuild: bool = False) -> int:
    """Deliver what the store lacks of `sweeps`; return the number of points sent.

    Args:
        uri: of the store; None is the one that each sweep was tracked in.
        rebuild: write the sweeps again from the start. The embedded store is deleted first, and all
            sweeps that were in it are written; a server keeps its runs and gets those it lacks.

    Raises:
        ConfigError: there is no such sweep.
        StorageError: the store did not take all.
    """
    stores: dict[str | None, list[str]] = {}
    for sweep in sweeps:
        store = uri or recorded_store(root, sweep)
        stores.setdefault(None if store == embedded_uri(root) else store, []).append(sweep)
    sent = 0
    for store, names in stores.items():
        with open_store(root, store, alone=rebuild), one_writer(root, store):
            had = _forget(root, names, store) if rebuild else []
            uploader = Uploader(root, store)
            for sweep in dict.fromkeys([*names, *had]):
                sent += uploader.deliver(sweep)
                uploader.refresh_page(sweep)
                uploader.say_what_is_deleted(sweep)
    return sent


def refresh_pages(root: Path) -> None:
    """Bring the pages of the embedded store up to date, unless another process writes to it."""
    if not (root / "mlflow" / "mlflow.db").exists():
        return
    with storage.try_locked(root / "mlflow" / "lock") as held:
        if held:
            uploader = Uploader(root, None)
            for cells in root.glob("sweeps/*/cells.jsonl"):
                uploader.refresh_page(cells.parent.name)


def _forget(root: Path, sweeps: list[str], uri: str | None) -> list[str]:
    """Forget what a store has of `sweeps`; delete the embedded store and return all it had."""
    if uri is not None:
        return forget(root, uri, sweeps)
    for suffix in ("", "-journal", "-wal", "-shm"):
        (root / "mlflow" / f"mlflow.db{suffix}").unlink(missing_ok=True)
    return forget(root, embedded_uri(root))
