"""What a sweep does of itself: stops after failures that are all alike, tells somebody when it has ended.

sweeps/<name>/policy.json            the policy, for jobs that outlive the launcher
sweeps/<name>/alike/<cause>/<cell>   one file for each cell that failed in this way (safe on NFS)
sweeps/<name>/told                   made by who has called on_finish or on_failure
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
from runner.records import journal
from runner.records.cells import Cell, members
from runner.records.config import typed
from runner.records.failures import last_failure, signature

PRUNED_TOO = (*journal.ENDED, "interrupted")  # how the trials of a study end


@config
class Policy:
    """Keys of the sweeper.

    Args:
        max_alike: after so many cells failed with the same traceback no further one starts (None: all do).
        on_finish, on_failure: a shell command or an http(s) URL, called once when all cells have
            ended: on_failure if any failed. A command finds the sweep and its counts in
            ESPALIER_SWEEP and ESPALIER_STATES, a URL gets them as JSON.
    """

    max_alike: int | None = 5
    on_finish: str | None = None
    on_failure: str | None = None


def start(folder: Path, policy: Policy, *, fresh: bool = True) -> None:
    """Write the policy of a sweep; `fresh`, where cells will run: count failures and tell anew."""
    if fresh:
        shutil.rmtree(folder / "alike", ignore_errors=True)
        (folder / "told").unlink(missing_ok=True)
    storage.write_atomically(folder / "policy.json", json.dumps(asdict(policy)))


def note_failure(cell: Cell) -> None:
    """Count a failed cell among those that failed alike."""
    digest = hashlib.sha256("\0".join(signature(last_failure(cell))).encode()).hexdigest()[:16]
    place = cell.sweep / "alike" / digest
    place.mkdir(parents=True, exist_ok=True)
    (place / cell.fingerprint).touch()


def halted(cell: Cell) -> str | None:
    """Return why no further cell of this sweep starts, None while they do."""
    folder = cell.sweep
    places = list((folder / "alike").glob("*"))  # none in a healthy sweep: one look
    if not places:
        return None
    most = max(len(list(place.iterdir())) for place in places)
    limit = load(folder).max_alike
    if limit is None or most < limit:
        return None
    return f"{most} cells failed alike (hydra.sweeper.max_alike={limit}): no further one starts; `espalier failures {folder.name}`"


def tell(folder: Path, ended: tuple[str, ...] = journal.ENDED) -> None:
    """Call on_finish or on_failure if every member is in a state of `ended` and nobody has called yet."""
    policy = load(folder)
    if policy.on_finish is None and policy.on_failure is None:
        return
    root = folder.parent.parent
    rows = members(root, folder.name)
    states = Counter(journal.state(root / "runs" / row["fingerprint"]) for row in rows)
    if set(states) - set(ended):
        return
    target = policy.on_failure if states["failed"] else policy.on_finish
    try:
        os.close(os.open(folder / "told", os.O_CREAT | os.O_EXCL))
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
            told = {"ESPALIER_SWEEP": name, "ESPALIER_STATES": json.dumps(states)}
            subprocess.run(target, shell=True, env=os.environ | told, check=True, timeout=600)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"{target} could not be called: {error}", file=sys.stderr)


def load(folder: Path) -> Policy:
    """Return the policy of a sweep's folder, the default where it has none."""
    file = folder / "policy.json"
    return typed("policy", Policy, json.loads(file.read_text()) if file.exists() else {})
