"""What a store shows of a run beside its metrics: name, parameters, tags, files and status.

Names and values are cut to what the columns of MLflow's SQL stores hold and its servers accept.
"""

import getpass
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.machine import environment
from runner.machine.typed_json import read_record
from runner.records import journal
from runner.records.cells import read_cell
from runner.records.config import execution_half, flatten, is_among

if TYPE_CHECKING:
    from mlflow import MlflowClient

_NAME, _VALUE = 250, 6000  # characters that a column holds
_NOT_IN_NAMES = re.compile(r"[^\w\-. :/]")
_STATUS = {
    "finished": "FINISHED",
    "failed": "FAILED",
    "diverged": "FAILED",
    "interrupted": "KILLED",
    "running": "RUNNING",
}


def find_or_create(
    client: "MlflowClient", experiment: str, folder: Path, label: str, choices: dict[str, str]
) -> str:
    """Return the id of the run of `folder` in an experiment, which is made if there is none.

    Args:
        choices: the name chosen in each group, tags of the run.
    """
    record = read_cell(folder)
    key = record["fingerprint"]
    # There is one already only after a crash between creating it and recording its id.
    runs = client.search_runs([experiment], f"tags.fingerprint = '{key}'", max_results=1)
    if runs:
        return str(runs[0].info.run_id)
    half = execution_half(record["config"])
    execution = {k: v for k, v in flatten(record["config"]).items() if is_among(k, half)}
    tags = choices | {"fingerprint": key, "folder": str(folder)}
    tags |= {clean_name(f"execution.{k}"): _text(json.dumps(v)) for k, v in execution.items()}
    tags |= {"mlflow.source.name": "espalier", "mlflow.user": _user()}
    lease = journal.attempts(folder)[0] / "lease.json"
    started_ms = int(lease.stat().st_mtime * 1000)
    run = client.create_run(experiment, started_ms, tags, run_name=run_name(label, key))
    return str(run.info.run_id)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container the number may have no name
        return str(os.getuid())


def run_name(label: str, fingerprint: str) -> str:
    """Return `label`; one longer than the column ends in the fingerprint instead of its rest."""
    if len(label) <= _NAME:
        return label
    tail = f"... {fingerprint}"
    return label[: _NAME - len(tail)] + tail


def clean_name(name: str) -> str:
    """Return the name of a metric, parameter or tag as MLflow accepts it.

    Other characters than letters, digits and `_-. :/` become `_`; it reads as a relative path.
    """
    parts = _NOT_IN_NAMES.sub("_", name).split("/")
    return "/".join(part for part in parts if part.strip("."))[:_NAME] or "_"


def params_of(folder: Path, choices: dict[str, str]) -> list[tuple[str, str]]:
    """Return the parameters (name, value): hashed keys, choices, then the facts of summary.json."""
    record = read_cell(folder)
    summary = folder / "summary.json"
    facts = read_record(summary) if summary.exists() else {}
    hashed = record["science"] | choices
    keys = [(k, v if isinstance(v, str) else json.dumps(v)) for k, v in hashed.items()]
    return [(clean_name(k), _text(v)) for k, v in (*keys, *((k, str(v)) for k, v in facts.items()))]


def write_state(client: "MlflowClient", run_id: str, folder: Path, state: str) -> None:
    """Bring tags and status up to date and, unless the run goes on, its files."""
    tries = journal.attempts(folder)
    attempt = tries[-1]
    sha = environment.last_record(folder).get("git_sha")
    if sha is not None:
        for tag in ("git_sha", "mlflow.source.git.commit"):
            client.set_tag(run_id, tag, sha)
    client.set_tag(run_id, "attempt", str(int(attempt.name)))
    client.set_tag(run_id, "state", state)
    if any(e["event"] == "not_bit_identical" for a in tries for e in journal.events(a)):
        client.set_tag(run_id, "bit_identical", "false")
    if state == "diverged":
        client.set_tag(run_id, "diverged", "true")
    if state == "running":
        client.update_run(run_id, status="RUNNING")
        return
    for name in ("cell.json", "samples.txt", "summary.json", "precision.json"):
        if (folder / name).exists():
            client.log_artifact(run_id, str(folder / name))
    for scored in sorted((folder / "evals").glob("[0-9a-f]*")):
        client.log_artifact(run_id, str(scored), "evals")
    saved = sorted((folder / "checkpoints").glob("[0-9]*"))
    if saved:
        client.log_text(run_id, f"{saved[-1]}\n", "checkpoint.txt")
    events: list[dict[str, Any]] = journal.events(attempt)
    ended_ms = int(events[-1]["time"] * 1000) if events else None
    client.set_terminated(run_id, _STATUS[state], end_time=ended_ms)


def _text(value: str) -> str:
    return value[:_VALUE]
