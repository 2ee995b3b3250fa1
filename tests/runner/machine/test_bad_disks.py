"""A full disk and a read-only folder: the message names the way out, no finished work is lost.

Each test has a file system of its own, mounted in a private namespace by `unshare`.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.machine import storage
from runner.records import checkpoint_folder
from runner.records.cells import make_cells
from tests.conftest import ROOT, TINY

Compose = Callable[..., dict[str, Any]]


def _private(script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script where mounts are allowed and vanish at its end."""
    return subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or _private("mount -t tmpfs tmpfs /mnt").returncode != 0,
    reason="needs Linux with user namespaces (unshare --user --mount)",
)


def _train(text: Path, root: Path, *overrides: str) -> str:
    command = [sys.executable, "-m", "runner", *TINY, f"data.sources.0.path={text}"]
    return shlex.join([*command, f"root={root}", *overrides])


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_its_last_good_checkpoint(
    text: Path, tmp_path: Path, compose: Compose
) -> None:
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    size = ["model.width=48", "train.steps=200", "eval.every=200", "train.checkpoint.every_steps=1"]
    done = _private(  # another program fills the disk once there is a checkpoint
        f"mount -t tmpfs -o size=12m tmpfs {disk};"
        f"(until ls {disk}/runs/*/checkpoints/0*; do sleep 0.01; done;"
        f" cat /dev/zero > {disk}/full) & {_train(text, disk, *size)}; code=$?;"
        f"rm {disk}/full; cp -r {disk} {copy}; exit $code"
    )
    assert done.returncode != 0
    assert "the disk is full" in done.stderr
    assert "run the same command again" in done.stderr
    assert "Traceback" not in done.stderr
    (run,) = (copy / "runs").iterdir()
    saved = checkpoint_folder.newest(run / "checkpoints")
    assert saved is not None
    assert 0 < int(saved.name) < 200
    assert not list((run / "checkpoints").glob(".partial*"))
    # With room again, the same command goes on from there.
    (cell,) = make_cells([("", compose(*size, f"root={copy}"))])
    assert cell.folder == run
    again = _private(_train(text, copy, *size))
    assert again.returncode == 0, again.stderr
    assert cell.state == "finished"
    lines = storage.read_lines(run / "metrics.jsonl")
    assert any(line.get("restored") == int(saved.name) for line in lines)


WRITE_UNTIL_FULL = """
import sys
from pathlib import Path
from runner.records import journal, metrics
from runner.machine.errors import StorageError

run = Path(sys.argv[1])
writer = journal.Journal(run, journal.claim(run))
(run / "ballast").write_bytes(bytes(60_000))
written = 0
try:
    while True:
        writer.metrics(written, {"loss": 1.0 / (written + 1)})
        written += 1
except StorageError as error:
    assert "the disk is full" in str(error)
(run / "ballast").unlink()
writer.metrics(written, {"loss": 0.0})
assert [row["step"] for row in metrics.read(run)] == list(range(written + 1)), written
"""


def test_a_line_that_a_full_disk_cut_does_not_spoil_the_next_one(tmp_path: Path) -> None:
    command = shlex.join([sys.executable, "-c", WRITE_UNTIL_FULL, str(tmp_path)])
    done = _private(f"mount -t tmpfs -o size=100k tmpfs {tmp_path}; {command}")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("part", ["", "data_cache", "runs"])
def test_a_read_only_folder_is_named(part: str, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "root" / part
    folder.mkdir(parents=True)
    mount = f"mount -t tmpfs -o ro tmpfs {folder}"
    done = _private(f"{mount}; {_train(text, tmp_path / 'root')}")
    assert done.returncode != 0
    assert "Read-only file system" in done.stderr
    assert "set root= to a folder you can write" in done.stderr
    assert "Traceback" not in done.stderr
