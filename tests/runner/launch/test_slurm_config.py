"""What the SLURM launcher does before any job: its keys, the snapshot of the code."""

import py_compile
import struct
from importlib.util import cache_from_source
from pathlib import Path

import pytest

from runner.launch.slurm import SlurmConfig
from runner.launch.slurm_limit import chains
from runner.launch.snapshot import snapshot
from runner.records.config import typed
from tests.command_server import ROOT


def test_a_snapshot_holds_the_code_and_changes_with_it(tmp_path: Path) -> None:
    py_compile.compile(str(ROOT / "runner/launch/snapshot.py"))
    made = snapshot(tmp_path)
    assert (made / "runner/launch/worker.py").read_bytes() == (
        ROOT / "runner/launch/worker.py"
    ).read_bytes()
    assert (made / "conf/config.yaml").exists()
    copied = made / "runner/launch/snapshot.py"  # jobs need not compile what they import
    times = struct.pack("<II", int(copied.stat().st_mtime), copied.stat().st_size)
    assert Path(cache_from_source(copied)).read_bytes()[8:16] == times
    assert snapshot(tmp_path) == made


def test_unknown_launcher_keys_list_the_valid_ones() -> None:
    assert typed("hydra.launcher", SlurmConfig, {"at_once": 2}) == SlurmConfig(at_once=2)
    message = r"hydra\.launcher\.partion is not a key; did you mean partition\?; valid: .*partition"
    with pytest.raises(ValueError, match=message):
        typed("hydra.launcher", SlurmConfig, {"partion": "x"})


@pytest.mark.parametrize(
    ("sizes", "limit", "live", "at_once"),
    [
        ([11], 3, {}, [3]),
        ([6, 3], 3, {}, [2, 1]),
        ([5, 1], 100, {}, [5, 1]),  # all may run: none waits
        ([4, 4, 4], 2, {}, [1, 1, 1]),  # the third waits for the first
        ([8], 5, {"1": 2}, [3]),
        ([8], 5, {"1": 4, "2": 1}, [5]),  # waits for both
        ([8], 5, {"1": 3}, [5]),
        ([2], 5, {"1": 3}, [2]),
    ],
)
def test_arrays_that_run_at_the_same_time_share_the_limit(
    sizes: list[int], limit: int, live: dict[str, int], at_once: list[int]
) -> None:
    running, number = dict(live), 100
    made = chains(sizes, limit, live)
    assert [chain.at_once for chain in made] == at_once
    for tasks, chain in zip(sizes, made, strict=True):
        for part in [2] * (tasks // 2) + [1] * (tasks % 2):
            array = chain.array(part, ["7"])
            assert "7" in array.after
            for job in array.after:
                running.pop(job, None)
            number += 1
            running[str(number)] = array.at_once
            chain.add(str(number))
            assert sum(running.values()) <= limit
