"""What the SLURM launcher does before any job: its keys, the snapshot of the code."""

from pathlib import Path

import pytest

from runner.launch.slurm import SlurmConfig
from runner.launch.snapshot import snapshot
from runner.records.config import typed
from tests.command_server import ROOT


def test_a_snapshot_holds_the_code_and_changes_with_it(tmp_path: Path) -> None:
    made = snapshot(tmp_path)
    assert (made / "runner/launch/worker.py").read_bytes() == (
        ROOT / "runner/launch/worker.py"
    ).read_bytes()
    assert (made / "conf/config.yaml").exists()
    assert not list(made.rglob("*.pyc"))
    assert snapshot(tmp_path) == made


def test_unknown_launcher_keys_list_the_valid_ones() -> None:
    assert typed("hydra.launcher", SlurmConfig, {"at_once": 2}) == SlurmConfig(at_once=2)
    message = r"hydra\.launcher\.partion is not a key; did you mean partition\?; valid: .*partition"
    with pytest.raises(ValueError, match=message):
        typed("hydra.launcher", SlurmConfig, {"partion": "x"})
