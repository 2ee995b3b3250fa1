"""Kill a run anywhere, run the same command again: bit-identical weights and metrics."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from runner import checkpoint, journal
from runner.errors import CheckpointError
from runner.sweep.cells import Cell, freeze_cell, make_cells

ROOT = Path(__file__).parent.parent.parent
Compose = Callable[..., dict[str, Any]]
HARD = ["model.dropout=0.1", "train.micro_batch=2", "train.checkpoint.every_steps=5", "train.steps=40"]  # fmt: skip


def _start(cell: Cell) -> subprocess.Popen[bytes]:
    freeze_cell(cell)
    command = [sys.executable, "-m", "runner.worker", str(cell.folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)


def _wait_for_step(cell: Cell, step: int, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        lines = journal.read_lines(cell.folder / "metrics.jsonl")
        if any(line.get("step", 0) >= step for line in lines):
            return
        time.sleep(0.002)


def _weights(cell: Cell) -> dict[str, torch.Tensor]:
    newest = checkpoint.newest(cell.folder / "checkpoints")
    assert newest is not None
    return load_file(newest / "model.safetensors")


def _metrics(cell: Cell) -> dict[tuple[int, str], float]:
    last: dict[tuple[int, str], float] = {}
    for line in journal.read_lines(cell.folder / "metrics.jsonl"):
        if "restored" in line:
            last = {k: v for k, v in last.items() if k[0] <= line["restored"]}
        else:
            for key in ("loss", "grad_norm", "val_loss", "lr", "tokens"):
                if key in line:
                    last[line["step"], key] = line[key]
    return last


@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_run_resumes_bit_identically(optim: str, workers: int, compose: Compose, tmp_path: Path) -> None:  # fmt: skip
    overrides = [f"optim={optim}", f"data.num_workers={workers}", *HARD]
    (whole,) = make_cells([("", compose(*overrides, f"root={tmp_path / 'whole'}"))])
    (broken,) = make_cells([("", compose(*overrides, f"root={tmp_path / 'broken'}"))])
    assert whole.fingerprint == broken.fingerprint
    assert _start(whole).wait() == 0
    for step in (3, 13, 31):
        process = _start(broken)
        _wait_for_step(broken, step, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert _start(broken).wait() == 0
    assert broken.state == "finished"
    assert len(journal.attempts(broken.folder)) == 4
    a, b = _weights(whole), _weights(broken)
    assert all(torch.equal(a[name], b[name]) for name in a.keys() | b.keys())
    assert _metrics(whole) == _metrics(broken)


def test_sigterm_saves_and_asks_to_be_resumed(compose: Compose) -> None:
    (cell,) = make_cells([("", compose("train.steps=100000", "train.checkpoint.keep_best=false"))])
    process = _start(cell)
    _wait_for_step(cell, 5, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert cell.state == "interrupted"
    assert checkpoint.newest(cell.folder / "checkpoints") is not None


def test_a_damaged_checkpoint_is_passed_over(compose: Compose) -> None:
    (cell,) = make_cells([("", compose(*HARD))])
    assert _start(cell).wait() == 0
    saved = checkpoint.listing(cell.folder / "checkpoints")
    file = saved[-1] / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="damaged"):
        assert checkpoint.newest(cell.folder / "checkpoints") == saved[-2]
    other = cell.config.model.__class__(depth=1, width=8, num_heads=1).build(257, 0)
    with pytest.raises(CheckpointError, match="another model"):
        checkpoint.load_weights(saved[-2], other)


def test_divergence_is_a_result(compose: Compose) -> None:
    overrides = ["optim.lr=1e18", "train.clip=null", "schedule=constant", "train.steps=200"]
    (cell,) = make_cells([("", compose(*overrides))])
    assert _start(cell).wait() == 0
    assert cell.state == "diverged"


def test_torn_line_is_ignored_and_truncated(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n{"st')
    assert journal.read_lines(file) == [{"step": 1}]
    attempt = journal.claim(tmp_path)
    assert attempt is not None
    book = journal.Journal(tmp_path, attempt)
    book.metrics(2, {"loss": 1.0})
    book.close()
    assert [line["step"] for line in map(json.loads, file.read_text().splitlines())] == [1, 2]
    assert journal.claim(tmp_path) is None  # this process holds it


def test_two_processes_lose_nothing_against_one(compose: Compose, tmp_path: Path) -> None:
    """DDP over gloo: gradients are summed in another order, so losses agree to 1e-4, not to the bit."""
    cells = [make_cells([("", compose("model.dropout=0.1", f"root={tmp_path / n}"))])[0] for n in "ab"]  # fmt: skip
    assert _start(cells[0]).wait() == 0
    freeze_cell(cells[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "runner.worker", str(cells[1].folder)], cwd=ROOT, check=False,
        capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    one, two = _metrics(cells[0]), _metrics(cells[1])
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert two[key] == pytest.approx(value, rel=1e-4), key
