"""Signs that a killed process was short of memory."""

import subprocess
import sys

import pytest

from runner.machine.memory_kill import MemoryWatch

HOLD_100_MB = "held = bytearray(b'x' * (100 << 20)); print(flush=True); input()"


def test_a_killed_process_was_short_of_memory_only_near_its_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SLURM_MEM_PER_NODE", raising=False)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_100_MB], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        watch = MemoryWatch(process.pid)
        assert process.stdout is not None
        process.stdout.readline()
        watch.sample()
        process.kill()
    assert watch.shortage() is None
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "1000")  # MB, as SLURM gives it
    assert watch.shortage() is None
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "110")
    shortage = watch.shortage()
    assert shortage is not None
    assert shortage.startswith("it held 0.1")
