"""The policy of a sweep: halt it after equal failures, notify somebody at its end.

sweeps/<name>/policy.json            the policy, for jobs that outlive the launcher
sweeps/<name>/alike/<cause>/<cell>   one file for each cell that failed in this way (safe on NFS)
sweeps/<name>/told                   created by the process that calls on_finish or on_failure
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from models.config import config
from runner.machine import storage
from runner.machine.typed_json import read_record
from runner.records import journal
from runner.records.cells import Cell, members
from runner.records.config import typed
from runner.records.failures import last_failure, signature

STUDY_ENDED = (*journal.ENDED, "interrupted")  # states of ended trials; pruned are interrupted


@config
class Policy:
    """Keys of the sweeper.

    Args:
        max_alike: cells with the same traceback after which no further cell starts (None: no
            limit).
        on_finish, on_failure: a shell command or an http(s) URL, called once when all cells have
            ended; on_failure if any has failed. A command gets the sweep and the number of cells by
            state in ESPALIER_SWEEP and ESPALIER_STATES, a URL gets them as JSON.
    """

    max_alike: int | None = 5
    on_finish: str | None = None
    on_failure: str | None = None


def start(folder: Path, policy: Policy, *, fresh: bool = True) -> None:
    """Write the policy of a sweep; with `fresh` forget earlier failures and notifications."""
    if fresh:
        shutil.rmtree(folder / "alike", ignore_errors=True)
        (folder / "told").unlink(missing_ok=True)
    storage.write_atomically(folder / "policy.json", json.dumps(asdict(policy)))


def note_failure(cell: Cell) -> None:
    """Count a failed cell by its signature."""
    digest = hashlib.sha256("\0".join(signature(last_failure(cell))).encode()).hexdigest()[:16]
    alike = cell.sweep / "alike" / digest
    alike.mkdir(parents=True, exist_ok=True)
    (alike / cell.fingerprint).touch()


def halted(cell: Cell) -> str | None:
    """Return the reason why no further cell of this sweep starts, None if they do."""
    folder = cell.sweep
    causes = list((folder / "alike").glob("*"))  # empty in a healthy sweep: one look-up
    if not causes:
        return None
    most = max(len(list(cause.iterdir())) for cause in causes)
    limit = load_policy(folder).max_alike
    if limit is None or most < limit:
        return None
    return (
        f"{most} cells failed alike (hydra.sweeper.max_alike={limit}): no further one starts; "
        f"`espalier failures {folder.name}`"
    )


def notify(folder: Path, ended: tuple[str, ...] = journal.ENDED) -> None:
    """Call on_finish or on_failure, once, if the state of every cell is in `ended`."""
    policy = load_policy(folder)
    if policy.on_finish is None and policy.on_failure is None:
        return
    root = folder.parent.parent
    rows = members(root, folder.name)
    states = Counter(journal.state(root / "runs" / row["fingerprint"]) for row in rows)
    if set(states) - set(ended):
        return
    target = policy.on_failure if states["failed"] else policy.on_finish
    try:
        (folder / "told").touch(exist_ok=False)
    except FileExistsError:
        return
    if target is not None:
        _call(target, folder.name, states)


def _call(target: str, name: str, states: Counter[str]) -> None:
    body = json.dumps({"sweep": name, "states": states})
    try:
        if target.startswith(("http://", "https://")):
            import urllib.request  # noqa: PLC0415

            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(target, body.encode(), headers)
            urllib.request.urlopen(request, timeout=30).close()
        else:
            variables = {"ESPALIER_SWEEP": name, "ESPALIER_STATES": json.dumps(states)}
            environment = os.environ | variables
            subprocess.run(target, shell=True, env=environment, check=True, timeout=600)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"{target} could not be called: {error}", file=sys.stderr)


def load_policy(folder: Path) -> Policy:
    """Return the policy of a sweep's folder, the default if it has none."""
    file = folder / "policy.json"
    return typed(str(file), Policy, read_record(file) if file.exists() else {})
